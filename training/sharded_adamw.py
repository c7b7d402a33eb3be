"""AdamW on several ranks: its state divided evenly, a tensor wherever the border falls.

AdamW moves each number by itself, so nothing is lost by cutting: its tensors stand in one row, cut in R even
parts. Borders lie at multiples of 64 numbers of a tensor, so that a vector unit takes together the numbers it
would take together on one process, and the result is the same bits.

R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from consilience.model.ranks import ALONE, Ranks
from consilience.training.matrix_assignment import is_expert
from consilience.training.offload import held_by
from consilience.training.owned_parts import OwnedParts
from consilience.training.ownership import Range

ALIGNMENT = 64
MOMENTS = ("exp_avg", "exp_avg_sq")


def cut_evenly(sizes: Mapping[str, int], num_ranks: int) -> list[list[Range]]:
    """The ranges of each rank: name -> numbers, in R parts of their row, 128 numbers apart at most."""
    total = sum(sizes.values())
    parts: list[list[Range]] = [[] for _ in range(num_ranks)]
    done = 0
    for name, size in sizes.items():
        borders = [_aligned(rank * total // num_ranks - done, size) for rank in range(num_ranks + 1)]
        for rank, (start, stop) in enumerate(pairwise(borders)):
            if start < stop:
                parts[rank].append(Range(name, start, stop))
        done += size
    return parts


def _aligned(border: int, size: int) -> int:
    """A border inside a tensor of `size` numbers, at a multiple of 64 or at the end."""
    return min(max(0, -(-border // ALIGNMENT) * ALIGNMENT), size)


class ShardedAdamW:
    """torch's AdamW over ranks that hold the same weights; every call needs all ranks.

    decayed, plain  name -> weight with and without weight decay
    copies  who has the same experts, where ranks have different ones; None: all ranks
    sides   this rank's parts of the weights that all ranks have, and of experts that only `copies` have
    """

    def __init__(
        self,
        decayed: Mapping[str, nn.Parameter],
        plain: Mapping[str, nn.Parameter],
        *,
        ranks: Ranks = ALONE,
        copies: Ranks | None = None,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
    ) -> None:
        whole = {**decayed, **plain}
        self._names = list(whole)
        own = {name: weight for name, weight in whole.items() if copies is not None and is_expert(name)}
        shared = {name: weight for name, weight in whole.items() if name not in own}
        self.sides = (_owned_parts(shared, ranks), _owned_parts(own, copies or ALONE))
        parts = {item: part for side in self.sides for item, part in side.parts.items()}
        groups = [
            {"params": [part for item, part in parts.items() if item.name in names], "weight_decay": decay}
            for names, decay in ((decayed, weight_decay), (plain, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True) if groups else None

    def step(self, lr: float) -> None:
        """One update, learning rate `lr`; of which gradients, as `ShardedMuon.step` says."""
        for side in self.sides:
            side.before_update()
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
        for side in self.sides:
            side.after_update()

    def held(self) -> list[Tensor]:
        """This rank's state itself, not copies."""
        return [] if self._adamw is None else list(held_by(self._adamw.state))

    def each_state_tensor(self) -> Iterator[tuple[str, Tensor]]:
        """exp_avg.<name>, exp_avg_sq.<name> and step.<name> with the whole tensor, one at a time, the same on
        every rank; zeros before a first step."""
        for name in self._names:
            side = self.sides[name not in self.sides[0].whole]
            states = self._states(side, name)
            for moment in MOMENTS:
                own = {item: state[moment] for item, state in states.items()}
                yield f"{moment}.{name}", side.gathered(name, own, side.whole[name].dtype)
            counted = side.ownership.ranks.gather([float(state["step"]) for state in states.values()])
            yield f"step.{name}", torch.tensor(max((max(c) for c in counted if c), default=0.0))

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's share of `each_state_tensor`; names and shapes were checked by the caller."""
        for item, part in ((i, p) for side in self.sides for i, p in side.parts.items()):
            assert self._adamw is not None
            moments = {
                key: tensors[f"{key}.{item.name}"].reshape(-1)[item.start : item.stop].to(part, copy=True)
                for key in MOMENTS
            }
            step = tensors[f"step.{item.name}"].to(part.device, torch.float32, copy=True)
            self._adamw.state[part] = {"step": step, **moments}

    def _states(self, side: OwnedParts, name: str) -> dict[Range, dict[str, Tensor]]:
        """This rank's states of a weight; none before a first step."""
        if self._adamw is None:
            return {}
        states = {item: self._adamw.state.get(part) for item, part in side.parts.items()}
        return {item: state for item, state in states.items() if item.name == name and state}


def _owned_parts(whole: Mapping[str, nn.Parameter], ranks: Ranks) -> OwnedParts:
    cut = cut_evenly({name: weight.numel() for name, weight in whole.items()}, ranks.size)
    return OwnedParts(whole, [{item: (item.stop - item.start,) for item in own} for own in cut], ranks)
