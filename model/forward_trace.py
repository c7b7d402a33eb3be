"""What the parts of the model did in one forward: counters for reports and auxiliary losses.

A forward given a `Trace` fills it in; without one nothing is computed. What activation checkpointing runs
again in the backward – the model's own (`model/recompute.py`) or torch.utils.checkpoint around it – was
counted when it ran first, and leaves the trace as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.config import CSA_RATIO

if TYPE_CHECKING:
    from consilience.model.layout import Windows


@dataclass
class Trace:
    """Counts over the valid tokens of one or more forwards (accumulated).

    expert_load          layer -> [E] tokens sent to each expert; MTP's layers follow the trunk's
    is_hash              layer -> whether its router is the hash table
    hca_attended         visible HCA entries, summed over queries
    csa_visible          visible CSA entries, summed over queries
    csa_dropped          of those, entries the indexer's top-k left out
    stream_spread        mean over tokens of the distance between residual streams at the last
                         layer, relative to their norm (0 would mean identical streams)
    wants_losses         compute the auxiliary losses below (with gradients)
    balance_loss         balance loss of each learned router, summed over samples (report 2.1)
    indexer_loss         mean KL(main attention ‖ index scores) of each CSA layer (V3.2 report, 2.1)
    indexer_queries      queries each of those is a mean over
    """

    expert_load: dict[int, Tensor] = field(default_factory=dict)
    is_hash: dict[int, bool] = field(default_factory=dict)
    hca_attended: int = 0
    csa_visible: int = 0
    csa_dropped: int = 0
    stream_spread: float = 0.0
    wants_losses: bool = False
    _losses: _Losses = field(default_factory=lambda: _Losses(), repr=False)

    @property
    def balance_loss(self) -> list[Tensor]:
        return self._losses.balance

    @property
    def indexer_loss(self) -> list[Tensor]:
        return self._losses.indexer

    @property
    def indexer_queries(self) -> list[Tensor]:
        return self._losses.queries

    def start_losses(self) -> None:
        """Forget the losses of the micro-batch before; counts stay."""
        self._losses = _Losses()

    def summed_indexer_loss(self) -> Tensor:
        """Indexer losses of this forward, summed over layers and queries."""
        if not self.indexer_loss:
            return torch.zeros(())
        terms = [loss * number for loss, number in zip(self.indexer_loss, self.indexer_queries)]
        return torch.stack(terms).sum()

    def add_balance_loss(self, loss: Tensor) -> None:
        """Balance loss of one learned router, a scalar."""
        if not _is_run_again():
            self.balance_loss.append(loss)

    def add_indexer_loss(self, loss: Tensor, num_queries: Tensor) -> None:
        """Loss of one CSA layer's indexer and the queries that it is a mean over, scalars."""
        if not _is_run_again():
            self.indexer_loss.append(loss)
            self.indexer_queries.append(num_queries)

    def add_load(self, layer: int, load: Tensor, *, is_hash: bool) -> None:
        """Accumulate one layer's tokens per expert [E]."""
        if _is_run_again():
            return
        self.expert_load[layer] = load + self.expert_load[layer] if layer in self.expert_load else load
        self.is_hash[layer] = is_hash

    def add_visible(self, windows: Windows, is_valid: Tensor, picks: Tensor | None) -> None:
        """Count what the valid queries of one layer could see and what the indexer left out."""
        if _is_run_again():
            return
        counts = ((windows.stop - windows.first) * is_valid).sum()
        if windows.ratio != CSA_RATIO:
            self.hca_attended += int(counts)
            return
        self.csa_visible += int(counts)
        if picks is not None:
            self.csa_dropped += int(counts) - int(((picks >= 0).sum(-1) * is_valid).sum())


class _Losses:
    """What of a trace has gradients. No dataclass: FSDP2 looks through the arguments of a block, dataclasses
    and lists among them, and hands on copies of those with gradients in them; this it leaves alone."""

    def __init__(self) -> None:
        self.balance: list[Tensor] = []
        self.indexer: list[Tensor] = []
        self.queries: list[Tensor] = []


def _is_run_again() -> bool:
    """Whether a backward is on its way: a forward inside of it repeats an earlier one."""
    return torch._C._current_graph_task_id() >= 0  # as torch.utils.checkpoint asks
