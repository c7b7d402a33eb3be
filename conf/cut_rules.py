"""What must hold where the model is cut over the ranks (`engine.kind=fsdp`). Standard library only."""

from __future__ import annotations

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config


def check_cut(cfg: Config) -> None:
    """ConfigError on the first setting that needs the whole model in one place, or was not shown to work."""
    engine = cfg.engine
    if engine.kind != "fsdp":
        return
    if engine.ranks == 1:
        raise ConfigError(
            "engine.kind=fsdp cuts a model over several ranks, and engine.ranks is 1; set engine.ranks to 2 "
            "or more, or engine.kind=torch"
        )
    given = {
        "engine.context_ranks": (engine.context_ranks, 1),
        "engine.exact": (engine.exact, False),
        "engine.quantization": (engine.quantization, "off"),
        "rollout.quantization": (cfg.rollout.quantization or "off", "off"),
    }
    for key, (found, needed) in given.items():
        if found != needed:
            said, asked = (str(v).lower() if isinstance(v, bool) else v for v in (found, needed))
            raise ConfigError(
                f"{key} is {said}, which does not go with the cut model of engine.kind=fsdp; set "
                f"{key}={asked}, or engine.kind=torch"
            )
