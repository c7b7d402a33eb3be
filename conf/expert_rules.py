"""What must hold where experts are divided over ranks (`engine.expert_ranks`). Standard library only."""

from __future__ import annotations

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config


def check_experts(cfg: Config) -> None:
    """ConfigError on the first setting that needs every expert in one place, or cuts them in another way."""
    engine, size = cfg.engine, cfg.engine.expert_ranks
    if size == 1:
        return
    if engine.kind != "torch":
        raise ConfigError(
            f"engine.expert_ranks is {size}, which divides the experts of engine.kind=torch, and this is "
            f"{engine.kind}, which keeps or cuts them in its own way; set engine.kind=torch, with "
            "engine.shard_state=true to divide the optimiser's state too, or engine.expert_ranks=1"
        )
    if engine.ranks % size:
        raise ConfigError(
            f"engine.expert_ranks is {size}, which does not divide engine.ranks={engine.ranks}; set it to a "
            "divisor of engine.ranks, 1 for all experts on every rank"
        )
    if (num_experts := cfg.model.n_routed_experts) is not None and num_experts % size:
        raise ConfigError(
            f"engine.expert_ranks is {size}, which does not divide model.n_routed_experts={num_experts}; set "
            "it to a divisor of both this and engine.ranks"
        )
    if cfg.rollout.quantization not in (None, engine.quantization):
        raise ConfigError(
            f"rollout.quantization is {cfg.rollout.quantization}, and a model with "
            f"engine.expert_ranks={size} proves its samplers as it trains itself; set "
            f"rollout.quantization={engine.quantization}, or engine.expert_ranks=1"
        )
