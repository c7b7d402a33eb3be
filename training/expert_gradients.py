"""Gradients of a model whose experts are split over ranks: who sums what, and how long they are together."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from consilience.model.expert_exchange import Shard
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
