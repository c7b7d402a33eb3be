"""Gradients and optimiser state of a model whose experts are split over ranks: who sums what, how long
gradients are together, and state that does not tell how many ranks there were."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from consilience.model.expert_exchange import Shard
from consilience.model.expert_parallel import each_expert
from consilience.model.ranks import Ranks


def sum_gradients(grads: Mapping[str, Tensor], ranks: Ranks, shards: Mapping[str, Shard]) -> None:
    """Every gradient becomes its sum over the ranks that have a part in it, in place.

    grads of the same names on all `ranks`; `shards` as `sharded_names` gives them. An expert has seen the
    tokens of all ranks that share its layer, so only its copies add to it; all else is summed over `ranks`.
    """
    ranks.sum_(grad for name, grad in grads.items() if name not in shards)
    for shard in list(shards.values())[:1]:  # one split for all layers
        shard.copies.sum_(grad for name, grad in grads.items() if name in shards)


def whole_norms(norms: Mapping[str, float], shards: Mapping[str, Shard]) -> dict[str, float]:
    """Norms of summed gradients by name, those of split stacks over all experts: the same on all ranks."""
    found = dict(norms)
    own = {name: norm * norm for name, norm in norms.items() if name in shards}
    for shard in list(shards.values())[:1]:
        found |= {name: math.sqrt(square) for name, square in shard.ranks.sums(own).items()}
    return found


def whole_state(state: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """Optimiser tensors with those of split stacks whole [E, …], on every rank; all ranks call it.

    Keys as `V4Optimizer.state_tensors` makes them: "muon.momentum.<name>", "adamw.exp_avg.<name>".
    """
    return {
        key: tensor if shard is None else torch.stack(list(each_expert(tensor, shard)))
        for key, tensor, shard in _with_shards(state, shards)
    }


def own_state(state: Mapping[str, Tensor], shards: Mapping[str, Shard]) -> dict[str, Tensor]:
    """What `whole_state` was made of on this rank: its rows of the split stacks."""
    return {
        key: tensor if shard is None else tensor[shard.own.start : shard.own.stop]
        for key, tensor, shard in _with_shards(state, shards)
    }


def _with_shards(
    state: Mapping[str, Tensor], shards: Mapping[str, Shard]
) -> Iterator[tuple[str, Tensor, Shard | None]]:
    for key, tensor in state.items():
        name = key.split(".", 2)[-1]
        yield key, tensor, shards.get(name) if tensor.ndim else None  # a count of steps has no rows
