"""What must hold under ZeRO-3 (`engine.kind=deepspeed engine.zero_stage=3`). Standard library only."""

from __future__ import annotations

from collections.abc import Iterator

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config


def check_zero(cfg: Config) -> None:
    """ConfigError on the first setting that needs whole matrices, or was not shown to work."""
    engine = cfg.engine
    if engine.kind != "deepspeed" or engine.zero_stage != 3:
        return
    for key, kind in _optimizers(cfg):
        if kind == "muon":
            raise ConfigError(
                f"{key} is muon, which needs whole matrices, and engine.zero_stage=3 cuts every one over all "
                f"ranks; take engine.kind=fsdp, or set engine.zero_stage=2, or {key}=adamw"
            )
    for key, (found, needed) in _others(cfg).items():
        if found != needed:
            said, asked = (str(v).lower() if isinstance(v, bool) else v for v in (found, needed))
            raise ConfigError(
                f"{key} is {said}, which does not go with the weights of engine.zero_stage=3, divided over "
                f"the ranks; set {key}={asked}, or engine.zero_stage=2"
            )


def _optimizers(cfg: Config) -> Iterator[tuple[str, str]]:
    for domain, own in cfg.specialist.settings.items():
        kind = own.get("optimizer", {}).get("kind", cfg.optimizer.kind)
        yield f"specialist.settings.{domain}.optimizer.kind", kind
    yield "optimizer.kind", cfg.optimizer.kind


def _others(cfg: Config) -> dict[str, tuple[object, object]]:
    given: dict[str, tuple[object, object]] = {
        "engine.context_ranks": (cfg.engine.context_ranks, 1),
        "engine.exact": (cfg.engine.exact, False),
        "engine.quantization": (cfg.engine.quantization, "off"),
        "rollout.quantization": (cfg.rollout.quantization or "off", "off"),
        "base.indexer_warmup": (cfg.base.indexer_warmup, 0),
        "sft.indexer_warmup": (cfg.sft.indexer_warmup, 0),
    }
    for domain, own in cfg.specialist.settings.items():
        warmup = own.get("sft", {}).get("indexer_warmup", 0)
        given[f"specialist.settings.{domain}.sft.indexer_warmup"] = warmup, 0
    return given
