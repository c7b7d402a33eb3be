"""What must hold where the model is cut over the ranks (`engine.kind=fsdp`). Standard library only."""

from __future__ import annotations

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config


def check_cut(cfg: Config) -> None:
    """ConfigError on the first setting that needs the whole model in one place."""
    engine = cfg.engine
    if engine.kind != "fsdp":
        return
    if engine.ranks == 1:
        raise ConfigError(
            "engine.kind=fsdp cuts a model over several ranks, and engine.ranks is 1; set engine.ranks to 2 "
            "or more, or engine.kind=torch"
        )
    if cfg.rollout.quantization not in (None, engine.quantization):
        raise ConfigError(
            f"rollout.quantization is {cfg.rollout.quantization}, and a model cut by engine.kind=fsdp proves "
            f"its samplers as it trains itself; set rollout.quantization={engine.quantization}, or "
            "engine.kind=torch"
        )
