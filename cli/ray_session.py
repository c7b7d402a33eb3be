"""What the stages of one process share: Ray and the rollout workers, started when first needed.

Stages in processes of their own have workers of their own, on the one cluster that the process which
started them opened (`share_cluster`): they attach by RAY_ADDRESS, and closing ends only what is theirs.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from consilience.cli.engines import backend_of, device_of
from consilience.cli.side_by_side import SharedWorkers
from consilience.conf.errors import ConfigError
from consilience.conf.rules import sampler_quantization
from consilience.conf.schema import Config
from consilience.conf.schema_training import DistillConfig, GrpoConfig
from consilience.model.config import ModelConfig
from consilience.model.dense import DenseConfig, is_dense
from consilience.rollout import deadlines
from consilience.rollout.deadlines import STALLS, StallLog
from consilience.rollout.ray_cluster import RayCluster, start_ray, stop_ray
from consilience.rollout.ray_placement import Needs, Placement, require_shared, reserve
from consilience.rollout.ray_streams import ray_streams
from consilience.rollout.ray_workers import RolloutPool
from consilience.rollout.tokenizer import Tokenizer
from consilience.sandboxes.protocol import Isolation, Limits, SandboxSpec
from consilience.tasks.domain import Domain
from consilience.tasks.registry import load_domain

_open: dict[str, Any] = {}


def sandbox_spec(cfg: Config) -> SandboxSpec:
    """The configured sandbox as the drivers take it."""
    given = cfg.sandbox
    limits = Limits(**{name: getattr(given.limits, name) for name in Limits.__dataclass_fields__})
    return SandboxSpec(
        driver=given.driver,
        min_isolation=Isolation[given.min_isolation.upper()],
        limits=limits,
        image=given.image,
        runtime=given.runtime,
        allow_insecure=given.allow_insecure,
    )


def domains_of(cfg: Config) -> dict[str, Domain]:
    """Every configured domain, loaded; `rewards.path` replaces each one's own reward."""
    loaded: dict[str, Domain] = {}
    for name, settings in cfg.task.domains.items():
        domain = load_domain(settings.to_settings(name, cfg.task.seed))
        if cfg.rewards.path is not None:
            domain.reward = cfg.rewards.path
        loaded[name] = domain
    return loaded


def stalls_path(cfg: Config) -> Path:
    """Where the run's processes note what was over its limit."""
    return Path(cfg.run.folder) / cfg.run.name / STALLS


def vllm_updates(cfg: Config) -> Path:
    """Where vLLM's workers note what they found of each update: a line each."""
    return (Path(cfg.run.folder) / cfg.run.name / "vllm_updates.jsonl").resolve()


def worker_limits(cfg: Config) -> deadlines.Limits:
    """How long an episode's threads may take; grading follows the limit of one score.

    A reward process that was killed is started anew, which is what the rest of a sample's share is for.
    """
    return deadlines.Limits(
        tool_s=cfg.rollout.tool_limit_s,
        lease_s=cfg.rollout.lease_limit_s,
        grade_sample_s=cfg.rewards.timeout_s + 30.0,
        pause_s=cfg.rollout.pause_limit_s,
    )


