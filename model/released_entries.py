"""What each stored tensor is, and whether the model of config.json can have it (specification 11.1, 11.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from consilience.conf.errors import CheckpointError
from consilience.model.config import ModelConfig
from consilience.model.number_formats import FP4_BLOCK, FP8_TILE
from consilience.model.shards import INDEX, SINGLE, Stored
from consilience.model.tensor_names import Kind, kind_of, official_of, packed_experts, scale_name

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
TILES = {"fp8": FP8_TILE, "fp4": (1, FP4_BLOCK)}
SCALES = {"fp8": (torch.float8_e8m0fnu, torch.float32), "fp4": (torch.float8_e8m0fnu,)}
STORED = {
    Kind.FP8: (torch.float8_e4m3fn, *FLOATS),
    Kind.EXPERT: (torch.int8, torch.float8_e4m3fn, *FLOATS),
    Kind.BF16: FLOATS,
    Kind.FP32: (torch.float32, torch.float64),
    Kind.INT64: (torch.int64,),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of the model as it is stored: values, and the scales of quantised ones.

    shape is that of the values; first_row says where they begin in a packed tensor.
    """

    payload: Stored
    shape: tuple[int, ...]
    scale: Stored | None = None
    first_row: int = 0

    @property
    def form(self) -> str:
        """ "fp4", "fp8" or "plain"."""
        return {torch.int8: "fp4", torch.float8_e4m3fn: "fp8"}.get(self.payload.dtype, "plain")


def join_entries(stored: Mapping[str, Stored]) -> dict[str, Entry]:
    """Official name -> entry, scales joined to their weights, packed experts taken apart.

    CheckpointError for a tensor that is there twice, and for a scale without its weight.
    """
    entries: dict[str, Entry] = {}
    scales: dict[str, Stored] = {}
    for name, tensor in stored.items():
        if len(tensor.shape) == 3 and (parts := packed_experts(name, *tensor.shape[:2])):
            flat = replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))
            found = {n: Entry(flat, (b - a, flat.shape[1]), first_row=a) for n, (a, b) in parts.items()}
        else:
            official = official_of(name)
            weight = f"{official.removesuffix('.scale')}.weight"
            if official.endswith(".scale") and kind_of(weight) in (Kind.FP8, Kind.EXPERT):
                scales[weight] = tensor
                continue
            is_packed = tensor.dtype == torch.int8 and len(tensor.shape) == 2
            shape = (tensor.shape[0], 2 * tensor.shape[1]) if is_packed else tensor.shape
            found = {official: Entry(tensor, shape)}
        for official in found.keys() & entries.keys():
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {official} again, which "
                f"{entries[official].payload.file.name} has as {entries[official].payload.name}"
            )
        entries |= found
    for weight, scale in scales.items():
        if weight not in entries:
            raise CheckpointError(
                f"{scale.file}: tensor {scale.name} is the scale of {weight}, which is missing"
            )
        entries[weight] = replace(entries[weight], scale=scale)
    return entries


def check_names(folder: Path, entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name in sorted(expected.keys() - entries.keys()):
        where = folder / (INDEX if (folder / INDEX).is_file() else SINGLE)
        raise CheckpointError(
            f"{where}: tensor {name} is missing, config.json asks for it with shape "
            f"{list(expected[name])}; the weights belong to another model"
        )
    for name in sorted(entries.keys() - expected.keys()):
        tensor = entries[name].payload
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is unexpected, the model of config.json has none of that "
            "name; the weights belong to another model"
        )


def check_entry(name: str, entry: Entry, shape: tuple[int, ...], config: ModelConfig, layout: str) -> None:
    tensor, kind = entry.payload, kind_of(name)
    # A whole transformers model may have been cast; the released files keep these in fp32.
    allowed = FLOATS if layout == "transformers" and kind is Kind.FP32 else STORED[kind]
    if tensor.dtype not in allowed:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has type {_short(tensor.dtype)}, expected "
            f"{' or '.join(map(_short, allowed))}"
        )
    if entry.shape != shape:
        packed = "two values a byte, " if entry.form == "fp4" else ""
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} has shape {list(entry.shape)} ({packed}as found), the "
            f"model of config.json needs {list(shape)}; the weights belong to another model"
        )
    if kind is Kind.EXPERT and entry.form != "plain" and config.expert_dtype not in (None, entry.form):
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} is {entry.form}, config.json says expert_dtype "
            f"{config.expert_dtype}"
        )
    if (entry.form == "plain") != (entry.scale is None):
        found, wanted = ("a scale", "none") if entry.scale else ("no scale", scale_name(name))
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name} ({_short(tensor.dtype)}) has {found}, expected {wanted}"
        )
    if entry.scale is not None:
        wanted_shape = tuple(-(-size // tile) for size, tile in zip(shape, TILES[entry.form]))
        scales = SCALES[entry.form]
        if entry.scale.dtype not in scales or entry.scale.shape != wanted_shape:
            raise CheckpointError(
                f"{entry.scale.file}: tensor {entry.scale.name} is {_short(entry.scale.dtype)} "
                f"{list(entry.scale.shape)}, expected {' or '.join(map(_short, scales))} "
                f"{list(wanted_shape)}"
            )


def expert_form(entries: Mapping[str, Entry]) -> str | None:
    """fp4 or fp8 as all experts are stored; None where they are not quantised."""
    forms = {entry.form: entry for name, entry in entries.items() if kind_of(name) is Kind.EXPERT}
    if len(forms) > 1:
        one = next(iter(forms.values())).payload
        raise CheckpointError(
            f"{one.file}: tensor {one.name} is one of experts stored as {' and '.join(forms)}"
        )
    form = next(iter(forms))
    return None if form == "plain" else form


def layout_of(stored: Mapping[str, Stored]) -> str:
    if any(name.startswith("model.") or official_of(name) != name for name in stored):
        return "transformers"
    is_quantised = any(t.dtype in (torch.int8, torch.float8_e4m3fn) for t in stored.values())
    return "official" if is_quantised else "native"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
