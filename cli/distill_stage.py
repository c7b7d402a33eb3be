"""The stage that distils all specialists into one student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from consilience.cli.jobs import fresh_problems, rollout_jobs
from consilience.cli.prove import prove_start
from consilience.cli.ray_session import ahead, domains_of, rollout_pool
from consilience.cli.stage import StageContext
from consilience.cli.teacher_loading import arithmetic, teacher_loader, uses_vllm
from consilience.cli.training_stage import (
    device_of,
    health_of,
    micro_tokens,
    open_stage,
    ranks_of,
    result_of,
    rollout_store,
    shared,
    sleep_level,
    start_from,
    while_sampling,
)
from consilience.conf.schema import Config
from consilience.conf.schema_training import GuardConfig
from consilience.distill.guards import ADVICE, GuardSettings, length_share
from consilience.distill.objectives import Objective
from consilience.distill.replay import STATES, replay_phases
from consilience.distill.reward_term import RewardSettings
from consilience.distill.train import DistillSettings, TeacherSide, train_distill
from consilience.model.checkpoint import to_official
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.sleeping import SleepingSampler
from consilience.rollout.store import RolloutStore
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.domain import Domain
from consilience.teachers.admission import admit, check_loaded
from consilience.teachers.heads import HeadCache
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import load_checkpoint
from consilience.training.metrics import read_metrics, surviving

REFERENCE = "reference"
"""Name of the student's own start among the teachers."""


def run_distill(context: StageContext) -> Mapping[str, Any]:
    """All specialists into one student that starts from the base."""
    cfg, settings, ranks = context.cfg, context.cfg.distill, ranks_of(context)
    domains = domains_of(cfg)
    start = start_from(context, settings.init, "base", domains.values())
    tokenizer = Tokenizer.load(start.tokenizer)
    registry = teacher_registry(context, start.folder)
    for record in registry:
        admit(start.folder, record.checkpoint, record.name)
    pool: Any = None
    if ranks.is_first:
        pool = rollout_pool(cfg, start.model.config, start.tokenizer, domains, start.family)
    hidden = HiddenStore(
        context.folder.path / STATES,
        budget_bytes=settings.store_bytes,
        keeps=settings.keep_states,
        also=[Path(settings.replay) / STATES] if settings.replay else [],
        is_reader=not ranks.is_first,
    )
    heads = HeadCache(device_of(cfg))
    scheduler = TeacherScheduler(
        registry,
        teacher_loader(cfg),
        hidden,
        may_load=settings.replay is None,
        check=check_loaded,
        most_scorers=1 if uses_vllm(cfg) else None,  # a vLLM process would take the first GPU for every rank
        arithmetic=arithmetic(cfg),
    )
    side = TeacherSide(registry, scheduler, hidden, heads)
    schedule = DistillSettings(
        steps=settings.steps,
        mini_batches=settings.mini_batches,
        chunk_tokens=settings.chunk_tokens,
        objective=Objective(settings.objective, settings.top_k, settings.support, settings.beta),
        normalisation=settings.normalisation,
        balance=settings.balance,
        mtp_weight=settings.mtp_weight,
        row_tokens=settings.row_tokens,
        micro_tokens=micro_tokens(cfg, settings.row_tokens),
        warmup=settings.warmup,
        decay_steps=settings.steps // 2,
        final_scale=settings.decay,
        table_rows=cfg.log.table_rows,
        seed=cfg.run.seed,
        guard=guard_settings(settings.guard, tokenizer.eos_id),
        reward=RewardSettings(settings.reward_weight, settings.clip_epsilon, settings.temperature),
    )
    with open_stage(context, start, settings.lr) as parts:
        context.progress.start(context.name, settings.steps, "phase")
        context.progress.advance(parts["start"])
        store = rollout_store(context)
        if ranks.is_first and settings.replay:
            replay_phases(Path(settings.replay), store, settings.steps)
        proven = prove_start(context, pool, parts["engine"], parts["start"], store)
        turns = pool if (level := sleep_level(cfg)) is None else SleepingSampler(pool, level)
        with nullcontext((turns, {})) if settings.mode == "sync" else ahead(pool, settings) as (sampler, how):
            result = train_distill(
                parts["engine"],
                sampler,
                lambda step: distill_jobs(cfg, domains, registry, step),
                side,
                schedule,
                store=store,
                decode=tokenizer.decode,
                earlier=parts["cursor"].get("rows", ()),
                while_sampling=while_sampling(cfg, parts["engine"]),
                **shared(parts),
                **how,
            )
        cursor = {"clock": parts["clock"].state(), "rows": result["rows"]}
        folder = parts["checkpoints"].save(settings.steps, cursor)
    if not ranks.is_first:
        return {}
    counted = {key: result[key] for key in ("train_tokens", "sampled_tokens", "kl", "head_loads")}
    return result_of(context, parts, folder, counted) | {
        "health": health_of(context) | guard_health(context),
        "self_kl": _self_kl(folder, store, settings.row_tokens),
        **proven,
    }


