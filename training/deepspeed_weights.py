"""Weights under ZeRO-3, whole on no rank: given to the first rank and read back a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from consilience.model.checkpoint import official_parts
from consilience.model.ranks import Ranks
from consilience.model.shards import read_folder, read_rows
from consilience.training.tensor_files import check_tensors, shards, write_tensors

Whole = Callable[..., AbstractContextManager[None]]
"""`DeepSpeedEngine.whole_weights`: collective; weights of the given names are whole within."""


def gather_weights(model: nn.Module, whole: Whole, ranks: Ranks) -> dict[str, Tensor] | None:
    """Every tensor by its official name on the first rank's host; None on others. All ranks call."""
    held: dict[str, Tensor] = {}
    for names in _pieces(model):
        with whole(names=names):
            if ranks.is_first:
                tensors = model.state_dict()
                held |= {name: tensors[name].to("cpu", copy=True) for name in names}
    if not ranks.is_first:
        return None
    found: dict[str, Tensor] = {}
    for name in model.state_dict():
        found |= official_parts(name, held[name])
    return found


def write_weights(
    folder: Path | None, tensors: dict[str, Tensor] | None, max_shard_bytes: int, ranks: Ranks
) -> dict[str, str] | None:
    """The files of one process by the first rank, which has `tensors`; see `CutEngine.write_weights`."""
    weight_map: dict[str, str] = {}
    error: Exception | None = None
    if folder is not None and tensors is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file_name, shard in shards(tensors, max_shard_bytes):
                write_tensors(folder / file_name, shard)
                weight_map |= dict.fromkeys(shard, file_name)
        except Exception as failure:
            error = failure
    is_done = ranks.broadcast(error is None)
    if error is not None:
        raise error
    return weight_map if is_done else None


@torch.no_grad()
def read_weights(folder: Path, model: nn.Module, whole: Whole) -> None:
    """A checkpoint's weights, whoever wrote it, into the divided model; every rank reads the files.

    CheckpointError names the tensor, on all ranks and before anything is changed.
    """
    stored = read_folder(folder)
    expected: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        shape = getattr(tensor, "ds_shape", tensor.shape)
        expected |= official_parts(name, torch.empty(shape, dtype=tensor.dtype, device="meta"))
    check_tensors(folder, stored, expected)
    for names in _pieces(model):
        with whole(is_changed=True, names=names):
            tensors = model.state_dict()
            for name in names:
                for official, part in official_parts(name, tensors[name]).items():
                    part.copy_(read_rows(stored[official]))


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor] | None, whole: Whole, ranks: Ranks) -> None:
    """Inverse of `gather_weights`: the first rank gives every tensor, the others None."""
    for names in _pieces(model):
        with whole(is_changed=True, names=names):
            tensors = model.state_dict()
            for name in sorted(names):  # in the same order on all ranks
                for official, part in official_parts(name, tensors[name]).items():
                    if weights is None:
                        here = torch.empty(part.shape, dtype=part.dtype, device=part.device)
                    else:
                        here = weights[official].to(part.device, part.dtype).contiguous()
                    ranks.spread_(here, 0)
                    part.copy_(here)


def _pieces(model: nn.Module) -> Iterator[set[str]]:
    """Names of all tensors: those of each block of the trunk, then the others, which every rank has."""
    rest = set(model.state_dict())
    for number in range(len(model.layers)):  # type: ignore[arg-type]
        block = {name for name in rest if name.startswith(f"layers.{number}.")}
        rest -= block
        yield block
    yield rest
