"""Optimiser states and fp32 masters by parameter name, from and into the parts that ZeRO divides them into.

The names are those of `V4Optimizer`: adamw.{exp_avg, exp_avg_sq, step}.<name>, muon.momentum.<name>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.training.deepspeed_optimizer import Group, ZeroV4Optimizer


def state_tensors(
    optimizer: ZeroV4Optimizer, parts: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every state, and the masters of parameters that are not fp32 themselves, whole, on the first rank.

    parts  fp32 masters of each group on this rank. The other ranks must call it too and get nothing.
    """
    ranks = optimizer.ranks
    states: dict[str, Tensor] = {}
    masters: dict[str, Tensor] = {}
    for group, part in zip(optimizer.groups, parts):
        kind = "muon" if group.is_muon else "adamw"
        for key, flat in group.states.items():
            for name, whole in group.whole(flat, ranks):
                if ranks.is_first:
                    states[f"{kind}.{key}.{name}"] = whole.cpu()
        states |= {f"{kind}.step.{name}": step.clone() for name, step in group.num_steps.items()}
        if group.dtype != torch.float32:
            for name, whole in group.whole(part.detach(), ranks):
                if ranks.is_first:
                    masters[name] = whole.cpu()
    return (states, masters) if ranks.is_first else ({}, {})


@torch.no_grad()
def load_states(
    optimizer: ZeroV4Optimizer,
    parts: Sequence[Tensor],
    tensors: Mapping[str, Tensor],
    masters: Mapping[str, Tensor],
) -> None:
    """Inverse of `state_tensors`; no masters: the parts keep theirs.

    CheckpointError on a missing, unexpected or wrongly shaped tensor, before anything is changed.
    """
    _check(_shapes(optimizer.groups), tensors)
    if masters:
        own = {n: s for g in optimizer.groups if g.dtype != torch.float32 for n, s in g.shapes.items()}
        _check(own, masters)
    for group, part in zip(optimizer.groups, parts):
        kind = "muon" if group.is_muon else "adamw"
        for key, flat in group.states.items():
            group.take(flat, {name: tensors[f"{kind}.{key}.{name}"] for name in group.parameters})
        for name, step in group.num_steps.items():
            step.copy_(tensors[f"{kind}.step.{name}"])
        if masters and group.dtype != torch.float32:
            group.take(part, {name: masters[name] for name in group.parameters})


def _shapes(groups: Sequence[Group]) -> dict[str, torch.Size]:
    """Name -> shape of every state tensor."""
    shapes = {}
    for group in groups:
        kind = "muon" if group.is_muon else "adamw"
        for name, shape in group.shapes.items():
            shapes |= {f"{kind}.{key}.{name}": shape for key in group.states}
        shapes |= {f"{kind}.step.{name}": torch.Size() for name in group.num_steps}
    return shapes


def _check(expected: Mapping[str, torch.Size], tensors: Mapping[str, Tensor]) -> None:
    for name in sorted(set(expected) ^ set(tensors)):
        problem = "is missing" if name in expected else "is not a state of this model's optimiser"
        raise CheckpointError(
            f"optimiser state: {name} {problem}; resume with the model and optimiser that wrote it"
        )
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"optimiser state: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
            )
