"""A checkpoint into a model block by block: all of it, or the part that one rank keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import official_parts
from consilience.model.number_formats import FP8_TILE
from consilience.model.released_checkpoint import ReleasedCheckpoint, blocks_of
from consilience.model.tensor_names import Kind, kind_of
from consilience.model.transformer import Transformer


@dataclass(frozen=True)
class Part:
    """Rows and columns of a tensor; None is all of them."""

    rows: slice | None = None
    columns: slice | None = None


# What a rank keeps of the tensor with this official name and shape; None: nothing.
Keep = Callable[[str, tuple[int, ...]], Part | None]
WHOLE = Part()


@dataclass(frozen=True)
class Rank:
    """One of `count` ranks, and its share of whatever is split."""

    index: int
    count: int

    def experts(self, num_experts: int) -> range:
        """Its routed experts, neighbours; shares differ by one where the count does not divide."""
        return range(self.index * num_experts // self.count, (self.index + 1) * num_experts // self.count)

    def share(self, size: int, tile: int = FP8_TILE[0]) -> slice:
        """Its rows or columns, cut on tile borders, so that quantised parts stay what they are."""
        tiles = -(-size // tile)
        first, last = (tiles * i // self.count * tile for i in (self.index, self.index + 1))
        return slice(min(first, size), min(last, size))

    def keep_experts(self, num_experts: int) -> Keep:
        """Its routed experts, and all that is not a routed expert."""
        mine = self.experts(num_experts)

        def keep(name: str, shape: tuple[int, ...]) -> Part | None:
            is_expert = kind_of(name) is Kind.EXPERT
            return WHOLE if not is_expert or int(name.split(".experts.")[1].split(".")[0]) in mine else None

        return keep


@torch.no_grad()
def load_released(
    model: Transformer,
    checkpoint: ReleasedCheckpoint,
    *,
    device: torch.device | str = "cpu",
    keep: Keep = lambda name, shape: WHOLE,
    first_expert: int = 0,
) -> None:
    """Fill the model in place, in the types that it has.

    device        where parameters built on `meta` are made, each when its turn comes; the others stay
                  where they are
    keep          what this rank holds of each tensor; the model's parameters have the parts' shapes
    first_expert  number of the model's first routed expert

    Beside the model one block of rows is in memory, on the host as stored and on the device as decoded.
    CheckpointError, before anything is copied, if names or shapes of the model are not those kept. A
    model built on `meta` gets its parameters all at once, at the end.
    """
    state = model.state_dict()
    kept = {n: part for n, e in checkpoint.entries.items() if (part := keep(n, e.shape)) is not None}
    _check(state, checkpoint, kept, first_expert)
    made: dict[str, Tensor] = {}
    for own_name, tensor in state.items():
        if tensor.is_meta:
            tensor = made[own_name] = torch.empty_like(tensor, device=device)
        for name, target in official_parts(own_name, tensor, first_expert).items():
            _fill(target, checkpoint, name, kept[name])
    if made:
        model.load_state_dict(made, strict=False, assign=True)


def _fill(target: Tensor, checkpoint: ReleasedCheckpoint, name: str, part: Part) -> None:
    start = (part.rows or slice(None)).indices(checkpoint.entries[name].shape[0])[0]
    for first, last in blocks_of(tuple(target.shape)):
        rows = slice(start + first, start + last)
        block = checkpoint.read(name, rows, part.columns, device=target.device)
        target[first:last].copy_(block)


def _check(
    state: dict[str, Tensor], checkpoint: ReleasedCheckpoint, kept: dict[str, Part], first_expert: int
) -> None:
    targets: dict[str, Tensor] = {}
    for own_name, tensor in state.items():
        targets |= official_parts(own_name, tensor, first_expert)
    for name in sorted(targets.keys() ^ kept.keys()):
        lacking = "the model" if name in kept else "the checkpoint, or what is kept of it,"
        raise CheckpointError(
            f"{checkpoint.folder}: {lacking} has no tensor {name}; build the model from its config"
        )
    for name, target in targets.items():
        sizes = checkpoint.entries[name].shape
        cuts = [p or slice(None) for p in (kept[name].rows, kept[name].columns)]
        shape = [len(range(*cut.indices(size))) for cut, size in zip(cuts, sizes)]
        if list(target.shape) != shape:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name}: the model has shape {list(target.shape)}, the "
                f"checkpoint gives {shape}"
            )
