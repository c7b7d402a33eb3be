"""The seam between a training stage and whatever holds parameters, gradients and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

from torch import Tensor, nn

from consilience.model.checkpoint import to_official
from consilience.model.ranks import Ranks


class TrainEngine(Protocol):
    """One model, one optimiser, on one process or on several ranks that make the same calls.

    Loss denominators are global counts handed in by the caller, so the number of micro-batches
    (or ranks) never changes a gradient.
    """

    model: nn.Module
    ranks: Ranks

    def forward_backward(
        self,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]],
        batch: Any,
        denominators: Mapping[str, float],
    ) -> dict[str, float]:
        """Accumulate gradients of `loss_fn(model, micro_batch)` over the batch's micro-batches.

        batch is a list or tuple of micro-batches (anything else is one micro-batch), the whole of it on
        every rank; each runs its own part (`Ranks.part`). `loss_fn` returns (sum-form loss already
        divided by its denominators, sums to report). Returned are "loss" (summed over the micro-batches)
        and every reported sum, of all ranks on each; a sum named like a denominator is divided by it, one
        named max_… is the largest instead. EngineError on a non-finite loss on any rank or a denominator
        that is not a positive number, on all ranks and before any parameter changes.
        """
        ...

    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Clip, update, clear. Returns {"grad_norm": …, "lr": …}. EngineError if not finite.

        expert_load  layer -> [E] tokens each expert received in this step (`Trace.expert_load`, MTP's
                     layers numbered on after the trunk's), of what this rank ran: summed over the
                     ranks here; moves the router biases by rule. None leaves them.
        """
        ...

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step, which then does not take place."""
        ...

    def save(self, folder: Path) -> None:
        """Optimiser and random state into `folder` (the checkpoint's `state/`), safetensors only.

        Called by every rank; the first one writes.
        """
        ...

    def load(self, folder: Path) -> None:
        """Inverse of `save`, on every rank, whatever the number of ranks that saved."""
        ...


class CutEngine(TrainEngine, Protocol):
    """An engine of which no rank has the whole model. Every rank makes these calls, and that of `save`."""

    def write_weights(self, folder: Path | None, max_shard_bytes: int) -> dict[str, str] | None:
        """Official weight files into the `folder` that the first rank gives; tensor -> file.

        Others give None, and so does the first one if it has failed before. None on all ranks if nothing
        was written: the first one raises why, and `save` is not to follow.
        """
        ...

    def gather_weights(self) -> dict[str, Tensor] | None:
        """Every tensor under its official name in the host's memory of the first rank; None on others."""
        ...

    def put_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Inverse of `gather_weights`: the first rank gives every tensor, the others None."""
        ...

    def read_weights(self, folder: Path) -> None:
        """The weights of a checkpoint, whoever wrote it, each rank its part."""
        ...

    def save(self, folder: Path | None) -> None: ...


def is_cut(engine: TrainEngine | None) -> TypeGuard[CutEngine]:
    """Whether weights come from all ranks. An engine whose settings decide it says so as `is_divided`."""
    return hasattr(engine, "write_weights") and getattr(engine, "is_divided", True)


def official_weights(engine: TrainEngine) -> Mapping[str, Tensor] | None:
    """The engine's weights by their official names, on the first rank; None on others. All ranks call."""
    if is_cut(engine):
        return engine.gather_weights()
    return to_official(engine.model) if engine.ranks.is_first else None  # type: ignore[arg-type]
