"""GRPO for one specialist, as V3.2 and V4 state it (post-training notes 2.3).

Each rollout phase: sample G answers to each of P prompts with the current weights, score them, centre
the rewards in each group, take at least two optimiser steps on the kept samples, publish.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from consilience.grpo.advantage import Advantages, group_advantages
from consilience.grpo.loss import combine, grpo_loss, shares
from consilience.model.forward_trace import Trace
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Sampler, publish, sample_phase
from consilience.rollout.records import FinishReason, RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.training.engine import TrainEngine
from consilience.training.forward import hidden_at_loss, mtp_loss
from consilience.training.metrics import MetricsSink, RolloutRow
from consilience.training.packing import PackedRows, pack_episodes, split_micro_batches
from consilience.training.progress import Progress
from consilience.training.schedule import warmup_constant_cosine
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock


@dataclass(frozen=True)
class GrpoSettings:
    """steps = rollout phases; mini_batches = optimiser steps a phase; see conf/schema.py for the rest."""

    steps: int
    mini_batches: int = 2
    clip_epsilon: float = 0.2
    kl_beta: float = 1e-3
    mask_delta: float = 0.1
    mtp_weight: float = 0.1
    temperature: float = 1.0
    row_tokens: int = 512
    micro_tokens: int = 8192
    warmup: int = 2
    table_rows: int = 32
    seed: int = 0


def train_grpo(
    engine: TrainEngine,
    reference: Any,
    sampler: Sampler,
    jobs_of: Callable[[int], list[RolloutJob]],
    settings: GrpoSettings,
    *,
    store: RolloutStore,
    decode: Callable[[Sequence[int]], str],
    checkpoints: StageCheckpoints,
    log: MetricsSink,
    clock: StageClock,
    progress: Progress,
    start: int = 0,
) -> dict[str, Any]:
    """Run the phases from `start`; returns the stage's curves and counters.

    A phase whose rollouts are already in `store` (the run was cut short after sampling) is trained on
    those: the sampler's work is neither lost nor done twice. EngineError stops the run before a
    parameter changes.
    """
    curves: dict[str, list[float]] = {}
    mismatch_max = 0.0
    store.ledger.resumed(start)
    version = publish(sampler, engine.model, start)
    for step in range(start, settings.steps):
        with clock.phase("rollout"):
            records = sample_phase(store, step, sampler, jobs_of)
        clock.add_tokens("sampled", sum(r.num_sampled for r in records))
        advantages = group_advantages([r.reward for r in records], [r.group for r in records])
        with clock.phase("train"):
            report = train_phase(engine, reference, records, advantages, settings, step)
        store.ledger.trained(step, [r.uid for r in records])
        clock.add_tokens("train", int(report["train_tokens"]))
        with clock.phase("publish"):
            version = publish(sampler, engine.model, version + 1)
        report |= rollout_report(records, advantages) | store.health
        mismatch_max = max(mismatch_max, report["mismatch_max"])
        log.scalars(step + 1, report)
        log.rollouts(step + 1, rollout_rows(records, advantages, decode, settings.table_rows))
        for name in ("reward", "clip_share", "mean_abs_log_ratio", "masked_share", "correct"):
            curves.setdefault(name, []).append(report.get(name, float("nan")))
        progress.advance(1, reward=report["reward"], correct=report["correct"])
        checkpoints.save_if_due(step + 1, {"clock": clock.state()})
    store.ledger.check()
    tokens = clock.state()["tokens"]
    return {
        "train_tokens": tokens.get("train", 0),
        "sampled_tokens": tokens.get("sampled", 0),
        "mismatch_max": mismatch_max,
        "curves": curves,
    }


def train_phase(
    engine: TrainEngine,
    reference: Any,
    records: Sequence[RolloutRecord],
    advantages: Advantages,
    settings: GrpoSettings,
    step: int,
) -> dict[str, float]:
    """All optimiser steps of one phase. The kept samples are shuffled and cut into mini-batches."""
    kept = np.flatnonzero(advantages.is_kept)
    report: dict[str, float] = {"train_tokens": 0.0, "mismatch_max": 0.0, "grad_norm": float("nan")}
    if not kept.size:
        return report | dict.fromkeys(("clip_share", "mean_abs_log_ratio", "masked_share", "mean_kl"), 0.0)
    order = np.random.default_rng((settings.seed, step)).permutation(kept)
    sums: dict[str, float] = {}
    for index, members in enumerate(np.array_split(order, settings.mini_batches)):
        if not members.size:
            continue
        packed = pack_records(
            [records[i] for i in members],
            [float(advantages.advantage[i]) for i in members],
            settings.row_tokens,
        )
        outcome = _mini_batch(engine, reference, packed, settings, len(members))
        scale = warmup_constant_cosine(
            step, num_steps=settings.steps, warmup_steps=min(settings.warmup, settings.steps)
        )
        report["train_tokens"] += packed.num_tokens
        report |= engine.step(scale, outcome.pop("expert_load"))
        if index == 0:  # the sampler's weights and these are the same here
            report["mismatch_max"] = outcome["max_abs_log_ratio"]
        sums = combine(sums, outcome) if sums else outcome
    return report | shares(sums)


def _mini_batch(
    engine: TrainEngine, reference: Any, packed: PackedRows, settings: GrpoSettings, num_samples: int
) -> dict[str, Any]:
    """Gradients of one mini-batch; returns the loss sums and the experts' load."""
    trace = Trace()
    sums: dict[str, float] = {}

    def loss_fn(model: Any, micro: PackedRows):
        nonlocal sums
        with torch.no_grad():
            there = hidden_at_loss(reference, micro)
            ref = linear_logprob(
                there.hidden, reference.head.weight, there.target_ids, temperature=settings.temperature
            ).logprob  # type: ignore[union-attr, arg-type]
        at = hidden_at_loss(model, micro, trace, wants_mtp=settings.mtp_weight > 0, is_detached=True)
        logprob = linear_logprob(
            at.hidden, model.head.weight, at.target_ids, temperature=settings.temperature
        ).logprob
        out = grpo_loss(
            logprob,
            at.arrays["old_logprob"],
            ref,
            at.arrays["advantage"],
            at.sample_index,
            num_samples,
            clip_eps=settings.clip_epsilon,
            kl_beta=settings.kl_beta,
            mask_delta=settings.mask_delta,
        )
        sums = combine(sums, out.sums) if sums else dict(out.sums)
        if not at.ahead:
            return out.loss, {}
        # The blocks follow the trunk: its own samples are their targets, and nothing else learns from it.
        ahead = mtp_loss(at, model.head.weight.detach(), settings.temperature)
        sums = combine(sums, {"mtp_loss": float(ahead.detach())})
        return out.loss + settings.mtp_weight * ahead / packed.num_loss_tokens, {}

    # A row widened for a long episode is a micro-batch of its own.
    budget = max(settings.micro_tokens, packed.token_ids.shape[1])
    engine.forward_backward(loss_fn, split_micro_batches(packed, budget), {})
    return sums | {"expert_load": trace.expert_load}


