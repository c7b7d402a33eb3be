"""The reference TrainEngine: plain PyTorch, V4's two optimisers, on one process or on several.

With several ranks each holds the whole model. A step's micro-batches are divided among them and the
gradients summed, in the same order on every run; all ranks then take the same update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.expert_parallel import sharded_names
from consilience.model.host_copies import HostCopies
from consilience.model.ranks import ALONE, Ranks
from consilience.training.accumulation import accumulate
from consilience.training.clipping import checked_norm, clip_factors
from consilience.training.offload import trained_tensors
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
    is_sharded     optimiser state is divided among the ranks
    has_bf16_exchange   sharded: gradients of experts travel as bf16, rounded by chance
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
    is_sharded: bool = False
    has_bf16_exchange: bool = False


class TorchEngine:
    """Holds the model, its gradients and its optimiser. `num_steps` counts finished updates.

    exact: losses are computed in exact mode, in which the trainer's log-probabilities are the sampler's.
    ranks: who shares the work; all make the same calls with the same arguments, but for `expert_load`, which
    each gives for what it ran itself.

    Where the model's experts are split over ranks (`shard_experts`), gradients and state are of this rank's;
    `ExpertEngine` saves and publishes such a model.
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
            ranks=ranks,
            is_sharded=s.is_sharded,
            has_bf16_exchange=s.has_bf16_exchange,
            split=sharded_names(model),
        )
        self._bias_names = gate_bias_names(model)
        self._is_summed = False
        self._copies = HostCopies()

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
                is_in_step=bool(self.optimizer.split),
            )
        except BaseException:
            self._clear()
            raise

    def gradients(self) -> dict[str, Tensor]:
        """The step's gradients by name, summed over the ranks; `step` is what follows.

        Where optimiser state is sharded they are gathered, copies; else they are the parameters' own.
        A parameter that has one on some ranks only has the sum of those; one without any is not there.
        """
        self._sum_gradients()
        return self.optimizer.gradients()

    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Clip, update, clear; see `TrainEngine`."""
        self._sum_gradients()
        with self._in_step():
            norms = self.optimizer.gradient_norms()
        try:
            grad_norm = checked_norm(norms, self.num_steps)
        except EngineError:
            self._clear()
            raise
        self.optimizer.scale_gradients(clip_factors(norms, self.settings.grad_clip))
        loads = loads_by_bias(self._bias_names, self.optimizer.groups.rule, expert_load, self.ranks)
        with self._in_step():
            lr = self.optimizer.step(lr_scale, loads)
        self._clear()
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": lr}

    def offload(self) -> None:
        """Model and optimiser to the host's memory, until `onload`; nothing may be asked for in between.

        EngineError while gradients wait for a step.
        """
        self._copies.put_away(list(trained_tensors(self.model, self.optimizer)))

    def onload(self) -> None:
        """Undo `offload`, to the bit; nothing happens where nothing is away."""
        self._copies.restore()

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step."""
        self._clear()

    def save(self, folder: Path) -> None:
        """optimizer.safetensors and random.safetensors in `folder`, from the first rank.

        The random state is the first rank's: nothing in training draws a number on the others alone.
        """
        state: dict[str, Tensor] = {}
        if self.ranks.is_first or self.settings.is_sharded:  # then every rank gives its part
            for name, tensor in self.optimizer.each_state_tensor():
                state |= {name: tensor.cpu()} if self.ranks.is_first else {}
        if not self.ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        steps = {"num_steps": torch.tensor(self.num_steps, dtype=torch.int64)}
        write_tensors(folder / OPTIMIZER_FILE, state | steps)
        write_tensors(folder / RANDOM_FILE, random_state_tensors())

    def load(self, folder: Path) -> None:
        """Inverse of `save`, on every rank. CheckpointError names file and tensor; random state last."""
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        random_tensors = read_tensors(folder / RANDOM_FILE)
        if "num_steps" not in tensors:
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: tensor num_steps is missing; remake the checkpoint"
            )
        try:
            self.restore(tensors, random_tensors)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error

    def restore(self, tensors: Mapping[str, Tensor], random_tensors: Mapping[str, Tensor]) -> None:
        """Go on from the optimiser's tensors, `num_steps` among them, and the random state."""
        own = {name: tensor for name, tensor in tensors.items() if name != "num_steps"}
        self.optimizer.load_state_tensors(own)
        restore_random_state(random_tensors)
        self.num_steps = int(tensors["num_steps"])
        self._clear()

    def _sum_gradients(self) -> None:
        if not self._is_summed:
            with self._in_step():
                self.optimizer.sum_gradients(self.num_steps)
            self._is_summed = True

    def _in_step(self) -> AbstractContextManager[None]:
        """Around what those who share experts, or copies of them, wait for each other in."""
        return self.ranks.in_step() if self.optimizer.split else nullcontext()

    def _clear(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        self.optimizer.clear_gradients()
        self._is_summed = False
