"""The stage that makes a specialist by GRPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from consilience.cli.jobs import fresh_problems, rollout_jobs
from consilience.cli.prove import prove_start
from consilience.cli.ray_session import ahead, domains_of, rollout_pool, worker_share
from consilience.cli.stage import StageContext
from consilience.cli.training_stage import (
    curves_of,
    health_of,
    micro_tokens,
    open_stage,
    own_domain,
    ranks_of,
    reference_model,
    result_of,
    rollout_store,
    shared,
    sleep_level,
    start_from,
    while_sampling,
)
from consilience.conf.schema_training import GrpoConfig
from consilience.grpo.async_train import train_grpo_ahead
from consilience.grpo.corrections import Corrections
from consilience.grpo.train import GrpoSettings, GrpoStage, train_grpo
from consilience.rollout.records import RolloutRecord
from consilience.rollout.sleeping import SleepingSampler
from consilience.rollout.tokenizer import Tokenizer
from consilience.training.expert_engine import divide_like
from consilience.training.metrics import read_metrics
from consilience.training.offload import OffloadedModels

CURVES = {
    "GRPO: correct on training prompts": "correct",
    "GRPO: clip share": "clip_share",
    "GRPO: mean |log ratio|": "mean_abs_log_ratio",
    "GRPO: masked share": "masked_share",
}
"""Chart title -> name in metrics.jsonl."""

CORRECTIONS = [field.name for field in fields(Corrections)]


def run_grpo(context: StageContext) -> Mapping[str, Any]:
    """One specialist by GRPO from its SFT checkpoint, which is also the reference."""
    cfg, settings, ranks = context.cfg, context.cfg.grpo, ranks_of(context)
    name = own_domain(context)
    domains, num_workers = domains_of(cfg), None
    if context.threads is not None:  # beside others: workers of its own, for its own domain
        domains = {name: domains[name]}
        num_workers = worker_share(cfg.rollout.num_workers, cfg.run.parallel)
    start = start_from(context, settings.init, f"sft/{name}", domains.values())
    reference = reference_model(context, start)
    tokenizer = Tokenizer.load(start.tokenizer)
    pool: Any = None
    if ranks.is_first:
        pool = rollout_pool(cfg, start.model.config, start.tokenizer, domains, start.family, num_workers)

    def jobs_of(step: int):
        problems = fresh_problems(cfg, domains[name], settings.prompts_per_step, step)
        return rollout_jobs(
            domains[name],
            problems,
            prefix=f"grpo-{name}/{step}",
            samples=settings.group_size,
            temperature=settings.temperature,
            run_seed=cfg.run.seed,
            cut={name: getattr(settings, name) for name in ("top_k", "top_p", "min_p")},
        )

    schedule = GrpoSettings(
        steps=settings.steps,
        mini_batches=settings.mini_batches,
        clip_epsilon=settings.clip_epsilon,
        kl_beta=settings.kl_beta,
        mask_delta=settings.mask_delta,
        replay_routing=settings.replay_routing,
        replay_kept_sets=settings.replay_kept_sets,
        corrections=Corrections(**{name: getattr(settings, name) for name in CORRECTIONS}),
        temperature=settings.temperature,
        mtp_weight=settings.mtp_weight,
        row_tokens=settings.row_tokens,
        micro_tokens=micro_tokens(cfg, settings.row_tokens),
        warmup=settings.warmup,
        normalisation=settings.normalisation,
        table_rows=cfg.log.table_rows,
        seed=cfg.run.seed,
    )
    with open_stage(context, start, settings.lr) as parts:
        divide_like(reference, parts["engine"], start.folder)
        context.progress.start(context.name, settings.steps, "phase")
        context.progress.advance(parts["start"])
        store = rollout_store(context)
        proven = prove_start(context, pool, parts["engine"], parts["start"], store)
        places = shared(parts)
        first = places.pop("start")
        aside = while_sampling(cfg, parts["engine"], OffloadedModels([reference]))
        stage = GrpoStage(
            parts["engine"], reference, schedule, store, tokenizer.decode, while_sampling=aside, **places
        )
        result = _train(stage, pool, jobs_of, settings, first, sleep_level(cfg))
        folder = parts["checkpoints"].save(settings.steps, {"clock": parts["clock"].state()})
    if not ranks.is_first:
        return {}
    counted = {key: result[key] for key in ("train_tokens", "sampled_tokens")}
    counted["mismatch_max"] = max(
        (row["mismatch_max"] for row in read_metrics(context.folder.metrics) if "mismatch_max" in row),
        default=None,
    )
    curves = curves_of(context, CURVES)
    return result_of(context, parts, folder, counted) | {
        "curves": curves,
        "checks": _acting({title: series[context.name][1] for title, series in curves.items()}),
        "sandbox": _isolation(store.read()),
        "health": health_of(context),
        **proven,
    }


def _train(
    stage: GrpoStage, pool: Any, jobs_of: Any, settings: GrpoConfig, start: int, sleep: int | None
) -> dict[str, Any]:
    """The driver that `grpo.mode` names."""
    if settings.mode == "sync":
        sampler = pool if sleep is None else SleepingSampler(pool, sleep)
        return train_grpo(stage, sampler, jobs_of, start=start)
    with ahead(pool, settings) as (streams, how):
        return train_grpo_ahead(stage, streams, jobs_of, start=start, **how)


def _acting(values: Mapping[str, Sequence[float | None]]) -> list[dict[str, Any]]:
    """Checks that ratio, clip and mask acted in some phase; `values` by chart title."""
    checks = []
    for key in ("clip share", "mean |log ratio|", "masked share"):
        largest = max((v for v in values[f"GRPO: {key}"] if v is not None), default=None)
        checks.append({"name": f"largest {key}", "value": largest, "relation": ">", "bound": 0.0})
    return checks


def _isolation(records: Any) -> dict[str, int]:
    """Isolation label -> rollouts that had it."""
    counts: dict[str, int] = {}
    for record in records:
        assert isinstance(record, RolloutRecord)
        counts[record.isolation] = counts.get(record.isolation, 0) + 1
    return counts
