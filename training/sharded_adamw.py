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
    """

    def __init__(
        self,
        decayed: Mapping[str, nn.Parameter],
        plain: Mapping[str, nn.Parameter],
        *,
        ranks: Ranks = ALONE,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
    ) -> None:
        whole = {**decayed, **plain}
        cut = cut_evenly({name: weight.numel() for name, weight in whole.items()}, ranks.size)
        shapes = [{item: (item.stop - item.start,) for item in own} for own in cut]
        self.owned = OwnedParts(whole, shapes, ranks)
        parts = self.owned.parts
        groups = [
            {"params": [part for item, part in parts.items() if item.name in names], "weight_decay": decay}
            for names, decay in ((decayed, weight_decay), (plain, 0.0))
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True) if groups else None

    def step(self, lr: float) -> None:
        """One update, learning rate `lr`; of which gradients, as `ShardedMuon.step` says."""
        self.owned.before_update()
        if self._adamw is not None:
            for group in self._adamw.param_groups:
                group["lr"] = lr
            self._adamw.step()
        self.owned.after_update()

    def held(self) -> list[Tensor]:
        """This rank's state itself, not copies."""
        return [] if self._adamw is None else list(held_by(self._adamw.state))

    def each_state_tensor(self) -> Iterator[tuple[str, Tensor]]:
        """exp_avg.<name>, exp_avg_sq.<name> and step.<name> with the whole tensor, one at a time, the same on
        every rank; zeros before a first step."""
        for name, weight in self.owned.whole.items():
            for moment in MOMENTS:
                own = {item: state[moment] for item, state in self._states(name).items()}
                yield f"{moment}.{name}", self.owned.gathered(name, own, weight.dtype)
            yield f"step.{name}", self._steps(name)

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this rank's share of `each_state_tensor`; names and shapes were checked by the caller."""
        for item, part in self.owned.parts.items():
            assert self._adamw is not None
            moments = {
                key: tensors[f"{key}.{item.name}"].reshape(-1)[item.start : item.stop].to(part, copy=True)
                for key in MOMENTS
            }
            step = tensors[f"step.{item.name}"].to(part.device, torch.float32, copy=True)
            self._adamw.state[part] = {"step": step, **moments}

    def _states(self, name: str) -> dict[Range, dict[str, Tensor]]:
        """This rank's states of a weight; none before a first step."""
        if self._adamw is None:
            return {}
        states = {item: self._adamw.state.get(part) for item, part in self.owned.parts.items()}
        return {item: state for item, state in states.items() if item.name == name and state}

    def _steps(self, name: str) -> Tensor:
        """Updates of a weight so far, as its owners count them: a scalar, fp32."""
        ranks = self.owned.ownership.ranks
        counted = [float(state["step"]) for state in self._states(name).values()]
        return torch.tensor(max((max(c) for c in ranks.gather(counted) if c), default=0.0))
