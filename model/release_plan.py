"""Which tensors a layout stores, in what form, and in which files they lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from consilience.conf.errors import CheckpointError
from consilience.model.released_checkpoint import ReleasedCheckpoint
from consilience.model.released_entries import TILES
from consilience.model.tensor_names import Kind, kind_of, packed_name, scale_name, transformers_of

LAYOUTS = ("official", "native", "transformers")
EXPERTS = ("fp4", "fp8", "bf16")
CODES = {"fp8": torch.float8_e4m3fn, "fp4": torch.int8}
Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a tensor of the model goes.

    form, dtype  "plain", "fp8" or "fp4", and the type of the stored values or codes
    stored       name of the stored tensor, of shape `shape`; values begin at its row first_row
    scale        name of the scales, of type scale_dtype and shape scale_shape; None where there are none
    """

    form: str
    dtype: torch.dtype
    stored: str
    shape: tuple[int, ...]
    first_row: int = 0
    scale: str | None = None
    scale_dtype: torch.dtype = torch.float8_e8m0fnu
    scale_shape: tuple[int, ...] = ()

    def tensors(self) -> Tensors:
        """The stored tensors: name -> type and shape."""
        scales = {self.scale: (self.scale_dtype, self.scale_shape)} if self.scale else {}
        return {self.stored: (self.dtype, self.shape), **scales}


def plan_slots(
    shapes: Mapping[str, tuple[int, ...]],
    layout: str,
    experts: str,
    dtype: torch.dtype,
    like: ReleasedCheckpoint | None,
) -> dict[str, Slot]:
    """Official name -> slot, in the order of the model; arguments as of `write_release`.

    Scales have the type that `like` gives them where it stores the tensor in the same form.
    CheckpointError for a layout or a form of the experts that does not exist.
    """
    if layout not in LAYOUTS or experts not in EXPERTS:
        raise CheckpointError(
            f"layout {layout} with {experts} experts does not exist; layouts are {', '.join(LAYOUTS)}, "
            f"experts {', '.join(EXPERTS)}"
        )
    slots = {}
    num_experts = 1 + max(int(n.split(".")[4]) for n in shapes if kind_of(n) is Kind.EXPERT)
    for name, shape in shapes.items():
        form = _form(kind_of(name), layout, experts)
        if layout == "transformers":
            if not name.startswith("mtp."):
                slots[name] = _transformers_slot(name, shape, dtype, num_experts)
        elif form == "plain":
            slots[name] = Slot(form, _plain_dtype(name, dtype), name, shape)
        else:
            held = like.entries.get(name) if like is not None else None
            is_kept = held is not None and held.form == form and held.scale is not None
            slots[name] = Slot(
                form,
                CODES[form],
                name,
                (shape[0], shape[1] // 2) if form == "fp4" else shape,
                scale=scale_name(name),
                scale_dtype=held.scale.dtype if is_kept else torch.float8_e8m0fnu,  # type: ignore[union-attr]
                scale_shape=tuple(-(-size // tile) for size, tile in zip(shape, TILES[form])),
            )
    return slots


def shard_slots(slots: Mapping[str, Slot], max_shard_bytes: int) -> Iterator[tuple[str, Tensors]]:
    """(file name, its tensors); a weight and its scales share a file, and only one tensor may be over."""
    groups: list[Tensors] = [{}]
    filled = 0
    done: set[str] = set()
    for slot in slots.values():
        if slot.stored in done:
            continue
        done.add(slot.stored)
        tensors = slot.tensors()
        num_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
        if groups[-1] and filled + num_bytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1] |= tensors
        filled += num_bytes
    for number, group in enumerate(groups, 1):
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", group


def _form(kind: Kind, layout: str, experts: str) -> str:
    if layout != "official" or kind not in (Kind.FP8, Kind.EXPERT):
        return "plain"
    if kind is Kind.FP8:
        return "fp8"
    return "plain" if experts == "bf16" else experts


def _plain_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return {Kind.FP32: torch.float32, Kind.INT64: torch.int64}.get(kind_of(name), dtype)


def _transformers_slot(name: str, shape: tuple[int, ...], dtype: torch.dtype, num_experts: int) -> Slot:
    if kind_of(name) is not Kind.EXPERT:
        return Slot("plain", _plain_dtype(name, dtype), transformers_of(name), shape)
    stored, first_row, num_rows = packed_name(name, shape[0])
    return Slot("plain", dtype, stored, (num_experts, num_rows, shape[1]), first_row)
