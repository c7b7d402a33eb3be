"""What every training stage has: engine, checkpoints, logs and clock, resumed where it was cut short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from consilience.cli.engines import build_engine, device_of
from consilience.cli.host_metrics import WithSandboxHosts
from consilience.cli.prompt_family import prompt_family
from consilience.cli.side_by_side import thread_share
from consilience.cli.stage import StageContext
from consilience.conf.rules import sampler_quantization
from consilience.conf.schema import Config, OptimizerConfig
from consilience.model.quantization import Quantization
from consilience.model.ranks import ALONE, Ranks
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.rollout.deadlines import STALLS, StallLog, Watch
from consilience.rollout.phase_health import HEALTH
from consilience.rollout.store import RolloutStore
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.domain import Domain
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, read_meta
from consilience.training.engine import is_cut
from consilience.training.metrics import FanOut, MetricsLog, MetricsSink, read_metrics, surviving
from consilience.training.offload import Offloads, offloaded
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings

TOKENIZER = "tokenizer.json"


def rollout_store(context: StageContext) -> RolloutStore:
    """The stage's records, with its run's care for power cuts."""
    is_power = context.cfg.rollout.durability == "power"
    return RolloutStore(
        context.folder.rollouts,
        survives_power=is_power,
        quantization=sampler_quantization(context.cfg),
        stalls=context.run.path / STALLS,
        log_copy=log_copy_folder(context),
    )


def log_copy_folder(context: StageContext) -> Path | None:
    """Where second copies of the stage's token logs go."""
    root = context.cfg.rollout.log_copy
    return None if root is None else Path(root).resolve() / context.cfg.run.name / context.name


def optimizer_settings(given: OptimizerConfig, lr: float) -> OptimizerSettings:
    return OptimizerSettings(
        lr=lr,
        weight_decay=given.weight_decay,
        beta1=given.betas[0],
        beta2=given.betas[1],
        eps=given.eps,
        momentum=given.muon_momentum,
        update_rms=given.update_rms,
        grad_clip=given.grad_clip,
        kind=given.kind,
    )


def ranks_of(context: StageContext) -> Ranks:
    """Who trains the stage together; of several, this process is one."""
    return context.ranks or ALONE


@dataclass(frozen=True)
class Start:
    """What a training stage begins with.

    model    without its weights where it will be cut: they are to be read from `folder`
    folder   where `tokenizer.json` lies; the checkpoint, unless the model is new
    parent   digest of the weights, None for a new model;  family  of its prompts (`prompt_family`)
    """

    model: Any
    folder: Path
    parent: str | None
    family: str

    @property
    def tokenizer(self) -> Path:
        return self.folder / TOKENIZER


def start_from(context: StageContext, init: str | None, stage: str, domains: Iterable[Domain]) -> Start:
    """The checkpoint `init`, or that of the stage before. Errors are those of its reading and its family."""
    folder = Path(init) if init else context.run.path / context.inputs[stage]["checkpoint"]
    engine = context.cfg.engine
    if engine.kind == "fsdp" or engine.expert_ranks > 1:
        from consilience.training.cut_loading import model_to_cut

        model, meta = model_to_cut(folder, ranks_of(context), reads_released=engine.expert_ranks > 1)
    else:
        model, meta = load_checkpoint(folder)
    return Start(model, folder, meta.digest, prompt_family(context.cfg, folder, meta, domains))


def reference_model(context: StageContext, start: Start) -> Any:
    """The model that a stage starts from, as a reference that learns nothing; cut where the trained is.

    Where experts are divided it has no weights yet: the engine divides it, and reads them (`divide_like`).
    """
    cfg = context.cfg
    if cfg.engine.kind == "fsdp":
        from consilience.training.cut_loading import cut_reference

        return cut_reference(start.folder, ranks_of(context), cfg.engine.quantization)
    model: Any
    if cfg.engine.expert_ranks > 1:
        from consilience.training.cut_loading import model_to_cut

        model, _ = model_to_cut(start.folder, ranks_of(context), verify=False, reads_released=True)
    else:
        model = load_checkpoint(start.folder, verify=False)[0].to(device_of(cfg))
    model.requires_grad_(False)
    model.quantize(Quantization.from_name(cfg.engine.quantization))
    return model


