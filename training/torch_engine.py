"""The reference TrainEngine: plain PyTorch, V4's two optimisers, on one process or on several.

With several ranks each holds the whole model. A step's micro-batches are divided among them and the
gradients summed, in the same order on every run; all ranks then take the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.ranks import ALONE, Ranks
from consilience.training.accumulation import accumulate
from consilience.training.clipping import checked_norm, clip_factors
from consilience.training.optimizers import V4Optimizer, gate_bias_names, loads_by_bias, parameter_groups
from consilience.training.random_state import random_state_tensors, restore_random_state
from consilience.training.tensor_files import read_tensors, write_tensors

OPTIMIZER_FILE, RANDOM_FILE = "optimizer.safetensors", "random.safetensors"


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """V4's values (sections 12.1 and 12.2), learning rate apart.

    lr             peak learning rate of Muon and AdamW alike
    weight_decay   decoupled, on Muon's matrices and on embedding and head
    beta1, beta2, eps   AdamW
    momentum, update_rms   Muon's μ and γ
    bias_speed     step of the router biases
    grad_clip      largest global gradient norm, of the prediction blocks and of all else; 0: no clipping
    kind           "muon" (with AdamW for what Muon leaves) or "adamw" for every parameter
    """

    lr: float = 2.7e-4
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-20
    momentum: float = 0.95
    update_rms: float = 0.18
    bias_speed: float = 1e-3
    grad_clip: float = 1.0
    kind: str = "muon"


class TorchEngine:
    """Holds the model, its gradients and its optimiser. `num_steps` counts finished updates.

    exact: losses are computed in exact mode, in which the trainer's log-probabilities are the sampler's.
    ranks: who shares the work; all make the same calls with the same arguments, but for `expert_load`, which
    each gives for what it ran itself.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings | None = None,
        *,
        o_groups: int | None = None,
        exact: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.exact = exact
        self.settings = settings or OptimizerSettings()
        self.num_steps = 0
        s = self.settings
        self.optimizer = V4Optimizer(
            parameter_groups(model, o_groups=o_groups, use_muon=s.kind == "muon"),
            lr=s.lr,
            weight_decay=s.weight_decay,
            betas=(s.beta1, s.beta2),
            eps=s.eps,
            momentum=s.momentum,
            update_rms=s.update_rms,
            bias_speed=s.bias_speed,
        )
        self._bias_names = gate_bias_names(model)
        self._is_summed = False

    def forward_backward(
        self,
        loss_fn: Callable[[nn.Module, Any], tuple[Tensor, Mapping[str, float]]],
        batch: Any,
        denominators: Mapping[str, float],
    ) -> dict[str, float]:
        """Accumulate gradients over micro-batches; see `TrainEngine`. An error clears them."""
        try:
            return accumulate(
                loss_fn,
                self.model,
                batch,
                denominators,
                ranks=self.ranks,
                num_steps=self.num_steps,
                is_exact=self.exact,
            )
        except BaseException:
            self._clear()
            raise

    def gradients(self) -> dict[str, Tensor]:
        """The step's gradients by name, summed over the ranks, in place; `step` is what follows.

        A parameter that has one on some ranks only has the sum of those; one without any is not there.
        """
        held = self.optimizer.parameters
        if not self._is_summed:
            own = [name for name, parameter in held.items() if parameter.grad is not None]
            anywhere = set().union(*self.ranks.gather(own))
            for name, parameter in held.items():
                if name in anywhere and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.ranks.sum_(p.grad for n, p in held.items() if n in anywhere and p.grad is not None)
            self._is_summed = True
        return {name: parameter.grad for name, parameter in held.items() if parameter.grad is not None}

    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Clip, update, clear; see `TrainEngine`."""
        grads = self.gradients()
        lengths = torch._foreach_norm(list(grads.values())) if grads else ()  # pyright: ignore[reportPrivateImportUsage]
        norms = dict(zip(grads, torch.stack([n.double() for n in lengths]).tolist() if grads else ()))
        try:
            grad_norm = checked_norm(norms, self.num_steps)
        except EngineError:
            self._clear()
            raise
        if factors := clip_factors(norms, self.settings.grad_clip):
            clipped = [grads[name] for name in factors]
            torch._foreach_mul_(clipped, list(factors.values()))  # pyright: ignore[reportPrivateImportUsage]
        loads = loads_by_bias(self._bias_names, self.optimizer.groups.rule, expert_load, self.ranks)
        lr = self.optimizer.step(lr_scale, loads)
        self._clear()
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": lr}

    def save(self, folder: Path) -> None:
        """optimizer.safetensors and random.safetensors in `folder`, from the first rank.

        The random state is the first rank's: nothing in training draws a number on the others alone.
        """
        if not self.ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        steps = {"num_steps": torch.tensor(self.num_steps, dtype=torch.int64)}
        write_tensors(folder / OPTIMIZER_FILE, self.optimizer.state_tensors() | steps)
        write_tensors(folder / RANDOM_FILE, random_state_tensors())

    def load(self, folder: Path) -> None:
        """Inverse of `save`, on every rank. CheckpointError names file and tensor; random state last."""
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        random_tensors = read_tensors(folder / RANDOM_FILE)
        if "num_steps" not in tensors:
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: tensor num_steps is missing; remake the checkpoint"
            )
        num_steps = int(tensors.pop("num_steps"))
        try:
            self.optimizer.load_state_tensors(tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error
        restore_random_state(random_tensors)
        self.num_steps = num_steps
        self._clear()

    def _clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self._is_summed = False

