"""GRPO for one specialist, as V3.2 and V4 state it (post-training notes 2.3).

Each rollout phase: sample G answers to each of P prompts with the current weights, score them, centre
the rewards in each group, take at least two optimiser steps on the kept samples, publish. `async_train.py`
samples ahead of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from consilience.grpo.advantage import Advantages, group_advantages
from consilience.grpo.corrections import Corrections
from consilience.grpo.loss import combine, grpo_loss, shares, summed
from consilience.grpo.mini_batch import MiniBatch, micro_batches, with_proximal
from consilience.grpo.mismatch import mismatch_report
from consilience.model.context_parallel import context_ranks
from consilience.model.forward_trace import Trace
from consilience.rollout.ahead import staleness
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Sampler, publish, sample_phase
from consilience.rollout.records import FinishReason, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.training.engine import TrainEngine, official_weights
from consilience.training.forward import hidden_at_loss, mtp_loss
from consilience.training.metrics import MetricsSink, RolloutRow
from consilience.training.packing import PackedRows
from consilience.training.progress import Progress
from consilience.training.schedule import warmup_constant_cosine
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock

SHOWN_TOKENS = 4096  # of a prompt or an episode, in the table of samples


@dataclass(frozen=True)
class GrpoSettings:
    """steps = rollout phases; mini_batches = optimiser steps a phase; normalisation: what counts as one in
    the loss, an "episode" or each of its "turn"s; see conf/schema.py for the rest."""

    steps: int
    mini_batches: int = 2
    clip_epsilon: float = 0.2
    kl_beta: float = 1e-3
    replay_routing: bool = False
    replay_kept_sets: bool = False
    corrections: Corrections = Corrections()
    mask_delta: float = 0.1
    mtp_weight: float = 0.1
    temperature: float = 1.0
    row_tokens: int = 512
    micro_tokens: int = 8192
    warmup: int = 2
    table_rows: int = 32
    seed: int = 0
    normalisation: str = "episode"


@dataclass
class GrpoStage:
    """A GRPO stage while it runs: what a driver does with a step's records, however they were sampled.

    Of several ranks all run it; the first alone samples, publishes, and writes store, ledger and log.

    curves        name -> value of each step of this attempt
    mismatch_max  largest |log ratio| of weights that were sampler's and trainer's both; None: there were none
    while_sampling  surrounds, on every rank, what the first does alone to get a step's records
    """

    engine: TrainEngine
    reference: Any
    settings: GrpoSettings
    store: RolloutStore
    decode: Callable[[Sequence[int]], str]
    checkpoints: StageCheckpoints
    log: MetricsSink
    clock: StageClock
    progress: Progress
    curves: dict[str, list[float]] = field(default_factory=dict)
    mismatch_max: float | None = None
    while_sampling: Callable[[], AbstractContextManager[object]] = nullcontext

    def learn(self, step: int, records: Sequence[RolloutRecord]) -> dict[str, Any]:
        """All optimiser steps of one step, then its ledger entry; what there is to report of it."""
        self.clock.add_tokens("sampled", sum(r.num_sampled for r in records))
        advantages = _advantages(records)
        with self.clock.phase("train"):
            report = train_phase(self.engine, self.reference, records, advantages, self.settings, step)
        if self.engine.ranks.is_first:
            self.store.ledger.trained(step, [r.uid for r in records])
        self.clock.add_tokens("train", int(report["train_tokens"]))
        report |= rollout_report(records, advantages) | staleness(records, step)
        report |= self.store.health.pop(step, {})
        if report["age_max"] > 0:  # part of the difference is what the weights have learnt since
            report["drift_max"] = report.pop("mismatch_max")
        else:
            self.mismatch_max = max(self.mismatch_max or 0.0, report["mismatch_max"])
        return report

    def note(self, step: int, records: Sequence[RolloutRecord], report: dict[str, Any]) -> None:
        """Metrics, the table of samples, progress, and a checkpoint where one is due."""
        rows = rollout_rows(records, _advantages(records), self.decode, self.settings.table_rows)
        self.log.scalars(step + 1, report)
        self.log.rollouts(step + 1, rows)
        for name in ("reward", "clip_share", "mean_abs_log_ratio", "masked_share", "correct"):
            self.curves.setdefault(name, []).append(report.get(name, float("nan")))
        self.progress.advance(1, reward=report["reward"], correct=report["correct"])
        self.checkpoints.save_if_due(step + 1, {"clock": self.clock.state()})

    def summary(self) -> dict[str, Any]:
        """The stage's curves and counters. RunError unless all that was issued has been trained on."""
        if self.engine.ranks.is_first:
            self.store.ledger.check()
        tokens = self.clock.state()["tokens"]
        return {
            "train_tokens": tokens.get("train", 0),
            "sampled_tokens": tokens.get("sampled", 0),
            "mismatch_max": self.mismatch_max,
            "curves": self.curves,
        }


