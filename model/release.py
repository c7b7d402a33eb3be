"""Weights into a folder, block by block, in a layout that others load (specification 11).

    official      released names, FP8 and packed FP4 with their scales: DeepSeek's code, vLLM, transformers
    native        released names, nothing quantised: training here, vLLM, transformers
    transformers  names of transformers' modules and its config.json, nothing quantised, no MTP

What was read from an official checkpoint and not changed is written as it was: pass it as `like`, and
its scales are kept wherever they hold the values exactly, its files are laid out as it lays them out,
and the `mtp.*` tensors that the model has no place for are carried over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.config import ModelConfig
from consilience.model.config_layouts import rewrite
from consilience.model.number_formats import (
    decode_fp8,
    decode_mxfp4,
    encode_fp8,
    encode_mxfp4,
    mxfp4_to_fp8,
)
from consilience.model.release_plan import Slot, plan_slots, shard_slots
from consilience.model.released_checkpoint import CONFIG, ReleasedCheckpoint, blocks_of
from consilience.model.released_entries import TILES
from consilience.model.shards import INDEX, ShardWriter, header_bytes, read_rows
from consilience.model.transformer import Transformer

ENCODE = {"fp8": encode_fp8, "fp4": encode_mxfp4}
DECODE = {"fp8": decode_fp8, "fp4": decode_mxfp4}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True)
class Source:
    """Where weights come from: a model in memory, or a checkpoint that is read as it is written.

    shapes      official name -> shape
    read        official name, first row, last row -> values
    checkpoint  what is read, None for a model
    """

    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str, int, int], Tensor]
    checkpoint: ReleasedCheckpoint | None = None


def from_model(model: Transformer) -> Source:
    """The weights of a model, which stay where they are until their turn comes."""
    tensors = to_official(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Source(model.config, shapes, lambda name, first, last: tensors[name][first:last].cpu())


def from_checkpoint(checkpoint: ReleasedCheckpoint) -> Source:
    """The weights of a folder, read as they are written."""
    shapes = {name: entry.shape for name, entry in checkpoint.entries.items()}
    read = lambda name, first, last: checkpoint.read(name, slice(first, last))
    return Source(checkpoint.config, shapes, read, checkpoint)


@torch.no_grad()
def write_release(
    folder: Path,
    source: Source,
    *,
    layout: str = "official",
    experts: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    like: ReleasedCheckpoint | None = None,
    max_shard_bytes: int = 4 << 30,
    on_block: Callable[[str, int, int], None] = lambda name, num_bytes, total_bytes: None,
) -> None:
    """Shards, index and config.json into the empty folder, neither flushed nor published.

    experts   "fp4", "fp8" or "bf16": how official routed experts are stored; "bf16" leaves them as `dtype`.
              None: as `like` or the checkpoint read stores them, else as config says, else "fp4"
    dtype     of what is not quantised; what V4 keeps in fp32 stays that
    like      checkpoint whose scales, files and config.json are kept where nothing differs
    on_block  called after each block: the tensor's official name, the bytes written, the bytes in all

    One block of rows is in memory beside the source. CheckpointError if `like` is another model, if a
    value cannot be stored in the form asked for, or MXFP4 experts do not fit FP8 without loss.
    """
    if like is not None and _described(like.config) != _described(source.config):
        raise CheckpointError(f"{like.folder / CONFIG} describes another model than the one to be written")
    given = like or source.checkpoint
    if experts is None:
        stored = given.config.expert_dtype or "bf16" if given and given.layout == "official" else None
        experts = stored or source.config.expert_dtype or "fp4"
    slots = plan_slots(source.shapes, layout, experts, dtype, given)
    writer = ShardWriter(folder)
    is_same = given is not None and given.layout == layout and _takes_over(writer, given, slots)
    if is_same:
        assert given is not None
        for tensor in given.left_out:
            writer.write_rows(tensor.name, 0, read_rows(tensor))
    else:
        for file_name, tensors in shard_slots(slots, max_shard_bytes):
            writer.lay_out(file_name, tensors)
    for name, slot in slots.items():
        for first, last in blocks_of(source.shapes[name]):
            if slot.scale is None:
                rows = source.read(name, first, last).to(slot.dtype)
                writer.write_rows(slot.stored, slot.first_row + first, rows)
                on_block(name, rows.nbytes, writer.total_bytes)
                continue
            codes, scale = _quantised(source, name, first, last, slot, like)
            writer.write_rows(slot.stored, first, codes)
            writer.write_rows(slot.scale, first // TILES[slot.form][0], scale)
            on_block(name, codes.nbytes + scale.nbytes, writer.total_bytes)
    writer.close()
    _write_tables(folder, source, writer, given, is_same, (layout, experts, dtype))


def _quantised(
    source: Source, name: str, first: int, last: int, slot: Slot, like: ReleasedCheckpoint | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales of a block: as they were where the form is the same, lossless where it can be."""
    held = source.checkpoint.entries[name].form if source.checkpoint else "plain"
    try:
        if source.checkpoint and held == slot.form:
            return source.checkpoint.read_quantised(name, first, last)
        if source.checkpoint and (held, slot.form) == ("fp4", "fp8"):
            return mxfp4_to_fp8(*source.checkpoint.read_quantised(name, first, last))
        scale = None
        if like is not None and like.entries[name].form == slot.form:
            scale = like.read_quantised(name, first, last)[1]
        return encode_keeping(source.read(name, first, last), slot.form, scale)
    except ValueError as error:
        raise CheckpointError(f"tensor {name} cannot be stored as {slot.form}: {error}") from error