@contextmanager
def open_stage(context: StageContext, start: Start, lr: float):
    """Engine, checkpoints, logs and clock of a stage, resumed where it was cut short.

    Of several ranks each has an engine, and the first alone has logs.
    """
    cfg, ranks = context.cfg, ranks_of(context)
    if ranks.size > 1:
        torch.set_num_threads(thread_share(context.threads or cfg.engine.threads, ranks.size))
    elif threads := context.threads or cfg.engine.threads:
        torch.set_num_threads(threads)
    context.folder.create()
    model = start.model
    is_empty = next(model.parameters()).is_meta
    if cfg.engine.kind != "fsdp" and cfg.engine.expert_ranks == 1:  # else the engine brings this rank's part
        model.to(device_of(cfg))
    model.quantize(Quantization.from_name(cfg.engine.quantization))
    set_recompute(model, recompute_policy(cfg.engine.recompute))
    settings = replace(
        optimizer_settings(cfg.optimizer, lr),
        is_sharded=cfg.engine.shard_state,
        has_bf16_exchange=cfg.engine.bf16_exchange,
    )
    engine = build_engine(cfg, model, settings, ranks)
    if is_empty:
        assert is_cut(engine)
        engine.read_weights(start.folder)
    tokenizer = Tokenizer.load(start.tokenizer)
    meta = CheckpointMeta(
        stage=context.name,
        seed=cfg.run.seed,
        step=0,
        special_tokens=dict(tokenizer.special_ids),
        domain=context.domain,
        parent=start.parent,
        family=start.family,
    )
    checkpoints = StageCheckpoints(
        context.folder.checkpoints, engine, start.tokenizer, meta, every_s=cfg.engine.checkpoint_s
    )
    first, cursor = checkpoints.resume()
    ranks.barrier()  # all have read it before the first writes another
    log, watch = _open_logs(context, lr, first) if ranks.is_first else (FanOut([]), None)
    parts = {
        "engine": engine,
        "checkpoints": checkpoints,
        "log": log,
        "clock": StageClock(earlier=cursor.get("clock"), on_phase=watch.begin if watch else _unwatched),
        "progress": context.progress,
        "start": first,
        "cursor": cursor,
    }
    try:
        yield parts
    finally:
        log.finish()
        if watch is not None:
            watch.close()
        context.progress.finish()


def _open_logs(context: StageContext, lr: float, first: int) -> tuple[MetricsSink, Watch]:
    """Where the stage's numbers go, rows after step `first` cut off, and who watches its phases."""
    from consilience.training.wandb_sink import WandbSink

    cfg = context.cfg
    sinks = [
        MetricsLog(context.folder.metrics, resume_step=first),
        WandbSink(
            context.run.path,
            mode=cfg.log.wandb,
            project=cfg.log.project,
            name=f"{cfg.run.name}/{context.name}",
            group=cfg.run.name,
            config={"stage": context.name, "seed": cfg.run.seed, "lr": lr},
        ),
    ]
    watch = Watch(f"stage {context.name}", cfg.run.phase_limit_s, StallLog(context.run.path / STALLS))
    watch.begin("start")
    return WithSandboxHosts(FanOut(sinks)), watch


def _unwatched(phase: str) -> None:
    """The first rank alone is watched; who keeps it waiting is known to `rank_processes`."""


def sleep_level(cfg: Config) -> int | None:
    """How deep workers sleep while the trainer learns; None: they stay awake."""
    level = cfg.rollout.vllm.sleep if cfg.rollout.engine == "vllm" else None
    return 1 if level is None and cfg.cluster.placement == "colocated" else level


def while_sampling(cfg: Config, *trainer: Offloads) -> Callable[[], AbstractContextManager[None]]:
    """What surrounds sampling on every rank: colocated, the trainer's memory is the workers'."""
    return partial(offloaded, trainer) if cfg.cluster.placement == "colocated" else nullcontext


def shared(parts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: parts[name] for name in ("checkpoints", "log", "clock", "progress", "start")}


def result_of(
    context: StageContext, parts: Mapping[str, Any], folder: Path, counted: Mapping[str, Any]
) -> dict[str, Any]:
    """What every training stage leaves: its checkpoint, its counts, where its time went."""
    meta = read_meta(folder)
    return {
        "checkpoint": str(folder.relative_to(context.run.path)),
        "digest": meta.digest,
        "family": meta.family,
        "time": parts["clock"].report({"train": "train", "sampled": "rollout"}),
        **counted,
    }


def own_domain(context: StageContext) -> str:
    assert context.domain is not None
    return context.domain


def micro_tokens(cfg: Config, row_tokens: int) -> int:
    return cfg.engine.micro_batch_rows * row_tokens


def health_of(context: StageContext) -> dict[str, float]:
    """What went wrong in the stage's rollouts and was mended: sums over its steps."""
    rows = surviving(read_metrics(context.folder.metrics))
    return {name: sum(row.get(name) or 0.0 for row in rows) for name in HEALTH}


def curves_of(context: StageContext, titles: Mapping[str, str]) -> dict[str, Any]:
    """Chart title -> {stage: [[step, …], [value, …]]} from the stage's metrics.jsonl."""
    rows = surviving(read_metrics(context.folder.metrics))
    return {
        title: {context.name: [[r["step"] for r in rows], [r.get(key) for r in rows]]}
        for title, key in titles.items()
    }