def teacher_registry(context: StageContext, start: Path | None = None) -> TeacherRegistry:
    """The configured teachers; without any, the run's own specialists, one a domain.

    With `distill.guard.reference_weight` the student's `start` is one more teacher of every domain.
    """
    cfg, weight = context.cfg, context.cfg.distill.guard.reference_weight

    def specialist(domain: str) -> Path:
        return context.run.path / context.inputs[f"grpo/{domain}"]["checkpoint"]

    if given := cfg.teachers.registry:
        records = [
            TeacherRecord(
                name,
                Path(t.checkpoint) if t.checkpoint else specialist(t.domains[0]),
                tuple(t.domains),
                t.weight,
            )
            for name, t in given.items()
        ]
    else:
        records = [TeacherRecord(d, specialist(d), (d,), 1.0) for d in cfg.task.domains]
    if weight and start is not None:
        records.append(TeacherRecord(REFERENCE, start, tuple(cfg.task.domains), weight))
    return TeacherRegistry(records, cfg.teachers.shared or weight > 0)


def guard_settings(given: GuardConfig, eos: int) -> GuardSettings:
    """What `distill/guards.py` takes of the configuration."""
    names = [f.name for f in fields(GuardSettings) if f.name != "eos"]
    return GuardSettings(**{name: getattr(given, name) for name in names}, eos=eos)


def guard_health(context: StageContext) -> dict[str, float]:
    """Phases of the stage in which each failure was seen, and samples that were masked."""
    rows = surviving(read_metrics(context.folder.metrics))
    names = (*(f"guard_{name}" for name in ADVICE), "masked_repeated", "masked_bad_states")
    return {name: sum(row.get(name) or 0.0 for row in rows) for name in names}


def distill_jobs(cfg: Config, domains: Mapping[str, Domain], registry: TeacherRegistry, step: int) -> list:
    """One phase's prompts by the domains' shares, each with its owner teacher; long episodes first."""
    settings = cfg.distill
    jobs = []
    for name, share in split_prompts(settings.prompts_per_step, list(domains), settings.shares).items():
        jobs += rollout_jobs(
            domains[name],
            fresh_problems(cfg, domains[name], share, step),
            prefix=f"distill/{step}/{name}",
            samples=settings.samples_per_prompt,
            temperature=settings.temperature,
            run_seed=cfg.run.seed,
            teacher=registry.names(name),
            is_graded=settings.reward_weight > 0,
        )
    share = length_share(step, guard_settings(settings.guard, 0))
    jobs = [shortened(job, share) for job in jobs] if share < 1 else jobs
    return sorted(jobs, key=lambda job: -job.max_tokens)


def shortened(job: RolloutJob, share: float) -> RolloutJob:
    """A job whose samples may have a share of their full length."""
    limit = max(1, round(share * job.max_tokens))
    return replace(job, max_tokens=limit, sampling=replace(job.sampling, max_tokens=limit))


def split_prompts(num: int, domains: Sequence[str], shares: Mapping[str, float]) -> dict[str, int]:
    """`num` prompts over the domains by relative share, largest remainders first; zeros left out."""
    weights = {name: shares.get(name, 1.0) for name in domains}
    exact = {name: num * weight / sum(weights.values()) for name, weight in weights.items()}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(domains, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: num - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def _self_kl(checkpoint: Path, store: RolloutStore, row_tokens: int) -> float:
    """Mean KL of the finished student to itself as a teacher, through the stored-state path."""
    from consilience.distill.loss import distill_loss
    from consilience.distill.samples import pack_records, score_request
    from consilience.training.forward import hidden_at_loss, sample_order

    records = [r for r in store.read(store.phases()[-1]) if r.num_sampled][:32]
    teacher = load_model_teacher(TeacherRecord("self", checkpoint, (), 1.0))
    requests = [score_request(r) for r in records]
    states = teacher.score([r.token_ids for r in requests], [r.positions for r in requests])
    model, _ = load_checkpoint(checkpoint, verify=False)
    with torch.no_grad():
        at = hidden_at_loss(model, pack_records(records, row_tokens))
        target = torch.cat([states[s] for s in sample_order(at)])
        out = distill_loss(
            at.hidden,
            to_official(model)["head.weight"],  # type: ignore[arg-type]
            target,
            teacher.head(),
            at.weight,
        )
    return abs(out.sums["kl"]) / out.sums["tokens"]
