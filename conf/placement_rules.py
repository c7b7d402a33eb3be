"""What must hold between settings where the roles of a run are placed on a cluster. Standard library only."""

from __future__ import annotations

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config


def check_placement(cfg: Config) -> None:
    """ConfigError on the first rule about places of roles that `cfg` breaks."""
    _check_sizes(cfg)
    _check_turns(cfg)


def _check_sizes(cfg: Config) -> None:
    cluster = cfg.cluster
    if 1 < cluster.worker_gpus != int(cluster.worker_gpus):
        raise ConfigError(
            f"cluster.worker_gpus is {cluster.worker_gpus:g}; above 1 it must be a whole number of GPUs"
        )
    if cluster.placement == "free":
        for name in ("spread", "sandbox_cores", "port"):
            if getattr(cluster, name):
                raise ConfigError(
                    f"cluster.{name} is of placed roles, and cluster.placement is free; set it to apart or "
                    "colocated"
                )
        return
    if cfg.run.parallel > 1:
        raise ConfigError(
            f"cluster.placement={cluster.placement} reserves places for one stage at a time, and "
            f"run.parallel is {cfg.run.parallel}; set run.parallel=1, or cluster.placement=free"
        )


def _check_turns(cfg: Config) -> None:
    if cfg.cluster.placement != "colocated":
        return
    if {cfg.grpo.mode, cfg.distill.mode} != {"sync"}:
        raise ConfigError(
            "cluster.placement=colocated lets trainer and workers take turns with memory, so nothing is "
            "sampled ahead; set grpo.mode and distill.mode to sync, or cluster.placement=apart"
        )
    if cfg.engine.kind != "torch":
        raise ConfigError(
            "cluster.placement=colocated moves the trainer to the host while workers sample, which is not "
            f"there for engine.kind={cfg.engine.kind}; set engine.kind=torch, or cluster.placement=apart"
        )
    if cfg.rollout.engine == "vllm" and cfg.rollout.vllm.sleep is None:
        raise ConfigError(
            "cluster.placement=colocated needs workers that give memory back, but rollout.vllm.sleep is "
            "null; set rollout.vllm.sleep=2 and rollout.vllm.settings.enable_sleep_mode=true, or "
            "cluster.placement=apart"
        )