def train_grpo(
    stage: GrpoStage, sampler: Sampler, jobs_of: Callable[[int], list[RolloutJob]], *, start: int = 0
) -> dict[str, Any]:
    """Run the phases from `start`, one after the other; returns the stage's curves and counters.

    A phase whose rollouts are already in the store (the run was cut short after sampling) is trained on
    those: the sampler's work is neither lost nor done twice. EngineError stops the run before a
    parameter changes. `sampler` and `jobs_of` are the first rank's; the others may have None.
    """
    store, clock, engine = stage.store, stage.clock, stage.engine
    if engine.ranks.is_first:
        store.ledger.resumed(start)
    version = publish(sampler, official_weights(engine), start, store)
    for step in range(start, stage.settings.steps):
        with clock.phase("rollout"), stage.while_sampling():
            records = engine.ranks.first(sample_phase, store, step, sampler, jobs_of)
        report = stage.learn(step, records)
        with clock.phase("publish"):
            version = publish(sampler, official_weights(engine), version + 1, store)
        stage.note(step, records, report)
    return stage.summary()


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
    parts = [part for part in np.array_split(order, settings.mini_batches) if part.size]

    def batch_of(part: np.ndarray) -> MiniBatch:
        return MiniBatch.of(
            [records[i] for i in part], advantages.advantage[part].tolist(), settings, engine.model
        )

    if settings.corrections.is_on:  # by the weights of now, before any step
        batches, sums = with_proximal(engine, [batch_of(part) for part in parts], settings)
        given = iter(batches)
    else:  # one at a time: its tokens are read when it is its turn
        given = (batch_of(part) for part in parts)
    for batch in given:
        outcome = _mini_batch(engine, reference, batch, settings, wants_mismatch=not sums)
        scale = warmup_constant_cosine(
            step, num_steps=settings.steps, warmup_steps=min(settings.warmup, settings.steps)
        )
        report["train_tokens"] += batch.packed.num_tokens
        report |= engine.step(scale, outcome.pop("expert_load"))
        sums = combine(sums, outcome) if sums else outcome
        del batch  # before the next mini-batch's tokens are read
    report["mismatch_max"] = sums["max_sampler_gap"]
    return report | shares(sums) | mismatch_report(sums)


def _mini_batch(
    engine: TrainEngine, reference: Any, batch: MiniBatch, settings: GrpoSettings, *, wants_mismatch: bool
) -> dict[str, Any]:
    """Gradients of one mini-batch; returns the loss sums of all ranks and the experts' load of this one.

    wants_mismatch: no step was taken since the weights were the sampler's; measure how it differs
    """
    packed, trace = batch.packed, Trace()
    sums: dict[str, float] = {}

    def loss_fn(model: Any, micro: PackedRows):
        nonlocal sums
        with torch.no_grad():
            there = hidden_at_loss(reference, micro)
            ref = batch.logprob(there, reference.head.weight, micro, settings.temperature)
        routing = batch.routing_of(micro)
        wants_mtp = settings.mtp_weight > 0
        at = hidden_at_loss(model, micro, trace, routing, wants_mtp=wants_mtp, is_detached=True)
        logprob = batch.logprob(at, model.head.weight, micro, settings.temperature)
        sampler = at.arrays["old_logprob"]
        out = grpo_loss(
            logprob,
            at.arrays.get("proximal_logprob", sampler),
            ref,
            at.arrays["advantage"],
            at.sample_index,
            batch.num_samples,
            clip_eps=settings.clip_epsilon,
            kl_beta=settings.kl_beta,
            mask_delta=settings.mask_delta,
            weight=at.arrays.get("correction"),
            sampler_logprob=sampler,
            share=at.arrays.get("share"),
        )
        if at.hidden.shape[0] or context_ranks().size > 1:  # else there is nothing to report
            sums = combine(sums, out.sums) if sums else dict(out.sums)
            if wants_mismatch:
                sums = combine(sums, batch.mismatch(logprob.detach() - sampler, micro, routing))
        if not at.ahead:
            return out.loss, {}
        # The blocks follow the trunk: its own samples are their targets, and nothing else learns from it.
        ahead = mtp_loss(at, model.head.weight.detach(), settings.temperature)
        sums = combine(sums, {"mtp_loss": float(ahead.detach())})
        return out.loss + settings.mtp_weight * ahead / max(packed.num_loss_tokens, 1), {}

    engine.forward_backward(loss_fn, micro_batches(packed, settings, engine.ranks.num_parts), {})
    return summed(engine.ranks, sums) | {"expert_load": trace.expert_load}


def rollout_report(records: Sequence[RolloutRecord], advantages: Advantages) -> dict[str, float]:
    """Reward, correctness, lengths and what was dropped, over one phase."""
    scored = [(r.reward, r.reward_parts.get("correct", r.reward)) for r in records if r.reward is not None]
    reward, correct = np.mean(scored, axis=0) if scored else (float("nan"), float("nan"))
    return {
        "reward": float(reward),
        "correct": float(correct),
        "length": _mean([r.num_sampled for r in records]),
        "truncated_share": _mean([r.finish is FinishReason.LENGTH for r in records]),
        "malformed_share": _mean([r.finish is FinishReason.MALFORMED for r in records]),
        "failed": float(len(records) - len(scored)),
        "tamper_rate": _mean([r.outcome.kind is OutcomeKind.TAMPER for r in records]),  # an alarm above 0
        "infra_rate": _mean([r.outcome.kind is OutcomeKind.INFRA for r in records]),
        "groups": float(advantages.num_groups),
        "groups_without_signal": float(advantages.num_without_signal),
        "kept_samples": float(advantages.num_kept),
    }


def _mean(values: Sequence[float]) -> float:
    """NaN of nothing: a phase whose groups were all dropped."""
    return float(np.mean(values)) if values else float("nan")


def _advantages(records: Sequence[RolloutRecord]) -> Advantages:
    return group_advantages([r.reward for r in records], [r.group for r in records])


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
            prompt=decode(r.prompt_ids[:SHOWN_TOKENS]),
            completion=decode(r.token_ids[:SHOWN_TOKENS]),
            reward=r.reward,
            reward_parts=r.reward_parts,
            advantage=float(advantages.advantage[i]),
        )
        for i, r in spread(list(enumerate(records)), num)
    ]
