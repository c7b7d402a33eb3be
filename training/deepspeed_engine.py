"""The TrainEngine on DeepSpeed's ZeRO: optimiser states, masters and gradients divided over the ranks.

DeepSpeed divides, reduces and gathers; what it is given are sums with global denominators, and what updates
its parts is our own optimiser (`deepspeed_optimizer.py`): DeepSpeed's Muon is another one, without row
blocks, with other coefficients and another scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.context_parallel import context_parallel
from consilience.model.exact import exact_mode
from consilience.model.ranks import ALONE, Ranks
from consilience.training.accumulation import LossFn, add_report
from consilience.training.clipping import checked_norm, clip_factors
from consilience.training.deepspeed_gradients import OrderedGradients, divide_flat
from consilience.training.deepspeed_optimizer import ZeroV4Optimizer, optimizer_groups
from consilience.training.deepspeed_setup import check_possible, open_deepspeed
from consilience.training.deepspeed_stage3 import DividedModel, divide_parameters
from consilience.training.deepspeed_state import load_states, state_tensors
from consilience.training.deepspeed_weights import gather_weights, put_weights, read_weights, write_weights
from consilience.training.engine_checks import check_denominators, fail_together
from consilience.training.fill_up import blank
from consilience.training.optimizers import gate_bias_names, loads_by_bias, parameter_groups, update_gate_bias
from consilience.training.random_state import random_state_tensors, restore_random_state
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, RANDOM_FILE, OptimizerSettings

MASTER_FILE = "master.safetensors"


class DeepSpeedEngine:
    """Holds the model, in the types it came with, and fp32 masters, gradients and states divided by ZeRO.

    zero_stage  1 divides optimiser states and masters, 2 the gradients too, 3 the trunk's weights too (AdamW
                and fp32 only; `whole_weights` to read or change them)
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
        rule = self._owners.rule
        self._bias_shapes = {
            name: torch.empty(bias.shape, device=ranks.device) for name, bias in rule.items()
        }
        groups = optimizer_groups(self._owners, s.weight_decay, is_fp32_first=zero_stage == 2)
        self._optimizer = ZeroV4Optimizer(groups, s, ranks)
        self._parameters = {
            name: p
            for name, p in model.named_parameters()
            if any(name in group.parameters for group in groups)
        }
        self.is_divided = zero_stage == 3
        self._engine = open_deepspeed(model, self._optimizer, ranks, zero_stage=zero_stage, offload=offload)
        self._zero = zero = self._engine.optimizer
        if self.is_divided:
            divide_parameters(zero, groups, ranks)
            self._gradients = DividedModel(zero, model, self._parameters, ranks, offload=offload)
        else:
            divide_flat(zero, groups, ranks)
            self._gradients = OrderedGradients(zero, self._parameters, is_offloaded=offload)

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
        for first in range(0, len(micro_batches), self.ranks.num_parts):
            index = first + self.ranks.part_number
            with self.ranks.in_step() if self._is_together else nullcontext():
                loss, failure = self._forward(loss_fn, micro_batches, index, found)
            fail_together(self.ranks, index, failure, self.num_steps)
            with self.ranks.in_step():
                if isinstance(self._gradients, DividedModel):
                    self._gradients.end_forward()
                is_filler = index >= len(micro_batches)
                self._gradients.backward(self._engine, self._reaching(loss), is_filler=is_filler)
        total: dict[str, float] = {}
        for report in self.ranks.gather(found):
            add_report(total, report)
        return {name: value / denominators.get(name, 1.0) for name, value in total.items()}

    def _reaching(self, loss: Tensor | None) -> Tensor:
        """The loss; zero through the smallest parameter where there is none, as all ranks sum gradients."""
        if loss is not None and loss.requires_grad:
            return loss
        outer = [p for name, p in self._parameters.items() if not name.startswith("layers.")]
        return 0.0 * min(outer or self._parameters.values(), key=Tensor.numel).sum()

    @property
    def _is_together(self) -> bool:
        """Whether ranks wait for each other within a forward: blocks are gathered, or rows are cut."""
        return self.is_divided or self.ranks.context is not None

    def _forward(
        self, loss_fn: LossFn, micro_batches: list[Any], index: int, found: dict[str, float]
    ) -> tuple[Tensor | None, Exception | None]:
        """(the loss of micro-batch `index`, what failed in it), its report added to `found`.

        There is no loss of a micro-batch too many, but under ZeRO-3 its blocks run all the same. Where ranks
        wait for each other within, an error is raised: this rank cannot join the others to tell them.
        """
        is_filler = index >= len(micro_batches)
        if is_filler and not self.is_divided:
            return None, None
        try:
            self._gradients.begin()
            with exact_mode(self.exact), context_parallel(self.ranks.context or ALONE):
                loss, reported = loss_fn(
                    self.model, blank(micro_batches[0]) if is_filler else micro_batches[index]
                )
            value = float(loss.detach())
        except Exception as error:
            if self._is_together:
                raise
            return None, error
        if not math.isfinite(value):
            return None, EngineError(
                f"step {self.num_steps}: the loss of micro-batch {index} is {value}; no parameter "
                "was changed. Lower the learning rate or resume from the last checkpoint"
            )
        if not is_filler:
            add_report(found, {"loss": value} | dict(reported))
        return loss, None

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
        try:
            if reached:
                with self.ranks.in_step():
                    self._gradients.finish()
            norms = self._norms(reached)
            grad_norm = checked_norm(norms, self.num_steps)
            factors = clip_factors(norms, self.settings.grad_clip)
            for group, part in zip(self._optimizer.groups, self._gradients.parts()):
                clipped = [factors[name] for name in group.parameters if name in factors]
                if clipped:  # one factor for all of a group: it is of the prediction blocks or of the rest
                    part.mul_(clipped[0])
            self._move_biases(expert_load)
            lr = self.settings.lr * lr_scale
            self._optimizer.lr, self._optimizer.touched = lr, frozenset(reached)
            with self.ranks.in_step():
                self._zero.step()
        finally:
            self._gradients.clear()
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": lr}

    @property
    def _masters(self) -> list[Tensor]:
        """Each group's fp32 weights on this rank [n]."""
        if self.is_divided:
            return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _reached(self) -> set[str]:
        return set().union(*self.ranks.gather(self._gradients.reached))

    def _norms(self, reached: set[str]) -> dict[str, float]:
        """Name -> norm of the whole gradient, of all that have one."""
        squares = {name: 0.0 for name in self._parameters if name in reached}
        for group, part in zip(self._optimizer.groups, self._gradients.parts()):
            held = [segment for segment in group.segments if segment.name in squares]
            norms = torch._foreach_norm([segment.of(part) for segment in held]) if held else []  # pyright: ignore[reportPrivateImportUsage]
            for segment, norm in zip(held, norms):
                squares[segment.name] += float(norm) ** 2
        total = torch.tensor(list(squares.values()), dtype=torch.float64, device=self.ranks.device)
        self.ranks.sum_([total])
        return {name: math.sqrt(square) for name, square in zip(squares, total.tolist())}

    def _move_biases(self, expert_load: Mapping[int, Tensor] | None) -> None:
        loads = loads_by_bias(self._bias_names, self._bias_shapes, expert_load, self.ranks)
        if not loads or not self.settings.lr:
            return
        with self.whole_weights(is_changed=True, names=set(loads)):
            for name, load in loads.items():
                update_gate_bias(self._owners.rule[name], load, self.settings.bias_speed)

    def whole_weights(self, *, is_changed: bool = False, names: set[str] | None = None) -> Any:
        """A context in which `model` holds whole weights on every rank, also under ZeRO-3.

        is_changed  the first rank's changes are kept, in every rank's part;  names  only these, None: all
        """
        return self._gradients.whole(is_changed=is_changed, names=names)

    def held_bytes(self) -> dict[str, int]:
        """What this rank keeps between steps: weights, fp32 masters, optimiser states; and, until `step`, the
        gradients that it has after `gradients`."""
        groups, parts = self._optimizer.groups, self._masters
        return {
            "weights": sum(p.nbytes for p in self._parameters.values()),
            "masters": sum(part.nbytes for part in parts),
            "states": sum(flat.nbytes for group in groups for flat in group.states.values()),
            "gradients": sum(part.nbytes for part in self._gradients.parts()),
        }

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step."""
        self._gradients.clear()

    def gather_weights(self) -> dict[str, Tensor] | None:
        """Under ZeRO-3: the weights on the first rank's host; see `CutEngine`."""
        with self.ranks.in_step():
            return gather_weights(self.model, self.whole_weights, self.ranks)

    def put_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Under ZeRO-3: inverse of `gather_weights`; see `CutEngine`."""
        with self.ranks.in_step():
            put_weights(self.model, weights, self.whole_weights, self.ranks)

    def write_weights(self, folder: Path | None, max_shard_bytes: int) -> dict[str, str] | None:
        """Under ZeRO-3: official files by the first rank, from its host's memory; see `CutEngine`."""
        if not self.ranks.broadcast(folder is not None):
            return None
        return write_weights(folder, self.gather_weights(), max_shard_bytes, self.ranks)

    def read_weights(self, folder: Path) -> None:
        """Under ZeRO-3: a checkpoint's weights into every rank's part and its masters; see `CutEngine`."""
        read_weights(folder, self.model, self.whole_weights)

    def save(self, folder: Path | None) -> None:
        """Optimiser and random state as `TorchEngine` writes them, whatever the ranks and the stage.

        fp32 masters of parameters that the model keeps in bf16 go into a file of their own, which other
        engines do not read: with it training goes on bit by bit, without it from the rounded weights.
        """
        states, masters = state_tensors(self._optimizer, self._masters)
        if folder is None or not self.ranks.is_first:
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
        if not self.is_divided:  # where it is, `whole_weights` has done it
            self._zero.refresh_fp32_params()
        try:
            load_states(self._optimizer, self._masters, tensors, masters)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error
        restore_random_state(random_tensors)
        self.num_steps = num_steps
        self._gradients.clear()
