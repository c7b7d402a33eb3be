"""Tensors cut over ranks, written to safetensors files one piece at a time, and read the same way.

What lies in the files does not tell how many ranks there were: a file is laid out for whole tensors, the
first rank takes one piece after the other and writes it where it belongs. No rank holds more than its own
part and one piece. Reading, each rank reads the rows of its own part.

R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from consilience.model.ranks import Ranks
from consilience.model.shards import ShardWriter, Stored, read_rows
from consilience.training.matrix_owners import rows_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first to last - 1 of a tensor, on one rank; of a scalar 0 to 1."""

    rank: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Sharded:
    """A whole tensor's type and shape, where its rows lie, and those of this rank (None: it has none)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    local: Tensor | None

    def piece_of(self, rank: int) -> Piece | None:
        """The rank's piece."""
        return next((piece for piece in self.pieces if piece.rank == rank), None)


def cut_pieces(shape: tuple[int, ...], size: int) -> tuple[Piece, ...]:
    """The pieces of a tensor cut over `size` ranks; with 1, the first rank's whole."""
    num_rows = shape[0] if shape else 1
    cut = [(rank, *rows_of(num_rows, rank, size)) for rank in range(size)]
    return tuple(Piece(rank, first, last) for rank, first, last in cut if last > first)


def write_sharded(
    writer: ShardWriter | None, tensors: Iterable[tuple[str, Sharded]], ranks: Ranks
) -> Exception | None:
    """Every piece into the files that the first rank's `writer` has laid out; the others have None.

    The first error in writing comes back when all pieces have passed.
    """
    error: Exception | None = None
    for name, tensor in tensors:
        for piece in tensor.pieces:
            rows = _to_first(tensor, piece, ranks)
            if writer is None or rows is None or error is not None:
                continue
            try:
                writer.write_rows(name, piece.first, rows)
            except Exception as failure:
                error = failure
    return error


def gather_sharded(tensors: Mapping[str, Sharded], ranks: Ranks) -> dict[str, Tensor] | None:
    """Whole tensors in the host's memory of the first rank, a piece at a time; None on the others."""
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        here = torch.empty(tensor.shape, dtype=tensor.dtype) if ranks.is_first else None
        for piece in tensor.pieces:
            rows = _to_first(tensor, piece, ranks)
            if here is not None and rows is not None:
                (here[piece.first : piece.last] if tensor.shape else here).copy_(rows)
        if here is not None:
            whole[name] = here
    return whole if ranks.is_first else None


def scatter_sharded(tensors: Mapping[str, Sharded], whole: Mapping[str, Tensor] | None, ranks: Ranks) -> None:
    """Inverse of `gather_sharded`: whole tensors of the first rank into what each rank has of them, in place.

    One whole tensor at a time is on every rank's device.
    """
    for name, tensor in tensors.items():
        if whole is not None:
            here = whole[name].to(ranks.device, tensor.dtype).contiguous()
        else:
            here = torch.empty(tensor.shape, dtype=tensor.dtype, device=ranks.device)
        ranks.spread_(here, 0)
        piece = _own_piece(tensor, ranks.rank)
        if piece is not None and tensor.local is not None:
            tensor.local.copy_(here[piece.first : piece.last] if tensor.shape else here)


def _to_first(tensor: Sharded, piece: Piece, ranks: Ranks) -> Tensor | None:
    """A piece on the first rank; None on the others."""
    rows = tensor.local
    if piece.rank != 0 and ranks.rank == piece.rank:
        assert rows is not None
        dist.send(rows.detach().to(tensor.dtype).contiguous(), group=ranks.group, group_dst=0)
    if not ranks.is_first:
        return None
    if piece.rank == 0:
        assert rows is not None
        return rows.detach().to(tensor.dtype)
    shape = (piece.last - piece.first, *tensor.shape[1:])
    found = torch.empty(shape, dtype=tensor.dtype, device=ranks.device)
    dist.recv(found, group=ranks.group, group_src=piece.rank)  # no limit: the group's own
    return found


def read_piece(stored: Stored, tensor: Sharded, rank: int) -> Tensor | None:
    """What a rank has of a stored tensor: its piece, or all of it where it lies whole on every rank."""
    piece = _own_piece(tensor, rank)
    if piece is None:
        return None
    return read_rows(stored, piece.first, piece.last) if stored.shape else read_rows(stored)


def _own_piece(tensor: Sharded, rank: int) -> Piece | None:
    """A rank's piece; that of all rows where they are whole on every rank."""
    piece = tensor.piece_of(rank)
    if len(tensor.pieces) == 1 and piece is None and tensor.local is not None:
        piece = tensor.pieces[0]
    return piece
