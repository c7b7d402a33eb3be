"""Which rank updates which of Muon's matrices (V4 report, section on Muon; specification, section 12.2).

Muon needs a matrix whole, so optimiser state is divided between matrices, never inside one.

    dense     a knapsack: the largest first, each to the rank that holds least. Fewer ranks than there are
              take part where the largest matrix would leave most of them half empty; the others repeat the
              work.
    experts   one line of all w2, then all w3, then all w1, cut where R equal parts would end, at the
              nearest border of a matrix. All ranks take part.

The report has at most five matrices a rank and less than 10 % padding (by how much R times the fullest rank
exceeds what there is). Five of N matrices a rank need at least N / 5 ranks: V4-Flash has 654 dense weights
and V4-Pro 928. With fewer ranks the second bound is what counts, and matrices that one weight stacks (`wo_a`
by group, row blocks) are dealt out singly where whole weights pack worse.

R ranks, N matrices, E experts.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from consilience.training.muon import MuonParameter

MOST_PIECES = 5
MOST_PADDING = 0.10


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows (of a stack: experts) `start` to `stop` of one weight; whole matrices.

    row_blocks    heights of the independent row blocks, as in `MuonParameter`
    num_elements  numbers in it
    offset        numbers of the weight before it
    """

    name: str
    start: int
    stop: int
    row_blocks: tuple[int, ...]
    num_elements: int
    offset: int


@dataclass(frozen=True, slots=True)
class Assignment:
    """Pieces of each rank that takes part, in the order of the ranks; R' of them.

    Where R' is less than the number of ranks, rank r does the work of r mod R'.
    """

    pieces: tuple[tuple[Piece, ...], ...]

    @property
    def loads(self) -> list[int]:
        """Numbers a rank holds, by rank."""
        return [sum(piece.num_elements for piece in own) for own in self.pieces]

    @property
    def padding(self) -> float:
        """Share by which R' buffers as large as the fullest exceed what they hold; 0 for nothing at all."""
        loads = self.loads
        return max(loads) * len(loads) / sum(loads) - 1.0 if sum(loads) else 0.0

    @property
    def most_pieces(self) -> int:
        """The largest number of pieces on a rank."""
        return max(len(own) for own in self.pieces)


def is_expert(name: str) -> bool:
    """Whether a tensor holds routed experts (`ffn.experts.…`; shared experts are dense)."""
    return ".experts." in name


def pack(sizes: Sequence[int], num_ranks: int, most: int) -> list[list[int]]:
    """Indices of the items of each rank: the largest first, each to the emptiest rank with less than `most`.

    Ties go to the lower index and the lower rank. ValueError where num_ranks · most < number of items.
    """
    if num_ranks * most < len(sizes):
        raise ValueError(
            f"{len(sizes)} matrices do not go on {num_ranks} ranks at {most} a rank; allow more of either"
        )
    packed: list[list[int]] = [[] for _ in range(num_ranks)]
    emptiest = [(0, rank) for rank in range(num_ranks)]
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = heapq.heappop(emptiest)
        packed[rank].append(item)
        if len(packed[rank]) < most:
            heapq.heappush(emptiest, (load + sizes[item], rank))
    return packed


def assign_dense(
    parameters: Sequence[MuonParameter],
    num_ranks: int,
    *,
    most_pieces: int = MOST_PIECES,
    most_padding: float = MOST_PADDING,
) -> Assignment:
    """Dense weights to a divisor R' of the ranks.

    R' is the largest at which both bounds can be kept; else the largest at which the padding can (one rank
    always can), with as few pieces a rank as there are matrices for. Whole weights go before single matrices.
    """
    choices = [_weights(parameters), _matrices(parameters)]
    divisors = [size for size in range(num_ranks, 0, -1) if num_ranks % size == 0]
    for limit in (most_pieces, None):
        for size in divisors:
            for pieces in choices:
                most = limit or max(1, -(-len(pieces) // size))
                if size * most < len(pieces):
                    continue
                packed = pack([piece.num_elements for piece in pieces], size, most)
                found = Assignment(tuple(tuple(pieces[i] for i in sorted(own)) for own in packed))
                if found.padding < most_padding:
                    return found
    raise AssertionError("one rank has no padding")


def assign_experts(parameters: Sequence[MuonParameter], num_ranks: int) -> Assignment:
    """All matrices of the routed experts, in order w2, w3, w1, in R even parts; a part has no gap.

    No rank holds more than an even part and one matrix; where all matrices are of one size, no more than
    ⌈N / R⌉ of them.
    """
    order = sorted(parameters, key=lambda p: _EXPERT_ORDER[_matrix_kind(p.name)])
    total = sum(parameter.parameter.numel() for parameter in order)
    parts: list[list[Piece]] = [[] for _ in range(num_ranks)]
    done = 0
    for owned in order:
        rows = 1 if owned.parameter.ndim == 3 else owned.parameter.shape[0]
        size = owned.parameter.numel() * rows // owned.parameter.shape[0]
        runs: dict[int, list[int]] = {}
        for start in range(0, owned.parameter.shape[0], rows):
            runs.setdefault((2 * done + size) * num_ranks // (2 * total), []).append(start)
            done += size
        for rank, starts in runs.items():
            parts[rank].append(_piece(owned, starts[0], starts[-1] + rows, owned.row_blocks))
    return Assignment(tuple(tuple(own) for own in parts))


_EXPERT_ORDER = {"w2": 0, "w3": 1, "w1": 2}


def _matrix_kind(name: str) -> str:
    return next(part for part in reversed(name.split(".")) if part in _EXPERT_ORDER)


def _weights(parameters: Sequence[MuonParameter]) -> list[Piece]:
    return [_piece(p, 0, p.parameter.shape[0], p.row_blocks) for p in parameters]


def _matrices(parameters: Sequence[MuonParameter]) -> list[Piece]:
    """Row blocks of flat weights one by one, matrices of stacks one by one."""
    pieces: list[Piece] = []
    for owned in parameters:
        if owned.parameter.ndim == 3:
            pieces += [_piece(owned, i, i + 1, owned.row_blocks) for i in range(owned.parameter.shape[0])]
            continue
        start = 0
        for height in owned.row_blocks:
            pieces.append(_piece(owned, start, start + height, (height,)))
            start += height
    return pieces


def _piece(owned: MuonParameter, start: int, stop: int, row_blocks: tuple[int, ...]) -> Piece:
    row = owned.parameter.numel() // owned.parameter.shape[0]
    return Piece(owned.name, start, stop, row_blocks, (stop - start) * row, start * row)
