"""Both optimisers of a model with their state divided among ranks, as one: sums, norms, the update, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from consilience.model.ranks import Ranks
from consilience.training.matrix_assignment import assign_dense, assign_experts, is_expert
from consilience.training.muon import work_dtype
from consilience.training.sharded_adamw import MOMENTS, ShardedAdamW, cut_evenly
from consilience.training.sharded_muon import ShardedMuon

if TYPE_CHECKING:
    from consilience.training.optimizers import ParameterGroups

K = TypeVar("K")


class Shards:
    """What `V4Optimizer` asks of sharded state; every call needs all ranks, but for `scale_gradients`."""

    def __init__(self, muon: ShardedMuon, adamw: ShardedAdamW, ranks: Ranks) -> None:
        self.muon, self.adamw, self.ranks = muon, adamw, ranks
        self._sides = (*muon.sides, *adamw.sides)

    def sum_gradients(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Gradients to their owners, summed; on every rank the same names."""
        self.muon.sum_gradients(gradients, step)
        for side in self.adamw.sides:
            side.sum_gradients(gradients)

    def scale_gradients(self, factors: Mapping[str, float]) -> None:
        """Gradients times the factors of their weights, in place."""
        for side in self._sides:
            for item, grad in side.gradients().items():
                if item.name in factors:
                    grad.mul_(factors[item.name])

    def whole_gradients(self) -> dict[str, Tensor]:
        """name -> gradient of the whole weight, gathered from its owners, the same on every rank."""
        found: dict[str, Tensor] = {}
        for side in self._sides:
            for name in side.moving:
                found[name] = side.gathered(name, side.gradients(), side.whole[name].dtype)
        return found

    def clear_gradients(self) -> None:
        """Forget what was summed."""
        for side in self._sides:
            side.clear_gradients()

    def gradient_norms(self) -> dict[str, float]:
        """name -> norm of the weight's whole gradient, the same on every rank; in fp64 over its parts."""
        own = {
            item: grad
            for side in self._sides
            if side.across.is_first  # of equal parts in several groups one counts
            for item, grad in side.gradients().items()
        }
        squares: dict[str, float] = {}
        for item, norm in norms_of(own).items():
            squares[item.name] = squares.get(item.name, 0.0) + norm * norm
        return {name: square**0.5 for name, square in sorted(self.ranks.sums(squares).items())}


def norms_of(tensors: Mapping[K, Tensor]) -> dict[K, float]:
    """Norm of each tensor, read from the device at once."""
    if not tensors:
        return {}
    norms = torch._foreach_norm(list(tensors.values()))  # pyright: ignore[reportPrivateImportUsage]
    return dict(zip(tensors, torch.stack([norm.double() for norm in norms]).tolist()))


def state_bytes(groups: ParameterGroups, num_ranks: int) -> list[int]:
    """Bytes of optimiser state on each of so many ranks: momentum, two moments and a count for each tensor.

    Shapes are all that is looked at; parameters may lie on the meta device.
    """
    widths = {p.name: work_dtype(p.parameter).itemsize for p in groups.muon}
    found = [0] * num_ranks
    dense = assign_dense([p for p in groups.muon if not is_expert(p.name)], num_ranks).pieces
    experts = assign_experts([p for p in groups.muon if is_expert(p.name)], num_ranks).pieces
    adamw = {**groups.adamw_decayed, **groups.adamw}
    cut = cut_evenly({name: weight.numel() for name, weight in adamw.items()}, num_ranks)
    for rank in range(num_ranks):
        pieces = (*dense[rank % len(dense)], *experts[rank])
        found[rank] += sum(piece.num_elements * widths[piece.name] for piece in pieces)
        for item in cut[rank]:
            found[rank] += len(MOMENTS) * (item.stop - item.start) * adamw[item.name].itemsize
            found[rank] += torch.float32.itemsize
    return found
