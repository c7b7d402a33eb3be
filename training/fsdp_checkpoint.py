"""Checkpoints of a model cut by FSDP2, in the files that one process writes, streamed piece by piece.

Every rank calls; the first one writes. What goes wrong on the disk is kept until all pieces have passed, so
that no rank waits for one that has given up.

R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import check_hash_tables, official_parts
from consilience.model.ranks import Ranks
from consilience.model.shards import ShardWriter, Stored, read_folder, read_rows
from consilience.training.sharded_tensors import Piece, Sharded, cut_pieces, read_piece, write_sharded
from consilience.training.tensor_files import check_tensors, shards

Filled = Callable[[Mapping[str, Sharded]], Iterable[tuple[str, Sharded]]]


def official_weights(model: nn.Module, ranks: Ranks) -> dict[str, Sharded]:
    """Every tensor of the model under its official name, as it lies on the ranks, in a checkpoint's order."""
    found: dict[str, Sharded] = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        pieces = cut_pieces(shape, ranks.size if isinstance(tensor, DTensor) else 1)
        parts = list(official_parts(name, torch.empty(shape, dtype=tensor.dtype, device="meta")))
        if len(shape) < 3:
            found[parts[0]] = Sharded(tensor.dtype, shape, pieces, local)
            continue
        for piece in pieces:  # a stack of experts, each of which lies whole on one rank
            for expert in range(piece.first, piece.last):
                own = local[expert - piece.first] if piece.rank == ranks.rank else None
                rows = (Piece(piece.rank, 0, shape[1]),)
                found[parts[expert]] = Sharded(tensor.dtype, shape[1:], rows, own)
    return found


def as_meta(tensors: Mapping[str, Sharded]) -> dict[str, Tensor]:
    """Type and shape of each, without memory."""
    return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in tensors.items()}


def stream_files(
    folder: Path | None,
    files: Mapping[str, Mapping[str, Sharded]],
    ranks: Ranks,
    filled: Filled = lambda tensors: tensors.items(),
) -> dict[str, str] | None:
    """Write files, name -> tensors, into `folder`, which the first rank gives; tensor -> file.

    filled  the tensors of a file in their order with this rank's rows, which may be made as they are written
    None if nothing was written, on all ranks: the first one has given none, or raises why.
    """
    writer: ShardWriter | None = None
    error: Exception | None = None
    if ranks.is_first and folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            writer = ShardWriter(folder)
            for file_name, tensors in files.items():
                writer.lay_out(file_name, {name: (t.dtype, t.shape) for name, t in tensors.items()})
        except Exception as failure:
            writer, error = None, failure
    if ranks.broadcast(writer is not None):
        for tensors in files.values():
            error = write_sharded(writer if error is None else None, filled(tensors), ranks) or error
    is_done = ranks.broadcast(writer is not None and error is None)
    if error is not None:
        raise error
    if writer is not None:
        writer.close()
    return {name: file for file, tensors in files.items() for name in tensors} if is_done else None


def weight_files(weights: Mapping[str, Sharded], max_shard_bytes: int) -> dict[str, dict[str, Sharded]]:
    """Shard -> its tensors, as one process would divide them."""
    meta = as_meta(weights)
    return {file: {n: weights[n] for n in part} for file, part in shards(meta, max_shard_bytes)}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a folder's shards, each read when it is asked for."""

    def __init__(self, folder: Path, weight_map: Mapping[str, str]) -> None:
        from consilience.model.shards import read_header

        self._stored: dict[str, Stored] = {}
        for file_name in sorted(set(weight_map.values())):
            self._stored |= read_header(folder / file_name)

    def __getitem__(self, name: str) -> Tensor:
        return read_rows(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@torch.no_grad()
def read_weights(folder: Path, model: nn.Module, ranks: Ranks) -> None:
    """Each rank's rows of a checkpoint's weights into the cut model, one tensor's at a time.

    CheckpointError names the tensor that does not fit.
    """
    stored = read_folder(folder)
    weights = official_weights(model, ranks)
    check_tensors(folder, stored, as_meta(weights))
    for name, tensor in weights.items():
        rows = read_piece(stored[name], tensor, ranks.rank)
        if rows is not None and tensor.local is not None:
            tensor.local.copy_(rows)
    check_hash_tables(model)  # type: ignore[arg-type]


def check_state(expected: Mapping[str, Sharded], stored: Mapping[str, Stored]) -> None:
    """CheckpointError on a missing, unexpected or wrongly shaped tensor of the optimiser's state."""
    for name in sorted(expected.keys() ^ stored.keys()):
        problem = "is missing" if name in expected else "is not a state of this model's optimiser"
        raise CheckpointError(
            f"optimiser state: {name} {problem}; resume with the model and optimiser that wrote it"
        )
    for name, tensor in expected.items():
        if stored[name].shape != tensor.shape:
            raise CheckpointError(
                f"optimiser state: {name} has shape {list(stored[name].shape)}, expected {list(tensor.shape)}"
            )
