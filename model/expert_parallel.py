"""A model whose routed experts are split over ranks: made, filled from a checkpoint, and put together again.

Everything but the routed experts stays whole on every rank, with the ranks' own tokens: those gradients are
summed over all ranks. An expert's are whole where it lives; only ranks that hold the same experts sum theirs.

E experts of a layer, e of them on this rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from consilience.conf.errors import ConfigError
from consilience.model.checkpoint import official_parts
from consilience.model.expert_exchange import Shard
from consilience.model.moe import Experts
from consilience.model.ranks import ALONE, Ranks
from consilience.model.released_checkpoint import ReleasedCheckpoint
from consilience.model.released_loading import Rank, load_released
from consilience.model.transformer import Transformer

STACKS = ("w1", "w2", "w3")


@torch.no_grad()
def shard_experts(model: nn.Module, ranks: Ranks, *, copies: Ranks = ALONE, waves: int = 4) -> None:
    """Keep this rank's experts of every layer, neighbours by number, and let tokens travel from now on.

    Every rank calls it with the same model; parameters keep their names and lose rows, so optimisers come
    after. One rank keeps the model as it is.

    ranks   those that share one set of experts: all, or the first part of `Ranks.split`
    copies  those that hold the same experts as this one: its second part
    waves   parts of a rank's experts that are computed one after another while tokens of the next travel; as
            many as the rank with the fewest has, if that is less. Results do not depend on it
    ConfigError if there are more ranks than experts, or the experts are split already.
    """
    if waves < 1:
        raise ConfigError(f"waves of experts: found {waves}, allowed are 1 and more")
    for name, layer in _layers(model):
        num_experts = len(layer.w1)
        if layer.shard is not None:
            raise ConfigError(f"{name}: its experts are split over ranks already; split a whole model")
        if ranks.size > num_experts:
            raise ConfigError(
                f"{name}: {num_experts} experts cannot be split over {ranks.size} ranks; take at most "
                f"{num_experts} expert ranks"
            )
        if ranks.size == 1:
            continue
        shard = Shard(ranks, num_experts, min(waves, num_experts // ranks.size), copies)
        for stack in STACKS:
            old = getattr(layer, stack)
            own = old[shard.own.start : shard.own.stop].clone()
            setattr(layer, stack, nn.Parameter(own, requires_grad=old.requires_grad))
        layer.shard = shard


def sharded_names(model: nn.Module) -> dict[str, Shard]:
    """Parameters of which this rank holds some experts only [e, …] -> how they are split; none in a whole
    model."""
    layers = [(name, layer) for name, layer in _layers(model) if layer.shard is not None]
    return {f"{name}.{stack}": layer.shard for name, layer in layers for stack in STACKS}  # type: ignore[misc]


@torch.no_grad()
def each_expert(own: Tensor, shard: Shard) -> Iterator[Tensor]:
    """The E rows of a stack of which every rank gives its e, on every rank, one at a time.

    Every rank walks to the end. own [e, …] is a parameter, or anything an optimiser keeps of one.
    """
    for rank in range(shard.ranks.size):
        for number in range(len(Rank(rank, shard.ranks.size).experts(shard.num_experts))):
            is_mine = rank == shard.ranks.rank
            row = own[number].detach().contiguous() if is_mine else own.new_empty(own.shape[1:])
            shard.ranks.spread_(row, rank)
            yield row


@torch.no_grad()
def official_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the whole model by official name, on every rank, one at a time.

    Every rank walks to the end, whichever of them writes; a tensor of another rank is only held until the
    next one.
    """
    sharded = sharded_names(model)
    for name, tensor in model.state_dict().items():
        if name not in sharded:
            yield from official_parts(name, tensor).items()
            continue
        for number, expert in enumerate(each_expert(tensor, sharded[name])):
            ((official, part),) = official_parts(name, expert[None], number).items()
            yield official, part


def load_own(
    model: Transformer, checkpoint: ReleasedCheckpoint, *, device: torch.device | str = "cpu"
) -> None:
    """Fill a model, split or whole, from a checkpoint; of the experts this rank's alone are read.

    Built on `meta` and split there, nothing else is ever in memory. Errors as `load_released`.
    """
    shard = next(iter(sharded_names(model).values()), None)
    if shard is None:
        return load_released(model, checkpoint, device=device)
    keep = Rank(shard.ranks.rank, shard.ranks.size).keep_experts(shard.num_experts)
    load_released(model, checkpoint, device=device, keep=keep, first_expert=shard.own.start)


def _layers(model: nn.Module) -> list[tuple[str, Experts]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
