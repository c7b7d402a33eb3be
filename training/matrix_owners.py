"""Muon on matrices that are cut by rows over ranks: each travels to an owner, its update comes back.

Newton–Schulz needs whole matrices. A matrix belongs to one rank, which alone keeps its momentum; the rows of
gradients go there in one exchange, those of updates come back in a second one, however many matrices.

R ranks; n rows of a matrix, m columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from consilience.model.ranks import Ranks
from consilience.training.muon import Muon, MuonParameter


def rows_of(num_rows: int, rank: int, size: int) -> tuple[int, int]:
    """First row and the one after the last of a rank's part, as FSDP cuts: equal parts, the last shorter."""
    part = -(-num_rows // size)
    return min(rank * part, num_rows), min((rank + 1) * part, num_rows)


def assign_owners(shapes: Mapping[str, tuple[int, int]], size: int) -> dict[str, int]:
    """Name -> rank, by falling work of an iteration, each to the rank with the least so far."""
    work = {name: min(shape) ** 2 * max(shape) for name, shape in shapes.items()}
    held = [0] * size
    owners = {}
    for name in sorted(shapes, key=lambda name: (-work[name], name)):
        owner = held.index(min(held))
        owners[name] = owner
        held[owner] += work[name]
    return owners


class OwnedMuon:
    """Muon over matrices of which this rank has `local` rows, name -> [n / R, m].

    parameters  name, whole shape and row blocks of each (`MuonParameter`, whose tensor is not read)
    """

    def __init__(
        self,
        parameters: Sequence[MuonParameter],
        local: Mapping[str, nn.Parameter],
        ranks: Ranks,
        *,
        momentum: float,
        weight_decay: float,
        update_rms: float,
    ) -> None:
        self.ranks, self.local, self.weight_decay = ranks, local, weight_decay
        self.shapes = {owned.name: tuple(owned.parameter.shape) for owned in parameters}
        self.owners = assign_owners(self.shapes, ranks.size)  # type: ignore[arg-type]
        self._own: dict[str, nn.Parameter] = {}
        for owned in parameters:
            if self.owners[owned.name] == ranks.rank:
                like = local[owned.name]
                nothing = torch.zeros((), dtype=_wide(like.dtype), device=like.device)
                self._own[owned.name] = nn.Parameter(nothing.expand(self.shapes[owned.name]))
        own = [
            MuonParameter(owned.name, self._own[owned.name], owned.row_blocks)
            for owned in parameters
            if owned.name in self._own
        ]
        self.muon = Muon(own, momentum=momentum, weight_decay=0.0, update_rms=update_rms)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update from the gradients of `local`; a matrix without one on this rank has none on any."""
        names = [name for name in self.owners if self.local[name].grad is not None]
        gradients = self._exchange(
            names,
            {name: self.local[name].grad for name in names},  # type: ignore[misc]
            to_owner=True,
        )
        for name, gradient in gradients.items():
            self._own[name].data = torch.zeros_like(gradient)
            self._own[name].grad = gradient
        self.muon.step(lr)  # the weight is 0 and does not decay: what it becomes is the update
        updates = {name: self._own[name].data for name in gradients}
        del gradients
        for proxy in self._own.values():
            proxy.grad = None
            proxy.data = proxy.data.new_zeros(()).expand(proxy.shape)
        back = self._exchange(names, updates, to_owner=False)
        decay = 1.0 - lr * self.weight_decay
        for name, update in back.items():
            weight = self.local[name].data
            torch.add(update.to(weight.dtype), weight, alpha=decay, out=weight)

    def _exchange(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], *, to_owner: bool
    ) -> dict[str, Tensor]:
        """Rows of `names` to their owners, where they make whole matrices, or whole ones back to rows."""
        found: dict[str, Tensor] = {}
        for dtype in sorted({self.local[name].dtype for name in names}, key=str):
            chosen = [name for name in names if self.local[name].dtype == dtype]
            found |= self._exchange_type(chosen, tensors, to_owner)
        return found

    def _exchange_type(
        self, names: Sequence[str], tensors: Mapping[str, Tensor], to_owner: bool
    ) -> dict[str, Tensor]:
        """`_exchange` of local parameters of one type."""
        rank, size = self.ranks.rank, self.ranks.size
        by_owner = [[name for name in names if self.owners[name] == owner] for owner in range(size)]
        like = self.local[names[0]]
        wide = _wide(like.dtype)

        def numel(name: str, holder: int) -> int:
            first, last = rows_of(self.shapes[name][0], holder, size)
            return (last - first) * self.shapes[name][1]

        # What I hold of each owner's matrices, and what each holder has of mine.
        held = [sum(numel(name, rank) for name in by_owner[owner]) for owner in range(size)]
        mine = [sum(numel(name, holder) for name in by_owner[rank]) for holder in range(size)]
        if to_owner:
            parts = [tensors[name].reshape(-1).to(wide) for owner in range(size) for name in by_owner[owner]]
        else:
            parts = [
                tensors[name][slice(*rows_of(self.shapes[name][0], holder, size))].reshape(-1).to(wide)
                for holder in range(size)
                for name in by_owner[rank]
            ]
        given = torch.cat(parts) if parts else like.new_empty(0, dtype=wide)
        splits, received = (held, mine) if to_owner else (mine, held)
        got = given.new_empty(sum(received))
        dist.all_to_all_single(got, given, received, splits, group=self.ranks.group)
        if not to_owner:
            sizes = [numel(name, rank) for owner in range(size) for name in by_owner[owner]]
            order = [name for owner in range(size) for name in by_owner[owner]]
            return {name: part.view_as(self.local[name]) for name, part in zip(order, got.split(sizes))}
        pieces: dict[str, list[Tensor]] = {name: [] for name in by_owner[rank]}
        sizes = [numel(name, holder) for holder in range(size) for name in by_owner[rank]]
        order = [name for _ in range(size) for name in by_owner[rank]]
        for name, part in zip(order, got.split(sizes)):
            pieces[name].append(part)
        return {name: torch.cat(parts).view(self.shapes[name]) for name, parts in pieces.items()}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
