"""The TrainEngine for models that one GPU does not hold: PyTorch's FSDP2, V4's two optimisers, sharded.

Weights, gradients and optimiser state are cut over the ranks, each of which runs its own micro-batches. All
ranks run the same number of forwards, as they gather weights from each other in each of them. Gradients of
the micro-batches of one call are kept whole and reduced once, as a sum, in fp32, in the call's last backward.

A gradient that is zero in every entry on every rank counts as none: a group is reduced as a whole, and with
it what no loss has reached.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.ranks import Ranks
from consilience.model.shards import read_header, read_rows
from consilience.training.accumulation import accumulate
from consilience.training.clipping import checked_norm, clip_factors
from consilience.training.fsdp_checkpoint import (
    check_state,
    official_weights,
    read_weights,
    stream_files,
    weight_files,
)
from consilience.training.fsdp_model import Anchor, cut_model
from consilience.training.optimizers import gate_bias_names, loads_by_bias, parameter_groups
from consilience.training.random_state import random_state_tensors, restore_random_state
from consilience.training.sharded_optimizer import ShardedOptimizer
from consilience.training.sharded_tensors import (
    Sharded,
    cut_pieces,
    gather_sharded,
    read_piece,
    scatter_sharded,
)
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, RANDOM_FILE, OptimizerSettings


class FsdpEngine:
    """Cuts the model over the ranks, in place, and trains it. `num_steps` counts finished updates.

    exact: losses are computed in exact mode. EngineError with one rank (`TorchEngine` is for that).
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings | None = None,
        *,
        ranks: Ranks,
        o_groups: int | None = None,
        exact: bool = False,
    ) -> None:
        self.model, self.ranks, self.exact = model, ranks, exact
        self.settings = s = settings or OptimizerSettings()
        self.num_steps = 0
        self._is_summed = False
        self._bias_names = gate_bias_names(model)
        groups = parameter_groups(model, o_groups=o_groups, use_muon=s.kind == "muon")
        cut_model(model, ranks)
        self._anchor = Anchor(model)
        self._parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
        values = {
            "lr": s.lr,
            "weight_decay": s.weight_decay,
            "betas": (s.beta1, s.beta2),
            "eps": s.eps,
            "momentum": s.momentum,
            "update_rms": s.update_rms,
            "bias_speed": s.bias_speed,
        }
        self.optimizer = ShardedOptimizer(groups, dict(model.named_parameters()), ranks, values)

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
                backward=self._backward,
                is_in_step=True,
            )
        except BaseException:
            self._clear()
            raise

    def step(
        self, lr_scale: float = 1.0, expert_load: Mapping[int, Tensor] | None = None
    ) -> dict[str, float]:
        """Clip, update, clear; see `TrainEngine`."""
        self._reshard()
        try:
            grads = self.gradients()
            norms = self._norms(grads)
            grad_norm = checked_norm(norms, self.num_steps)
        except EngineError:
            self._clear()
            raise
        factors = clip_factors(norms, self.settings.grad_clip)
        for name, grad in grads.items():
            if norms.get(name, 0.0) == 0.0:
                self.optimizer.local[name].grad = None
            elif name in factors:
                grad.mul_(factors[name])
        loads = loads_by_bias(self._bias_names, self.optimizer.kept.groups.rule, expert_load, self.ranks)
        with self.ranks.in_step():
            lr = self.optimizer.step(lr_scale, loads)
        self._clear()
        self.num_steps += 1
        return {"grad_norm": grad_norm, "lr": lr}

    def gradients(self) -> dict[str, Tensor]:
        """This rank's rows of the step's gradients by name, summed over the ranks; `step` is what follows."""
        if self._is_summed:
            return self.optimizer.take_gradients()
        self._is_summed = True
        held, cut = self.optimizer.held, self.optimizer.is_cut
        whole = [name for name in self.optimizer.names if not cut(name)]
        anywhere = set().union(*self.ranks.gather([n for n in whole if held[n].grad is not None]))
        for name in whole:
            if name in anywhere and held[name].grad is None:
                held[name].grad = torch.zeros_like(held[name])
        self.ranks.sum_(grad for n in whole if n in anywhere and (grad := held[n].grad) is not None)
        return self.optimizer.take_gradients()

    def _norms(self, grads: Mapping[str, Tensor]) -> dict[str, float]:
        """Norm of each whole gradient, of those that are not zero."""
        squares = torch.zeros(len(grads), dtype=torch.float64, device=self.ranks.device)
        for i, (name, grad) in enumerate(grads.items()):
            if grad.numel() and (self.optimizer.is_cut(name) or self.ranks.is_first):
                squares[i] = torch.linalg.vector_norm(grad, dtype=torch.float64).square()
        self.ranks.sum_([squares])
        found = {name: math.sqrt(s) if s >= 0 else s for name, s in zip(grads, squares.tolist())}
        return {name: norm for name, norm in found.items() if norm != 0}

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        self.model.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        self.model.set_is_last_backward(is_last)  # type: ignore[operator]
        self._anchor.hang(loss).backward()

    def _reshard(self) -> None:
        """Free what a forward without a backward has left gathered: it would outlive the update."""
        for module in self._parts:
            module.reshard()

    def _clear(self) -> None:
        self.optimizer.clear()
        self._is_summed = False

    def write_weights(self, folder: Path | None, max_shard_bytes: int) -> dict[str, str] | None:
        """The weights into official files in `folder`, which the first rank gives; see `stream_files`."""
        self._reshard()
        weights = official_weights(self.model, self.ranks)
        return stream_files(folder, weight_files(weights, max_shard_bytes), self.ranks)

    def gather_weights(self) -> dict[str, Tensor] | None:
        """The weights on the first rank's host, in a checkpoint's order; see `CutEngine`."""
        self._reshard()
        with self.ranks.in_step():
            return gather_sharded(official_weights(self.model, self.ranks), self.ranks)

    @torch.no_grad()
    def put_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Inverse of `gather_weights`; see `CutEngine`."""
        self._reshard()
        with self.ranks.in_step():
            scatter_sharded(official_weights(self.model, self.ranks), weights, self.ranks)

    def read_weights(self, folder: Path) -> None:
        """Each rank's part of a checkpoint's weights, whoever wrote it. CheckpointError names the tensor."""
        self._reshard()
        read_weights(folder, self.model, self.ranks)

    def discard(self) -> None:
        """Forget the gradients accumulated since the last step."""
        self._clear()

    def save(self, folder: Path | None) -> None:
        """optimizer.safetensors and random.safetensors, as one process writes them; see `stream_files`."""
        steps = torch.tensor(self.num_steps, dtype=torch.int64)
        state = self.optimizer.state() | {"num_steps": Sharded(steps.dtype, (), cut_pieces((), 1), steps)}
        stream_files(folder, {OPTIMIZER_FILE: state}, self.ranks)
        if folder is not None:
            write_tensors(folder / RANDOM_FILE, random_state_tensors())

    def load(self, folder: Path) -> None:
        """Inverse of `save`, and of any other engine's. CheckpointError names file and tensor."""
        stored = read_header(folder / OPTIMIZER_FILE)
        random_tensors = read_tensors(folder / RANDOM_FILE)
        state = self.optimizer.state()
        try:
            check_state(state | {"num_steps": Sharded(torch.int64, (), (), None)}, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error
        own = {name: read_piece(stored[name], tensor, self.ranks.rank) for name, tensor in state.items()}
        self.optimizer.load_state({name: rows for name, rows in own.items() if rows is not None})
        restore_random_state(random_tensors)
        self.num_steps = int(read_rows(stored["num_steps"]))
        self._clear()