def worker_share(num_workers: int, slots: int) -> int:
    """Workers of one of `slots` stages that sample side by side."""
    return max(1, num_workers // slots)


def rollout_pool(
    cfg: Config,
    model: ModelConfig | DenseConfig,
    tokenizer: Path,
    domains: Mapping[str, Domain],
    family: str,
    num_workers: int | None = None,
) -> RolloutPool:
    """The workers of this process, for this model and tokenizer; built once and kept until `close`.

    family       checkpoint family whose prompts the model knows (`prompt_family`)
    num_workers  None: rollout.num_workers
    ConfigError if the engine cannot serve the model.
    """
    num_workers = num_workers or cfg.rollout.num_workers
    if cfg.rollout.engine == "native" and is_dense(row := model.to_json_dict()):
        raise ConfigError(
            f"rollout.engine=native samples from V4, and this is a model of type {row['model_type']}; "
            "set rollout.engine=vllm"
        )
    kwargs = {
        "model": model.to_json_dict(),
        "tokenizer_path": str(tokenizer.resolve()),
        "family": family,
        "max_rows": cfg.rollout.max_batch,
        "max_length": cfg.rollout.max_length,
        "speculative": cfg.rollout.speculative,
        "prefixes": _prefixes(cfg),
        "records_routing": cfg.grpo.replay_routing,
        "exact": cfg.engine.exact,
        "engine": cfg.rollout.engine,
        "vllm": _vllm_arguments(cfg),
        "quantization": sampler_quantization(cfg),
        "sandbox": sandbox_spec(cfg),
        "warm": cfg.sandbox.warm,
        "gradings_per_box": cfg.sandbox.gradings_per_box,
        "log_folder": cfg.sandbox.log_folder and str(Path(cfg.sandbox.log_folder).expanduser().absolute()),
        "rewards": tuple(sorted({(d.reward, d.needs_sandbox) for d in domains.values() if d.reward})),
        "reward_timeout_s": cfg.rewards.timeout_s,
        "reward_processes": cfg.rewards.num_processes,
        "needs_boxes": any(d.max_turns > 1 for d in domains.values()),
        "limits": worker_limits(cfg),
        "device": "cuda" if cfg.cluster.worker_gpus else "cpu",
    }
    # Every checkpoint folder has its own copy of the tokenizer; workers are kept while it is the same one.
    same = kwargs | {"tokenizer_path": Tokenizer.load(tokenizer).digest}
    rollout = cfg.rollout
    limits = {
        "num_threads": rollout.threads_per_worker,
        "stall_s": rollout.stall_s,
        "publish_limit_s": rollout.publish_limit_s,
        "most_redispatches": rollout.most_redispatches,
        "pause_s": rollout.pause_limit_s,
        "transport": rollout.transport,
        "is_continuous": {cfg.grpo.mode, cfg.distill.mode} != {"sync"},
        "python": rollout.vllm.python if rollout.engine == "vllm" else None,
        "num_gpus": cfg.cluster.worker_gpus,
    }
    stalls = stalls_path(cfg)
    wanted = (num_workers, limits, stalls, same)
    if _open.get("wanted") != wanted:
        close_pool()
        _cluster(cfg, _cores(cfg))
        place = placement_of(cfg, samples=True)
        seats = place.workers if place else ()
        factory = "consilience.cli.worker_factory:build_worker"
        _open["pool"] = RolloutPool(
            num_workers, factory, kwargs, **limits, seats=seats, stalls=StallLog(stalls)
        )
        require_shared(stalls.parent, _open["pool"].nodes)
        _open["wanted"] = wanted
    return _open["pool"]


@contextmanager
def ahead(
    pool: RolloutPool | None, given: GrpoConfig | DistillConfig
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What a stage whose `mode` is not sync samples with, and how far ahead: max_age, is_whole.

    pool  None on ranks that do not sample
    """
    is_whole = given.mode == "one_step_off"
    how = {"max_age": 1 if is_whole else given.max_age, "is_whole": is_whole}
    if pool is None:
        yield None, how
        return
    with ray_streams(pool, recompute=given.state_on_publish == "recompute") as streams:
        yield streams, how


def _prefixes(cfg: Config) -> dict[str, Any] | None:
    """Fields of a `PrefixCaching`, its folder absolute: workers have folders of their own. None: off."""
    settings = dataclasses.asdict(cfg.rollout.prefix_store)
    path = settings.pop("path")
    return None if path is None else {"folder": str(Path(path).resolve()), **settings}


def _vllm_arguments(cfg: Config) -> dict[str, Any]:
    """What `vllm_launch.launch` takes of the configuration."""
    vllm = cfg.rollout.vllm
    return {
        "checkpoint": vllm.checkpoint and str(Path(vllm.checkpoint).resolve()),
        "max_mismatch": vllm.max_mismatch,
        "settings": vllm.settings,
        "record": str(vllm_updates(cfg)),
    }


def placement_of(cfg: Config, *, samples: bool) -> Placement | None:
    """The places of the run's roles on the cluster, None where `cluster.placement` is free.

    Reserved at the first call and kept for all stages of this process that need the same; `samples` says
    whether rollout workers are among them. ConfigError or EngineError where the cluster cannot hold them, or
    its GPUs differ.
    """
    if cfg.cluster.placement == "free":
        return None
    needs, (known, place) = _needs(cfg), _open.get("placement", (None, None))
    trainer = dataclasses.replace(needs, workers=0)
    same = known is not None and dataclasses.replace(known, workers=0) == trainer
    if same and (known == needs or not samples) and place.wait(cfg.cluster.placement_limit_s):
        return place
    close_pool()
    _release()
    _cluster(cfg, _cores(cfg))
    needs = needs if samples else trainer
    is_colocated, given = cfg.cluster.placement == "colocated", cfg.cluster
    place = reserve(needs, is_colocated=is_colocated, spread=given.spread, limit_s=given.placement_limit_s)
    _open["placement"] = needs, place
    if needs.rank_gpus:
        kinds = place.gpu_kinds()
        backend_of(cfg, len(kinds), kinds)
        if (gpu := place.driver_gpu()) is not None:
            torch.cuda.set_device(gpu)
    return place


def _needs(cfg: Config) -> Needs:
    cluster, rollout = cfg.cluster, cfg.rollout
    return Needs(
        ranks=cfg.engine.ranks,
        rank_cores=cluster.trainer_cores,
        rank_gpus=int(device_of(cfg).type == "cuda"),
        workers=rollout.num_workers,
        worker_cores=rollout.threads_per_worker + cluster.sandbox_cores,
        worker_gpus=cluster.worker_gpus,
    )


def _release() -> None:
    """Give the reserved places back."""
    place: Placement | None = _open.pop("placement", (None, None))[1]
    if place is not None:
        place.release()


def close_pool() -> None:
    """End the workers and their boxes; the cluster stays."""
    pool: RolloutPool | None = _open.pop("pool", None)
    _open.pop("wanted", None)
    if pool is not None:
        pool.close()


def close_session() -> None:
    """End workers and the cluster this process started. Safe to call twice."""
    close_pool()
    _release()
    cluster: RayCluster | None = _open.pop("cluster", None)
    if cluster is not None:
        stop_ray(cluster)


def share_cluster(cfgs: Sequence[Config], slots: int) -> SharedWorkers:
    """Open the cluster for up to `slots` stages in processes of their own; this one's workers end.

    A cluster that this process starts has room for all of them. One that it attaches to may have less;
    its cores then say how many stages sample at once, at least one.
    """
    close_pool()
    cores = max(_cores(cfg) for cfg in cfgs)
    _cluster(cfgs[0], slots * cores)
    environment = {}
    if _open["cluster"].is_ours:
        environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    return SharedWorkers(environment, max(1, int(ray.cluster_resources().get("CPU", 0) // cores)))


def _cores(cfg: Config) -> int:
    """What one stage takes of the cluster."""
    if cfg.cluster.placement == "free":
        return cfg.rollout.num_workers * cfg.rollout.threads_per_worker
    needs = _needs(cfg)
    return needs.ranks * needs.rank_cores + needs.workers * needs.worker_cores


def _cluster(cfg: Config, cores: int) -> None:
    if "cluster" in _open:
        return
    given = cfg.cluster.address
    if given is not None and (given != "auto" or not os.environ.get("RAY_ADDRESS")):
        os.environ["RAY_ADDRESS"] = given
    # Workers decode while the trainer waits, so they may take every core.
    _open["cluster"] = start_ray(
        max(cfg.cluster.num_cpus or 0, cores),
        object_store_bytes=cfg.cluster.object_store_bytes,
        dashboard_port=cfg.cluster.dashboard_port if cfg.cluster.dashboard else None,
    )
    atexit.register(close_session)
