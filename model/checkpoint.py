"""Official tensor names for this package's modules, both ways (specification 11.1).

Two things differ from the released layout: routed experts are stacked here and one tensor an
expert there, and hyper-connections are modules here (`hc_attn.fn`) and flat names there
(`hc_attn_fn`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.config import ModelConfig
from consilience.model.transformer import Transformer

_EXPERTS = re.compile(r"^(.*\.ffn\.experts)\.(w[123])$")


def official_name(name: str) -> str:
    """Parameter name of `Transformer` -> released tensor name (stacked experts keep their stack)."""
    return re.sub(r"(hc_attn|hc_ffn|hc_head)\.(fn|base|scale)$", r"\1_\2", name)


def official_parts(name: str, tensor: Tensor, first_expert: int = 0) -> dict[str, Tensor]:
    """The released tensors that the parameter `name` is made of: itself, or one for each expert.

    first_expert is the number of the first one in the stack, where a rank holds some of them only.
    """
    match = _EXPERTS.match(name)
    if not match:
        return {official_name(name): tensor}
    prefix, part = match.groups()
    return {f"{prefix}.{number}.{part}.weight": expert for number, expert in enumerate(tensor, first_expert)}


def to_official(model: Transformer) -> dict[str, Tensor]:
    """All tensors of the model under official names, detached, sharing memory; where its experts are split
    over ranks, those of this one."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors |= official_parts(name, tensor, _first_expert(model, name))
    return tensors


def _first_expert(model: Transformer, name: str) -> int:
    """Number of the first expert in the stack `name`; 0 where it is none, or whole."""
    if not _EXPERTS.match(name):
        return 0
    shard = model.get_submodule(name.rpartition(".")[0]).shard
    return 0 if shard is None else shard.own.start  # type: ignore[union-attr]


@lru_cache(maxsize=4)
def expected_shapes(config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """Official name -> shape of every tensor that a checkpoint of this model holds, in their order."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: tuple(tensor.shape) for name, tensor in to_official(model).items()}


@torch.no_grad()
def load_official(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy official tensors into the model; nothing changes unless all fit.

    CheckpointError names the first missing or unexpected tensor, one of another shape, or a hash
    table that points at an expert the model does not have.
    """
    expected = to_official(model)
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        what = f"misses {missing[0]}" if missing else f"has an unexpected {unexpected[0]}"
        raise CheckpointError(f"checkpoint {what} ({len(missing)} missing, {len(unexpected)} unexpected)")
    for name, target in expected.items():
        if tensors[name].shape != target.shape:
            raise CheckpointError(
                f"{name}: found shape {tuple(tensors[name].shape)}, expected {tuple(target.shape)}"
            )
    _check_tables(tensors, model.config)
    for name, target in expected.items():
        target.copy_(tensors[name])


def check_hash_tables(model: Transformer) -> None:
    """CheckpointError if a hash table of the model points at an expert that the model does not have."""
    _check_tables(model.state_dict(), model.config)  # their official names are their own


def _check_tables(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    last = config.n_routed_experts - 1
    for name, table in tensors.items():
        if name.endswith("tid2eid") and table.numel():
            low, high = int(table.min()), int(table.max())
            if low < 0 or high > last:
                raise CheckpointError(f"{name}: expert ids run from {low} to {high}, allowed are 0 to {last}")