def encode_keeping(values: Tensor, form: str, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scales of values [out, in]; a tile keeps its given scale if that holds it bit for bit.

    form "fp8" or "fp4"; given: scales of these tiles, None for the canonical ones throughout.
    """
    encode, decode = ENCODE[form], DECODE[form]
    if given is None:
        return encode(values)
    codes, _ = encode(values, scale=given)
    bits = BITS[values.dtype]
    differs = decode(codes, given, values.dtype).view(bits) != values.view(bits)
    if not differs.any():
        return codes, given
    is_changed = _any_in_tile(differs, TILES[form])
    raw = torch.uint8 if given.dtype.itemsize == 1 else given.dtype
    canonical = encode(values)[1].to(given.dtype)
    scale = torch.where(is_changed, canonical.view(raw), given.view(raw)).view(given.dtype)
    return encode(values, scale=scale)[0], scale


def _any_in_tile(flags: Tensor, tile: tuple[int, int]) -> Tensor:
    down, across = (-size % side for size, side in zip(flags.shape, tile))
    padded = functional.pad(flags, (0, across, 0, down))
    return padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0])).any(-1).any(1)


def _takes_over(writer: ShardWriter, like: ReleasedCheckpoint, slots: Mapping[str, Slot]) -> bool:
    """Lay out the files of `like` again, if the tensors to be written are exactly its own."""
    theirs = {tensor.name: tensor for tensor in like.left_out}
    for entry in like.entries.values():
        theirs |= {t.name: t for t in (entry.payload, entry.scale) if t is not None}
    ours = {t.name: (t.dtype, t.shape) for t in like.left_out}
    for slot in slots.values():
        ours |= slot.tensors()
    if ours != {name: (tensor.dtype, tensor.shape) for name, tensor in theirs.items()}:
        return False
    for file in sorted({tensor.file for tensor in theirs.values()}):
        writer.take_over(file.name, header_bytes(file))
    return True


def _write_tables(
    folder: Path,
    source: Source,
    writer: ShardWriter,
    given: ReleasedCheckpoint | None,
    is_same: bool,
    storage: tuple[str, str, torch.dtype],
) -> None:
    """Index and config.json: those of `given` byte for byte where the same tensors were written."""
    if given is not None and is_same:
        for name in (INDEX, CONFIG):
            if (given.folder / name).is_file():
                (folder / name).write_bytes((given.folder / name).read_bytes())
        return
    index = {"metadata": {"total_size": writer.total_bytes}, "weight_map": writer.weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    layout, experts, dtype = storage
    num_mtp = len({name.split(".")[1] for name in source.shapes if name.startswith("mtp.")})
    row = given.row if given is not None else source.config.to_json_dict()
    changed = rewrite(row, layout, experts, str(dtype).removeprefix("torch."), num_mtp)
    (folder / CONFIG).write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _described(config: ModelConfig) -> ModelConfig:
    """The config without what says how its tensors are stored, and which of them."""
    return replace(
        config, torch_dtype="", expert_dtype=None, num_nextn_predict_layers=0, mtp_compress_ratios=()
    )
