"""Who owns which part of which tensor, and the traffic that follows: gradients to owners, results to all.

Tensors are contiguous, their numbers one row; a range of them has one owner. Gradients travel by all-to-all
and are added by the owner, in fp32 and in the order of the ranks, as the report does it for experts: the sum
does not depend on how a ring passes it on. What owners computed travels back by all-gather. Both go in
windows of bounded size.

R ranks, W numbers of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.ranks import Ranks

WINDOW_BYTES = 64 << 20
Rounding = Callable[[str, Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers `start` to `stop` of the tensor `name`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class _Cut:
    """Numbers `start` to `stop` of a range's tensor; the window of its owner has them from `at` on."""

    item: Range
    start: int
    stop: int
    at: int

    @property
    def here(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)

    def of(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return tensors[self.item.name].view(-1)[self.start : self.stop]


class Ownership:
    """owners[r] are the ranges of rank r, `ranks.size` of them; every rank has the same lists."""

    def __init__(self, ranks: Ranks, owners: Sequence[Sequence[Range]]) -> None:
        if len(owners) != ranks.size:
            raise EngineError(f"owners of {len(owners)} ranks, there are {ranks.size}")
        self.ranks, self.owners = ranks, owners

    @torch.no_grad()
    def sums(self, tensors: Mapping[str, Tensor], rounding: Rounding | None = None) -> dict[Range, Tensor]:
        """This rank's ranges of the tensors, summed over the ranks: [number of it], fp32 or fp64.

        tensors   on every rank the same names, shapes and types; a range of another tensor is passed over
        rounding  (name, numbers, their place in the tensor) -> bf16, before they travel; None: they travel as
                  they are, in fp32 at least
        """
        found: dict[Range, Tensor] = {}
        for dtype in _dtypes(tensors):
            work = torch.promote_types(dtype, torch.float32)
            own = [item for item in self.owners[self.ranks.rank] if _is_of(item, tensors, dtype)]
            found |= {r: torch.empty(r.stop - r.start, dtype=work, device=self.ranks.device) for r in own}
            wire = torch.bfloat16 if rounding is not None else work
            for cuts in self._windows(tensors, dtype, work.itemsize):
                given = [
                    cut.of(tensors).to(wire)
                    if rounding is None
                    else rounding(cut.item.name, cut.of(tensors), cut.start)
                    for of_rank in cuts
                    for cut in of_rank
                ]
                lengths = [of_rank[-1].here.stop if of_rank else 0 for of_rank in cuts]
                total = self._exchange_and_add(given, lengths, wire, work)
                for cut in cuts[self.ranks.rank]:
                    first = cut.item.start
                    found[cut.item][cut.start - first : cut.stop - first] = total[cut.here]
        return found

    @torch.no_grad()
    def share_(self, tensors: Mapping[str, Tensor]) -> None:
        """Every range of the tensors becomes what its owner has, in place; tensors as in `sums`."""
        if self.ranks.size == 1:
            return
        for dtype in _dtypes(tensors):
            for cuts in self._windows(tensors, dtype, dtype.itemsize):
                width = max(of_rank[-1].here.stop for of_rank in cuts if of_rank)
                own = torch.zeros(width, dtype=dtype, device=self.ranks.device)
                for cut in cuts[self.ranks.rank]:
                    own[cut.here] = cut.of(tensors)
                found = self.ranks.stack(own.view(torch.uint8)).view(dtype)
                for rank, of_rank in enumerate(cuts):
                    for cut in of_rank if rank != self.ranks.rank else ():
                        cut.of(tensors).copy_(found[rank, cut.here])

    @torch.no_grad()
    def whole_(self, tensor: Tensor, name: str) -> None:
        """Every range of one tensor becomes what its owner has, in place, one broadcast a range."""
        for rank, items in enumerate(self.owners):
            for item in items:
                if item.name == name and item.start < item.stop:
                    self.ranks.spread_(tensor.view(-1)[item.start : item.stop], rank)

    def _windows(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, width: int
    ) -> Iterator[list[list[_Cut]]]:
        """Each rank's ranges of the tensors of one type, one after the other, cut every W numbers."""
        lines = [[item for item in own if _is_of(item, tensors, dtype)] for own in self.owners]
        longest = max(sum(item.stop - item.start for item in line) for line in lines)
        step = max(1, WINDOW_BYTES // (width * self.ranks.size))
        for first in range(0, longest, step):
            yield [list(_cuts(line, first, first + step)) for line in lines]

    def _exchange_and_add(
        self, given: list[Tensor], lengths: list[int], wire: torch.dtype, work: torch.dtype
    ) -> Tensor:
        """[numbers this rank owns of the window], summed in the order of the ranks."""
        own = lengths[self.ranks.rank]
        # As bytes: not every backend knows every type.
        sent = torch.cat(given).view(torch.uint8)
        found = torch.empty(self.ranks.size * own * wire.itemsize, dtype=torch.uint8, device=sent.device)
        here = [own * wire.itemsize] * self.ranks.size
        self.ranks.start_exchange(found, sent, here, [n * wire.itemsize for n in lengths])()
        total = torch.zeros(own, dtype=work, device=sent.device)
        for part in found.view(wire).view(self.ranks.size, own):
            total += part
        return total


def _dtypes(tensors: Mapping[str, Tensor]) -> list[torch.dtype]:
    return sorted({tensor.dtype for tensor in tensors.values()}, key=str)


def _is_of(item: Range, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    return item.name in tensors and tensors[item.name].dtype == dtype and item.start < item.stop


def _cuts(line: Sequence[Range], first: int, last: int) -> Iterator[_Cut]:
    """What lies in the window of a rank's line."""
    done = 0
    for item in line:
        start, stop = max(first, done), min(last, done + item.stop - item.start)
        if start < stop:
            yield _Cut(item, item.start + start - done, item.start + stop - done, start - first)
        done += item.stop - item.start
