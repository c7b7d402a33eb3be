"""The TrainEngine for models whose experts one GPU does not hold: each rank has some of them, and all else.

Neighbouring ranks, as many as `engine.expert_ranks`, have every expert once among them; tokens travel to
the experts and back in each layer (`model/expert_exchange.py`). Ranks with the same experts, one of each
group, sum those gradients among them; all else is summed over all ranks. The update is `TorchEngine`'s: a
rank keeps state of its own experts, and with `is_sharded` a part of that.

Checkpoints and publications are those of one process, made a piece at a time from the first group's ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.model.expert_parallel import shard_experts, sharded_names
from consilience.model.moe import Experts
from consilience.model.ranks import Ranks
from consilience.model.shards import read_header, read_rows
from consilience.training.divided_experts import official_weights, read_own, stored_state
from consilience.training.fsdp_checkpoint import check_state, stream_files, weight_files
from consilience.training.random_state import random_state_tensors
from consilience.training.sharded_tensors import Sharded, cut_pieces, gather_sharded
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, RANDOM_FILE, OptimizerSettings, TorchEngine


class ExpertEngine:
    """Divides the model's experts, in place, and trains it.

    expert_ranks  neighbours that divide them; a divisor of the ranks and of the experts of a layer
    timeout_s     longest wait of these groups of ranks for each other
    exact         losses are computed in exact mode
    ConfigError, and the model is as it was, where the experts do not come out even or there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings | None = None,
        *,
        ranks: Ranks,
        expert_ranks: int,
        exact: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        _check(model, expert_ranks)
        self.model, self.ranks = model, ranks
        self._groups = ranks.split(expert_ranks, timeout_s=timeout_s)
        self.divide(model)
        self.split = sharded_names(model)
        self._part = TorchEngine(model, settings, exact=exact, ranks=ranks)
        self.settings = self._part.settings
        self.forward_backward, self.step = self._part.forward_backward, self._part.step
        self.gradients, self.discard = self._part.gradients, self._part.discard
        self.offload, self.onload = self._part.offload, self._part.onload

    @property
    def num_steps(self) -> int:
        """Finished updates."""
        return self._part.num_steps

    def divide(self, model: nn.Module) -> None:
        """Keep this rank's experts of another whole model of the kind, as a reference, on this rank's device.

        It then runs on all ranks together as the trained one does. One without weights (on the meta device)
        gets room for its part of them, for `read_own`.
        """
        within, across = self._groups
        is_empty = next(model.parameters()).is_meta
        shard_experts(model, within, copies=across)
        model.to_empty(device=self.ranks.device) if is_empty else model.to(self.ranks.device)

    def write_weights(self, folder: Path | None, max_shard_bytes: int) -> dict[str, str] | None:
        """The weights into official files in `folder`, which the first rank gives; see `stream_files`."""
        weights = official_weights(self.model, self.split)
        with self.ranks.in_step():
            return stream_files(folder, weight_files(weights, max_shard_bytes), self.ranks)

    def gather_weights(self) -> dict[str, Tensor] | None:
        """The weights on the first rank's host, in a checkpoint's order; see `CutEngine`."""
        with self.ranks.in_step():
            return gather_sharded(official_weights(self.model, self.split), self.ranks)

    @torch.no_grad()
    def put_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Inverse of `gather_weights`: the first rank gives every tensor, the others None; one at a time."""
        for name, tensor in official_weights(self.model, self.split).items():
            here = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.ranks.device)
            if weights is not None:
                here.copy_(weights[name])
            self.ranks.spread_(here, 0)
            if tensor.local is not None:
                tensor.local.copy_(here)

    def read_weights(self, folder: Path) -> None:
        """This rank's part of a checkpoint's weights, whoever wrote it. CheckpointError names the tensor."""
        read_own(folder, self.model)

    def save(self, folder: Path | None) -> None:
        """optimizer.safetensors and random.safetensors, as one process writes them; see `stream_files`."""
        with self.ranks.in_step():
            stream_files(folder, {OPTIMIZER_FILE: self._stored_state()}, self.ranks, self._filled)
        if folder is not None:
            write_tensors(folder / RANDOM_FILE, random_state_tensors())

    def load(self, folder: Path) -> None:
        """Inverse of `save`, and of any other engine's. CheckpointError names file and tensor."""
        stored, expected = read_header(folder / OPTIMIZER_FILE), self._stored_state()
        random_tensors = read_tensors(folder / RANDOM_FILE)
        try:
            check_state(expected, stored)
        except CheckpointError as error:
            raise CheckpointError(f"{folder / OPTIMIZER_FILE}: {error}") from error
        place = self._groups[0].rank
        own = {}
        for name, tensor in expected.items():
            piece = tensor.piece_of(place) if len(tensor.pieces) > 1 else None
            rows = (piece.first, piece.last) if piece is not None else ()
            own[name] = read_rows(stored[name], *rows)
        self._part.restore(own, random_tensors)

    def _stored_state(self) -> dict[str, Sharded]:
        """What a checkpoint has of the optimiser, without anybody's rows."""
        steps = Sharded(torch.int64, (), cut_pieces((), 1), None)
        return {**stored_state(self._part.optimizer.state_types(), self.split), "num_steps": steps}

    def _filled(self, layout: Mapping[str, Sharded]) -> Iterator[tuple[str, Sharded]]:
        """The same with this rank's rows, a tensor at a time; where state is sharded all ranks make them."""
        for name, tensor in self._part.optimizer.each_state_tensor():
            yield name, replace(layout[name], local=tensor)
        steps = torch.tensor(self.num_steps, dtype=torch.int64, device=self.ranks.device)
        yield "num_steps", replace(layout["num_steps"], local=steps)


def divide_like(reference: nn.Module, engine: Any, folder: Path | None = None) -> None:
    """Divide the experts of a model that only computes as the engine's are; nothing with other engines.

    folder  where a model without weights finds its part of them
    """
    if not isinstance(engine, ExpertEngine):
        return
    is_empty = next(reference.parameters()).is_meta
    engine.divide(reference)
    if is_empty:
        assert folder is not None
        read_own(folder, reference)


def _check(model: nn.Module, expert_ranks: int) -> None:
    sizes = {name: len(layer.w1) for name, layer in model.named_modules() if isinstance(layer, Experts)}
    if not sizes:
        raise ConfigError(
            f"engine.expert_ranks is {expert_ranks}, but the model has no routed experts; set it to 1"
        )
    for name, size in sizes.items():
        if size % expert_ranks:
            raise ConfigError(
                f"engine.expert_ranks is {expert_ranks}, which does not divide the {size} experts of {name}; "
                f"set it to a divisor of {size} and of engine.ranks"
            )