def pack_records(
    records: Sequence[RolloutRecord], advantages: Sequence[float], row_tokens: int
) -> PackedRows:
    """Prompt and episode of each record as one sample; sampler log-probs and advantage per target."""
    return pack_episodes(
        [r.prompt_ids for r in records],
        [r.token_ids for r in records],
        [r.loss_mask for r in records],
        row_tokens,
        {
            "old_logprob": [r.logprobs for r in records],
            "advantage": [[a] * len(r.token_ids) for a, r in zip(advantages, records)],
        },
    )


def rollout_report(records: Sequence[RolloutRecord], advantages: Advantages) -> dict[str, float]:
    """Reward, correctness, lengths and what was dropped, over one phase."""
    scored = [(r.reward, r.reward_parts.get("correct", r.reward)) for r in records if r.reward is not None]
    reward, correct = np.mean(scored, axis=0) if scored else (float("nan"), float("nan"))
    return {
        "reward": float(reward),
        "correct": float(correct),
        "length": float(np.mean([r.num_sampled for r in records])),
        "truncated_share": float(np.mean([r.finish is FinishReason.LENGTH for r in records])),
        "malformed_share": float(np.mean([r.finish is FinishReason.MALFORMED for r in records])),
        "failed": float(len(records) - len(scored)),
        "groups": float(advantages.num_groups),
        "groups_without_signal": float(advantages.num_without_signal),
        "kept_samples": float(advantages.num_kept),
    }


def spread(items: Sequence[Any], num: int) -> list[Any]:
    """At most `num` of the items, evenly spaced, the first among them."""
    return list(items[:: -(-len(items) // num)]) if num and items else []


def rollout_rows(
    records: Sequence[RolloutRecord],
    advantages: Advantages,
    decode: Callable[[Sequence[int]], str],
    num: int,
) -> list[RolloutRow]:
    """`num` rollouts, spread over the phase, as a person reads them."""
    return [
        RolloutRow(
            uid=r.uid,
            prompt=decode(r.prompt_ids),
            completion=decode(r.token_ids),
            reward=r.reward,
            reward_parts=r.reward_parts,
            advantage=float(advantages.advantage[i]),
        )
        for i, r in spread(list(enumerate(records)), num)
    ]
