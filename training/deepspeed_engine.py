"""The TrainEngine on DeepSpeed's ZeRO: optimiser states, masters and gradients divided over the ranks.

DeepSpeed divides, reduces and gathers; what it is given are sums with global denominators, and what updates
its parts is our own optimiser (`deepspeed_optimizer.py`): DeepSpeed's Muon is another one, without row
blocks, with other coefficients and another scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.exact import exact_mode
from consilience.model.ranks import ALONE, Ranks
from consilience.training.accumulation import LossFn, add_report
from consilience.training.deepspeed_gradients import OrderedGradients, divide_flat
from consilience.training.deepspeed_optimizer import ZeroV4Optimizer, optimizer_groups
from consilience.training.deepspeed_setup import check_possible, open_deepspeed
from consilience.training.deepspeed_state import load_states, state_tensors
from consilience.training.engine_checks import check_denominators, fail_together
from consilience.training.optimizers import gate_bias_names, parameter_groups, update_gate_bias
from consilience.training.random_state import random_state_tensors, restore_random_state
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, RANDOM_FILE, OptimizerSettings

MASTER_FILE = "master.safetensors"


class DeepSpeedEngine:
    """Holds the model, in the types it came with, and fp32 masters, gradients and states divided by ZeRO.

    zero_stage  1 divides optimiser states and masters, 2 the gradients too
    offload     masters, gradients and states lie in the CPU's memory, and the update is made there
    exact       losses are computed in exact mode
    EngineError names the route where DeepSpeed cannot train the model right.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings | None = None,
        *,
        ranks: Ranks = ALONE,
        zero_stage: int = 2,
        offload: bool = False,
        exact: bool = False,
        expert_ranks: int = 1,
        o_groups: int | None = None,
    ) -> None:
        self.model, self.ranks, self.exact = model, ranks, exact
        self.settings = settings or OptimizerSettings()
        self.num_steps = 0
        s = self.settings
        check_possible(model, zero_stage=zero_stage, kind=s.kind, expert_ranks=expert_ranks)
        self._owners = parameter_groups(model, o_groups=o_groups, use_muon=s.kind == "muon")
        self._bias_names = gate_bias_names(model)
        groups = optimizer_groups(self._owners, s.weight_decay, is_fp32_first=zero_stage == 2)
        self._optimizer = ZeroV4Optimizer(groups, s, ranks)
        self._engine = open_deepspeed(model, self._optimizer, ranks, zero_stage=zero_stage, offload=offload)
        self._zero = self._engine.optimizer
        divide_flat(self._zero, groups, ranks)
        names = {name for group in groups for name in group.parameters}
        self._parameters = {name: p for name, p in model.named_parameters() if name in names}
        self._gradients = OrderedGradients(self._zero, self._parameters, is_offloaded=offload)

    def forward_backward(
        self, loss_fn: LossFn, batch: Any, denominators: Mapping[str, float]
    ) -> dict[str, float]:
        """Accumulate gradients over this rank's micro-batches; see `TrainEngine`. An error clears them."""
        try:
            return self._accumulate(loss_fn, batch, denominators)
        except BaseException:
            self._gradients.clear()
            raise

    def _accumulate(self, loss_fn: LossFn, batch: Any, denominators: Mapping[str, float]) -> dict[str, float]:
        check_denominators(denominators, self.num_steps)
        micro_batches = list(batch) if isinstance(batch, list | tuple) else [batch]
        found: dict[str, float] = {"loss": 0.0}
        for first in range(0, len(micro_batches), self.ranks.size):
            index = first + self.ranks.rank
            loss, failure = None, None
            if index < len(micro_batches):
                try:
                    loss = self._loss(loss_fn, micro_batches[index], index, found)
                except Exception as error:
                    failure = error
            fail_together(self.ranks, index, failure, self.num_steps)
            # ZeRO-2 sums in every backward pass: a rank without a micro-batch adds zeros.
            if loss is None or not loss.requires_grad:
                loss = 0.0 * min(self._parameters.values(), key=Tensor.numel).sum()
                self._gradients.backward(self._engine, loss, is_filler=True)
            else:
                self._gradients.backward(self._engine, loss)
        total: dict[str, float] = {}
        for report in self.ranks.gather(found):
            add_report(total, report)
        return {name: value / denominators.get(name, 1.0) for name, value in total.items()}

    def _loss(self, loss_fn: LossFn, micro_batch: Any, index: int, found: dict[str, float]) -> Tensor:
        with exact_mode(self.exact):
            loss, reported = loss_fn(self.model, micro_batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise EngineError(
                f"step {self.num_steps}: the loss of micro-batch {index} is {value}; no parameter "
                "was changed. Lower the learning rate or resume from the last checkpoint"
            )
        add_report(found, {"loss": value} | dict(reported))
        return loss

    def gradients(self) -> dict[str, Tensor]:
        """The step's gradients by name, whole, fp32, summed over the ranks; `step` is what follows.

        One without any on all ranks is not there. A copy: for tests and for looking, not for training.
        """
        reached = self._reached()
        self._gradients.finish()
        return {
            name: whole
            for group, part in zip(self._optimizer.groups, self._gradients.parts())
            for name, whole in group.whole(part, self.ranks)
            if name in reached
        }

    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Clip, update, clear; see `TrainEngine`."""
        reached = self._reached()
        if not reached:
            raise EngineError(f"step {self.num_steps}: no gradient to apply; call forward_backward first")
        self._gradients.finish()
        try:
            grad_norm = self._clip(reached)
            lr = self.settings.lr * lr_scale
            self._move_biases(expert_load)
            self._optimizer.lr, self._optimizer.touched = lr, frozenset(reached)
            self._zero.step()
        finally:
            self._gradients.clear()
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": lr}

    def _reached(self) -> set[str]:
        return set().union(*self.ranks.gather(self._gradients.reached))

    def _clip(self, reached: set[str]) -> float:
        """Shorten the two halves of the gradient, each by its own norm; the norm of both before."""
        parts = list(zip(self._optimizer.groups, self._gradients.parts()))
        names = [name for name in self._parameters if name in reached]
        squares = dict.fromkeys(names, 0.0)
        for group, part in parts:
            held = [segment for segment in group.segments if segment.name in squares]
            norms = torch._foreach_norm([segment.of(part) for segment in held]) if held else []  # pyright: ignore[reportPrivateImportUsage]
            for segment, norm in zip(held, norms):
                squares[segment.name] += float(norm) ** 2
        total = torch.tensor(list(squares.values()), dtype=torch.float64, device=self.ranks.device)
        self.ranks.sum_([total])
        squares = dict(zip(names, total.tolist()))
        if not math.isfinite(sum(squares.values())):
            worst = [name for name in names if not math.isfinite(squares[name])]
            raise EngineError(
                f"step {self.num_steps}: the gradient of {worst[0] if worst else 'the model'} is not finite "
                f"({len(worst)} of {len(names)} tensors); no parameter was changed. Lower the learning rate "
                "or resume from the last checkpoint"
            )
        for is_ahead in (True, False):
            own = math.sqrt(sum(squares[name] for name in names if name.startswith("mtp.") == is_ahead))
            if self.settings.grad_clip and own > self.settings.grad_clip:
                for group, part in parts:
                    if group.is_ahead == is_ahead:
                        part.mul_(self.settings.grad_clip / own)
        return math.sqrt(sum(squares.values()))

    def _move_biases(self, expert_load: Mapping[int, Tensor] | None) -> None:
        """Router biases by the tokens that the experts received on all ranks; hash layers have none."""
        own = {self._bias_names[i]: load for i, load in (expert_load or {}).items() if i in self._bias_names}
        for name in sorted(set().union(*self.ranks.gather(set(own)))):
            bias = self._owners.rule[name]
            load = own.get(name, torch.zeros_like(bias)).to(self.ranks.device, torch.float64, copy=True)
            self.ranks.sum_([load])
            if self.settings.lr:
                update_gate_bias(bias, load, self.settings.bias_speed)

    def held_bytes(self) -> dict[str, int]:
        """What this rank keeps between steps: weights, fp32 masters, optimiser states; and, until `step`, the
        gradients that it has after `gradients`."""
        groups, parts = self._optimizer.groups, self._zero.single_partition_of_fp32_groups
        return {
            "weights": sum(p.nbytes for p in self._parameters.values()),
            "masters": sum(part.nbytes for part in parts),
            "states": sum(flat.nbytes for group in groups for flat in group.states.values()),
            "gradients": sum(part.nbytes for part in self._gradients.parts()),
        }

    def save(self, folder: Path) -> None:
        """Optimiser and random state as `TorchEngine` writes them, whatever the ranks and the stage.

        fp32 masters of parameters that the model keeps in bf16 go into a file of their own, which other
        engines do not read: with it training goes on bit by bit, without it from the rounded weights.
        """
        states, masters = state_tensors(self._optimizer, self._zero.single_partition_of_fp32_groups)
        if not self.ranks.is_first:
            return
        folder.mkdir(parents=True, exist_ok=True)
        steps = {"num_steps": torch.tensor(self.num_steps, dtype=torch.int64)}
        write_tensors(folder / OPTIMIZER_FILE, states | steps)
        write_tensors(folder / RANDOM_FILE, random_state_tensors())
        if masters:
            write_tensors(folder / MASTER_FILE, masters)

    def load(self, folder: Path) -> None:
        """Inverse of `save`, from any engine's state and over the weights that the model holds now.

        CheckpointError names file and tensor; the random state comes last.
        """
        tensors = read_tensors(folder / OPTIMIZER_FILE)
        random_tensors = read_tensors(folder / RANDOM_FILE)
        has_masters = (folder / MASTER_FILE).is_file()
        masters = read_tensors(folder / MASTER_FILE) if has_masters else {}
        if "num_steps" not in tensors:
            raise CheckpointError(
                f"{folder / OPTIMIZER_FILE}: tensor num_steps is missing; remake the checkpoint"
            )
        num_steps = int(tensors.pop("num_steps"))
        self._zero.refresh_fp32_params()
        try:
            load_states(self._optimizer, self._zero.single_partition_of_fp32_groups, tensors, masters)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error
        restore_random_state(random_tensors)
        self.num_steps = num_steps
        self._gradients.clear()
