"""Muon on several ranks: each keeps the momentum of its own matrices, updates them and tells the others.

`matrix_assignment.py` says whose a matrix is, `ownership.py` brings gradients to the owner and new weights to
all. The update itself is `Muon`'s, on views of the weights: what a rank owns goes through Newton–Schulz
batched by shape, as on one process.

Dense weights may have fewer owners, R', than there are ranks. Ranks then stand in groups of R': each group
sums its gradients, equal places of the groups add theirs, and every group takes the same update for itself.

R ranks, R' ranks of a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from consilience.model.ranks import ALONE, Ranks
from consilience.training.matrix_assignment import Piece, assign_dense, assign_experts, is_expert
from consilience.training.muon import Muon, MuonParameter, work_dtype
from consilience.training.owned_parts import OwnedParts
from consilience.training.ownership import Range
from consilience.training.stochastic_rounding import round_to_bf16, rounding_key


class ShardedMuon:
    """`Muon`'s interface over ranks that hold the same weights; every call needs all ranks.

    dense, experts     this rank's parts of the two kinds of weights
    copies             who has the same experts, where ranks have different ones; None: all ranks
    has_bf16_exchange  gradients of experts travel as bf16, rounded by chance from `seed`, step and rank
    Result and state are those of `Muon` on the sums of the ranks' gradients.
    """

    def __init__(
        self,
        parameters: Sequence[MuonParameter],
        ranks: Ranks = ALONE,
        has_bf16_exchange: bool = False,
        seed: int = 0,
        *,
        copies: Ranks | None = None,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        update_rms: float = 0.18,
    ) -> None:
        self.parameters = list(parameters)
        self.ranks, self.has_bf16_exchange, self.seed = ranks, has_bf16_exchange, seed
        whole = {p.name: p.parameter for p in parameters}
        dense = assign_dense([p for p in parameters if not is_expert(p.name)], ranks.size)
        copies = ranks if copies is None else copies
        experts = assign_experts([p for p in parameters if is_expert(p.name)], copies.size)
        within, across = ranks.split(len(dense.pieces))
        self.dense = _owned_parts(whole, dense.pieces, within, across)
        self.experts = _owned_parts(whole, experts.pieces, copies, ALONE)
        self.sides = (self.dense, self.experts)
        blocks = {_range(p): p.row_blocks for own in (*dense.pieces, *experts.pieces) for p in own}
        self._muon = Muon(
            [
                MuonParameter(_label(item), part, blocks[item])
                for side in self.sides
                for item, part in side.parts.items()
            ],
            momentum=momentum,
            weight_decay=weight_decay,
            update_rms=update_rms,
        )

    def sum_gradients(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Gradients to their owners, summed over the ranks. On every rank the same names.

        step  number of the update: with `seed` it decides how gradients of experts are rounded
        """
        self.dense.sum_gradients(gradients)
        self.experts.sum_gradients(gradients, partial(self._round, step) if self.has_bf16_exchange else None)

    def step(self, lr: float) -> None:
        """One update, learning rate `lr`, from the sums where `sum_gradients` was called; else from the
        gradients that lie on the weights, which then are the same on every rank."""
        for side in self.sides:
            side.before_update()
        self._muon.step(lr)
        for side in self.sides:
            side.after_update()

    def each_state_tensor(self) -> Iterator[tuple[str, Tensor]]:
        """(name, momentum of the whole weight), one at a time, the same on every rank."""
        own = self._muon.state_tensors()
        for owned in self.parameters:
            side = self.experts if is_expert(owned.name) else self.dense
            mine = {item: own[_label(item)] for item in side.parts if item.name == owned.name}
            yield owned.name, side.gathered(owned.name, mine, work_dtype(owned.parameter))

    def held(self) -> list[Tensor]:
        """This rank's state itself (`Muon.held`)."""
        return self._muon.held()

    def state_tensors(self) -> dict[str, Tensor]:
        """name -> momentum in the shape of the parameter, whatever the number of ranks."""
        return dict(self.each_state_tensor())

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's share of the momenta; names and shapes were checked by the caller."""
        self._muon.load_state_tensors(
            {
                _label(item): tensors[item.name].reshape(-1)[item.start : item.stop].view(part.shape)
                for side in self.sides
                for item, part in side.parts.items()
            }
        )

    def _round(self, step: int, name: str, numbers: Tensor, offset: int) -> Tensor:
        return round_to_bf16(numbers, rounding_key(self.seed, step, self.ranks.rank, name), offset)


def _owned_parts(
    whole: Mapping[str, Tensor], pieces: Sequence[Sequence[Piece]], ranks: Ranks, across: Ranks
) -> OwnedParts:
    names = {piece.name for own in pieces for piece in own}
    shapes = [
        {_range(piece): (piece.stop - piece.start, *whole[piece.name].shape[1:]) for piece in own}
        for own in pieces
    ]
    return OwnedParts({name: whole[name] for name in whole if name in names}, shapes, ranks, across)


def _range(piece: Piece) -> Range:
    return Range(piece.name, piece.offset, piece.offset + piece.num_elements)


def _label(item: Range) -> str:
    return f"{item.name}[{item.start}:{item.stop}]"
