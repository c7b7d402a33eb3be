"""A TrainEngine for tests of everything around one: it records calls and nudges one number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import EngineError
from consilience.model.ranks import ALONE
from consilience.training.tensor_files import read_tensors, write_tensors


class FakeTrainEngine:
    """Runs `loss_fn` on every micro-batch without gradients; a step adds `lr_scale` to every parameter.

    batches, denominators, scales   what the calls received, in order
    is_away                         whether it is offloaded
    fail_at_step                    `step` raises EngineError when this many steps are done
    """

    def __init__(self, model: nn.Module | None = None, *, fail_at_step: int | None = None) -> None:
        self.model = model if model is not None else nn.Linear(1, 1)
        self.ranks = ALONE
        self.fail_at_step = fail_at_step
        self.num_steps = 0
        self.is_away = False
        self.batches: list[Any] = []
        self.denominators: list[dict[str, float]] = []
        self.scales: list[float] = []

    @torch.no_grad()
    def forward_backward(
        self,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]],
        batch: Any,
        denominators: Mapping[str, float],
    ) -> dict[str, float]:
        """Sums of what `loss_fn` reports, divided like the real engine's."""
        self.batches.append(batch)
        self.denominators.append(dict(denominators))
        sums = {"loss": 0.0}
        for micro_batch in batch if isinstance(batch, list | tuple) else [batch]:
            loss, reported = loss_fn(self.model, micro_batch)
            sums["loss"] += float(loss)
            for name, part in reported.items():
                sums[name] = sums.get(name, 0.0) + float(part)
        return {name: value / denominators.get(name, 1.0) for name, value in sums.items()}

    @torch.no_grad()
    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Count the step, move the parameters visibly."""
        if self.num_steps == self.fail_at_step:
            raise EngineError(f"step {self.num_steps}: told to fail")
        for parameter in self.model.parameters():
            parameter.add_(lr_scale)
        self.num_steps += 1
        self.scales.append(lr_scale)
        return {"grad_norm": 1.0, "lr": lr_scale}

    def offload(self) -> None:
        """Noted in `is_away`."""
        self.is_away = True

    def onload(self) -> None:
        self.is_away = False

    def discard(self) -> None:
        """There are none."""

    def save(self, folder: Path) -> None:
        """The number of steps, as a safetensors file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "fake.safetensors", {"num_steps": torch.tensor(self.num_steps)})

    def load(self, folder: Path) -> None:
        """Inverse of `save`."""
        self.num_steps = int(read_tensors(folder / "fake.safetensors")["num_steps"])
