"""The parts of the weights that one rank updates: views for an optimiser, with gradients of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from consilience.conf.errors import EngineError
from consilience.model.ranks import ALONE, Ranks
from consilience.training.ownership import Ownership, Range, Rounding


class OwnedParts:
    """Parts of the tensors `whole` for each rank of `ranks`, and this rank's as parameters.

    owners  ranges of each rank, with the shape the optimiser sees
    across  the ranks with the same part in other groups of ranks, who add their gradients too and all take
            the same update
    """

    def __init__(
        self,
        whole: Mapping[str, Tensor],
        owners: Sequence[Mapping[Range, tuple[int, ...]]],
        ranks: Ranks,
        across: Ranks = ALONE,
    ) -> None:
        for name, tensor in whole.items():
            if not tensor.is_contiguous():
                raise EngineError(f"{name} is not contiguous; make it so, or keep optimiser state whole")
        self.whole, self.across = dict(whole), across
        self.ownership = Ownership(ranks, [list(own) for own in owners])
        self._moving: list[str] | None = None
        self.parts = {
            item: nn.Parameter(_part(whole[item.name], item, shape))
            for item, shape in owners[ranks.rank].items()
        }

    @torch.no_grad()
    def sum_gradients(self, gradients: Mapping[str, Tensor], rounding: Rounding | None = None) -> None:
        """Give each part its gradient, the sum over all ranks; a weight without one leaves its parts without.

        gradients  on every rank the same names; others than `whole`'s are passed over
        """
        own = {name: gradients[name].contiguous() for name in self.whole if name in gradients}
        sums = self.ownership.sums(own, rounding)
        self.across.sum_(sums.values())
        for item, part in self.parts.items():
            total = sums.get(item)
            part.grad = None if total is None else total.to(part.dtype).view(part.shape)
        self._moving = list(own)

    @property
    def moving(self) -> list[str]:
        """Weights whose parts have gradients, on whatever rank; none before they were summed."""
        return self._moving or []

    def gradients(self) -> dict[Range, Tensor]:
        """Gradients of this rank's parts."""
        return {item: part.grad for item, part in self.parts.items() if part.grad is not None}

    def before_update(self) -> None:
        """Look up the weights' memory, and their gradients unless those were summed to their owners."""
        for item, part in self.parts.items():
            part.data = _part(self.whole[item.name], item, part.shape)
        if self._moving is None:
            grads = {name: weight.grad for name, weight in self.whole.items() if weight.grad is not None}
            for item, part in self.parts.items():
                grad = grads.get(item.name)
                part.grad = None if grad is None else _part(grad.contiguous(), item, part.shape)
            self._moving = list(grads)

    def after_update(self) -> None:
        """Weights that had gradients become their owners', on every rank; gradients of parts go."""
        self.ownership.share_({name: self.whole[name].detach() for name in self.moving})
        self.clear_gradients()

    def clear_gradients(self) -> None:
        """Forget the sums; before the next update there are new ones."""
        for part in self.parts.values():
            part.grad = None
        self._moving = None

    def gathered(self, name: str, own: Mapping[Range, Tensor], dtype: torch.dtype) -> Tensor:
        """A whole tensor of the weight's shape from what each owner has of it; the same on every rank."""
        found = torch.zeros_like(self.whole[name], dtype=dtype, requires_grad=False)
        for item, value in own.items():
            if item.name == name:
                found.view(-1)[item.start : item.stop] = value.reshape(-1)
        self.ownership.whole_(found, name)
        return found


def _part(whole: Tensor, item: Range, shape: Sequence[int]) -> Tensor:
    return whole.detach().view(-1)[item.start : item.stop].view(*shape)
