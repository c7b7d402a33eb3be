"""On-policy distillation: many teachers, one student, exact reverse KL (post-training notes 6 and 7).

Each phase: the student samples; every trajectory is scored by its owner teacher, one teacher in memory at
a time, which leaves last-layer hidden states at the loss positions; mini-batches are drawn, each sorted
by teacher; the trainer rebuilds logits through that teacher's head and minimises the KL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.distill.balance import UpdateBalance, shares
from consilience.distill.guards import (
    GuardSettings,
    failures,
    full_length,
    guard_samples,
    spoken,
    token_factors,
)
from consilience.distill.loss import REVERSE_KL, distill_loss, sample_weights
from consilience.distill.minibatch import draw_minibatches, segments_by_teacher
from consilience.distill.objectives import Objective
from consilience.distill.parts import PhaseScores
from consilience.distill.reward_term import RewardSettings, RewardTerm
from consilience.distill.samples import by_teacher, own_spans, pack_records, training_samples, without
from consilience.distill.tally import Tally
from consilience.distill.token_watch import TokenWatch
from consilience.model.forward_trace import Trace
from consilience.rollout.ahead import PhasesAhead, PhasesElsewhere, PhasesInTurn, RolloutStreams, staleness
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import Sampler, publish
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.teachers.heads import HeadCache, HeadLoads
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.registry import TeacherRegistry
from consilience.teachers.scheduler import ScoreReport, TeacherScheduler
from consilience.teachers.store_threads import StatesAhead
from consilience.training.engine import TrainEngine, official_weights
from consilience.training.forward import hidden_at_loss, mtp_loss, sample_order
from consilience.training.metrics import MetricsSink, RolloutRow
from consilience.training.packing import PackedRows, split_micro_batches
from consilience.training.progress import Progress
from consilience.training.schedule import warmup_constant_cosine
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock

NOISE_KL = 1e-6
"""A mini-batch no token of which has a larger KL (nats) moves nothing: that is what rounding leaves between
equal models (`admission.SELF_KL_BOUND`), and optimisers that normalise would make full-size steps of it."""


@dataclass(frozen=True)
class DistillSettings:
    """steps = rollout phases; mini_batches = optimiser steps a phase; see conf/schema.py for the rest."""

    steps: int
    mini_batches: int = 2
    chunk_tokens: int = 256
    objective: Objective = REVERSE_KL
    normalisation: str = "tokens"
    balance: str = "weights"
    mtp_weight: float = 0.1
    row_tokens: int = 512
    micro_tokens: int = 8192
    warmup: int = 2
    decay_steps: int = 0
    final_scale: float = 0.1
    table_rows: int = 32
    seed: int = 0
    guard: GuardSettings = field(default_factory=GuardSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)


@dataclass(frozen=True)
class TeacherSide:
    """Everything that concerns teachers: who they are, who scores, where states and heads are kept."""

    registry: TeacherRegistry
    scheduler: TeacherScheduler
    store: HiddenStore
    heads: HeadCache


def train_distill(
    engine: TrainEngine,
    sampler: Sampler | RolloutStreams,
    jobs_of: Callable[[int], list[RolloutJob]],
    teachers: TeacherSide,
    settings: DistillSettings,
    *,
    store: RolloutStore,
    decode: Callable[[Sequence[int]], str],
    checkpoints: StageCheckpoints,
    log: MetricsSink,
    clock: StageClock,
    progress: Progress,
    start: int = 0,
    earlier: Sequence[dict[str, Any]] = (),
    max_age: int | None = None,
    is_whole: bool = False,
    while_sampling: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Any]:
    """Run the phases from `start`; `earlier` are the per-phase rows a resumed run already has.

    Phases already sampled are read from `store`, states already scored from the hidden store, so a
    killed run repeats neither. Returns kl and head_loads rows for the report, and counters.

    Of several ranks all run this, score their share, and read all states from the hidden store. The first
    alone samples, publishes, and writes store and log; the others look at neither `sampler` nor `jobs_of`.

    max_age   sample ahead through `RolloutStreams`, tokens of at most this age; None: one after the other
    while_sampling  surrounds, on every rank, what the first does alone to get a phase's records
    is_whole  publish only when nothing is being sampled (one step off, with a max_age of 1)
    """
    rows = list(earlier)
    balance = UpdateBalance({record.name: record.weight for record in teachers.registry})
    if rows and "balance" in rows[-1]:
        balance.restore(rows[-1]["balance"])
    ranks = engine.ranks
    phases: PhasesAhead | PhasesInTurn | PhasesElsewhere = PhasesElsewhere()
    if ranks.is_first:
        phases = _phases(store, sampler, jobs_of, start, settings.steps, max_age)
        store.ledger.resumed(start)
    version = publish(sampler, official_weights(engine), start, store)
    phases.admit(version)
    for step in range(start, settings.steps):
        with clock.phase("rollout"), while_sampling():
            records = ranks.first(phases.take, step)
        clock.add_tokens("sampled", sum(r.num_sampled for r in records))
        uids, age = [r.uid for r in records], staleness(records, step)
        records, seen = guard_samples(training_samples(records), settings.guard)
        with clock.phase("train"):
            batches = [[records[i] for i in chosen] for chosen in membership(len(records), settings, step)]
            scores = PhaseScores(batches, teachers.scheduler, teachers.store, ranks, clock)
            report = train_phase(engine, records, scores, teachers, settings, step, balance)
        scored = scores.report
        records, masked = without(records, scored.bad)
        if ranks.is_first:
            store.ledger.trained(step, uids)
        clock.add_tokens("train", int(report["train_tokens"]))
        if is_whole:
            with clock.phase("rollout"):
                phases.complete_all()
        with clock.phase("publish"):
            version = publish(sampler, official_weights(engine), version + 1, store)
        phases.admit(version)
        for row in rows[-1:]:
            row.pop("balance", None)  # the last row's is enough to go on from
        row = {"step": step + 1, "kl": report["kl"], "head_loads": report["head_loads"]}
        row |= {"length": full_length(seen, step, settings.guard)} if seen and not rows else {}
        rows.append(row | {"balance": balance.state()})
        by_sample = report.pop("kl_by_sample")
        flags = failures(report | seen, rows[0].get("length"), settings.guard, step)
        report |= {"teacher_loads": len(scored.loads), "reused": scored.num_reused, "parts": scores.num_parts}
        report |= {"masked_bad_states": len(masked), **seen, **flags} | age | store.health.pop(step, {})
        log.scalars(step + 1, report)
        log.rollouts(step + 1, _table(records, by_sample, decode, settings.table_rows))
        warned = {"guard": said} if (said := spoken(flags)) else {}
        progress.advance(1, **{f"kl {name}": value for name, value in report["kl"].items()}, **warned)
        checkpoints.save_if_due(step + 1, {"clock": clock.state(), "rows": rows})
    if ranks.is_first:
        store.ledger.check()
    return _result(rows, clock)


def _phases(
    store: RolloutStore,
    sampler: Any,
    jobs_of: Callable[[int], list[RolloutJob]],
    start: int,
    num_steps: int,
    max_age: int | None,
) -> PhasesAhead | PhasesInTurn:
    """Where the first rank takes its records from: sampled as they are asked for, or ahead."""
    if max_age is None:
        return PhasesInTurn(store, sampler, jobs_of)
    return PhasesAhead(store, sampler, jobs_of, start=start, num_steps=num_steps, max_age=max_age)


def _result(rows: Sequence[dict[str, Any]], clock: StageClock) -> dict[str, Any]:
    """What a stage leaves for its report: counters, the KL of each teacher and phase, head loads."""
    tokens = clock.state()["tokens"]
    kl = [(row["step"], name, value) for row in rows for name, value in row["kl"].items()]
    return {
        "train_tokens": tokens.get("train", 0),
        "sampled_tokens": tokens.get("sampled", 0),
        "kl": [{"teacher": name, "step": step, "mean": value} for step, name, value in kl],
        "head_loads": [loads for row in rows for loads in row["head_loads"]],
        "rows": list(rows),
    }


def train_phase(
    engine: TrainEngine,
    records: Sequence[RolloutRecord],
    scores: Callable[[int], ScoreReport] | ScoreReport,
    teachers: TeacherSide,
    settings: DistillSettings,
    step: int,
    balance: UpdateBalance | None = None,
) -> dict[str, Any]:
    """All optimiser steps of one phase; `balance` carries what former phases pulled.

    scores  what is scored, all of it or, by the number of a mini-batch, at least that one
    """
    balance = balance or UpdateBalance({record.name: record.weight for record in teachers.registry})
    total: dict[str, Any] = {"train_tokens": 0, "head_loads": [], "skipped_updates": 0}
    tally = Tally(TokenWatch(settings.guard.eos), RewardTerm(records, settings.reward))
    scale = warmup_constant_cosine(
        step,
        num_steps=settings.steps,
        warmup_steps=min(settings.warmup, settings.steps),
        decay_steps=min(settings.decay_steps, max(settings.steps - settings.warmup, 0)),
        final_scale=settings.final_scale,
    )
    kept: list[RolloutRecord] = []
    for number, members in enumerate(membership(len(records), settings, step)):
        scored = scores(number) if callable(scores) else scores
        chosen, _ = without([records[i] for i in members], scored.bad)
        kept += chosen
        if not chosen:
            continue
        trace = Trace()
        tally.reward.begin(chosen)
        loads = _mini_batch(engine, chosen, scored, teachers, settings, balance, tally, trace)
        total["head_loads"].append({"distinct": loads.distinct, "loads": loads.loads})
        total["train_tokens"] += sum(len(r.prompt_ids) + len(r.token_ids) for r in chosen)
        is_noise = tally.pop_max_kl(engine.ranks) <= NOISE_KL and not settings.reward.weight
        if is_noise:
            engine.discard()
        total |= {"grad_norm": 0.0, "lr": 0.0} if is_noise else engine.step(scale, trace.expert_load)
        total["skipped_updates"] += is_noise
        teachers.store.free_taken()
    mean = lambda values: sum(values) / len(values)
    total["kl_by_sample"] = {r.uid: mean([tally.kl[c.uid] for c in by_teacher(r)]) for r in kept}
    names = ["kl", "top1_agreement", "student_entropy"]
    names += ["objective"] * (settings.objective.name != "reverse_kl")
    names += ["mtp_loss"] * any("mtp_loss" in part for part in tally.by_teacher.values())
    total |= {name: tally.mean(name) for name in names} | tally.kl_tail(engine.ranks)
    tally.watch.share(engine.ranks)
    tally.reward.share(engine.ranks)
    return total | tally.watch.numbers() | tally.reward.numbers() | _shares(kept, tally)


def membership(num_records: int, settings: DistillSettings, step: int) -> list[np.ndarray]:
    """Indices of the records of each mini-batch of a phase."""
    rng = np.random.default_rng((settings.seed, step))
    return draw_minibatches(num_records, settings.mini_batches, rng)


def _mini_batch(
    engine: TrainEngine,
    records: Sequence[RolloutRecord],
    scored: ScoreReport,
    teachers: TeacherSide,
    settings: DistillSettings,
    balance: UpdateBalance,
    tally: Tally,
    trace: Trace,
) -> HeadLoads:
    """Gradients of one mini-batch, teacher by teacher; a record runs once for each teacher that it has."""
    copies = [(copy, len(own)) for own in map(by_teacher, records) for copy in own]
    records = [copy for copy, _ in copies]
    owners = [r.teacher or "" for r in records]
    heads = {owner: teachers.scheduler.digests(owner).head for owner in set(owners)}
    is_balanced = settings.balance == "update"
    factors = balance.factors(set(owners)) if is_balanced else dict.fromkeys(owners, 1.0)
    weights = sample_weights(
        [r.num_sampled for r in records],
        owners,
        {owner: factors[owner] * teachers.registry.get(owner).weight for owner in factors},
        settings.normalisation,
        [num_teachers for _, num_teachers in copies],
    )
    segments = segments_by_teacher(range(len(records)), owners, heads)
    teachers.heads.begin([(teachers.registry.get(s.teacher), heads[s.teacher]) for s in segments])
    states = StatesAhead(teachers.store, [[scored.keys[records[i].uid] for i in s.samples] for s in segments])
    for segment in segments:
        chosen = [(records[i], weights[i]) for i in segment.samples]
        tally.add(segment.teacher, _segment(engine, chosen, states.take(), teachers, settings, tally, trace))
    tally.share(engine.ranks)
    pulls: dict[str, float] = dict.fromkeys(owners, 0.0)
    for record, owner in zip(records, owners):
        pulls[owner] += tally.pull[record.uid]
    balance.observe(pulls, factors)
    loads = teachers.heads.finish()
    if loads.loads != loads.distinct:
        raise EngineError(f"{loads.loads} head loads for {loads.distinct} heads; each is to be loaded once")
    return loads


def _segment(
    engine: TrainEngine,
    samples: Sequence[tuple[RolloutRecord, float]],
    states: Sequence[Tensor],
    teachers: TeacherSide,
    settings: DistillSettings,
    tally: Tally,
    trace: Trace,
) -> dict[str, float]:
    """Gradients of one teacher's samples in a mini-batch, each with the weight of its loss tokens.

    states  of each sample, [n, D]
    """
    records = [record for record, _ in samples]
    teacher = teachers.registry.get(records[0].teacher or "")
    head = teachers.heads.take(teacher, teachers.scheduler.digests(teacher.name).head)
    weights, factors = [weight for _, weight in samples], [token_factors(r, settings.guard) for r in records]
    packed = pack_records(records, settings.row_tokens, weights, factors, tally.reward.arrays(records))

    def loss_fn(model: Any, micro: PackedRows):
        at = hidden_at_loss(model, micro, trace, wants_mtp=settings.mtp_weight > 0, is_detached=True)
        order = sample_order(at)
        spans = own_spans(micro, order)
        own_states = [states[s][span.first : span.stop] for s, span in zip(order, spans)]
        theirs = torch.cat(own_states or [states[0][:0]]).to(at.hidden.device)
        out = distill_loss(
            at.hidden,
            model.head.weight,
            theirs,
            head,
            at.weight,
            objective=settings.objective,
            target_ids=at.target_ids,
            chunk_tokens=settings.chunk_tokens,
        )
        uids, sizes = [records[s].uid for s in order], [span.stop - span.first for span in spans]
        ours = (at.hidden, model.head.weight)
        if order:  # not the rows, or the piece of them, without loss
            tally.watch.observe(out.tokens.kl, spans, at.target_ids, ours, (theirs, head))
            tally.see(teacher.name, out.tokens.kl[at.weight > 0])

        def note(name: str, values: Tensor, of: Sequence[int]) -> None:
            sums = [part.sum() for part in values.detach().split(sizes)]
            for uid, total, num in zip(uids, torch.stack(sums).tolist() if sums else [], of):
                tally.note(name, uid, total / num)

        note("kl", out.tokens.kl, [span.size for span in spans])
        note("loss", out.tokens.value * at.weight, [1] * len(spans))

        def measure(gradient: Tensor) -> None:
            note("pull", torch.linalg.vector_norm(gradient.float(), dim=1), [1] * len(spans))

        at.hidden.register_hook(measure)
        loss = out.loss + tally.reward.loss(*ours, at.target_ids, at.arrays)
        if not at.ahead:
            return loss, out.sums
        # The blocks follow the trunk: its own samples are their targets, and nothing else learns from it.
        ahead = mtp_loss(at, model.head.weight.detach())
        return loss + settings.mtp_weight * ahead, out.sums | {"mtp_loss": float(ahead.detach())}

    # A row widened for a long episode is a micro-batch of its own.
    budget = max(settings.micro_tokens, packed.token_ids.shape[1])
    report = engine.forward_backward(loss_fn, split_micro_batches(packed, budget, engine.ranks.num_parts), {})
    report.pop("loss", None)
    return report


def _shares(records: Sequence[RolloutRecord], tally: Tally) -> dict[str, dict[str, float]]:
    """Each domain's share of the phase's prompts, loss tokens, loss and update."""
    amounts: dict[str, dict[str, float]] = {}
    for r in records:
        loss, pull = (sum(found[c.uid] for c in by_teacher(r)) for found in (tally.loss, tally.pull))
        for name, amount in (("prompt", 1.0), ("token", r.num_sampled), ("loss", loss), ("update", pull)):
            mine = amounts.setdefault(f"{name}_share", {})
            mine[r.domain] = mine.get(r.domain, 0.0) + amount
    return {name: shares(by_domain) for name, by_domain in amounts.items()}


def _table(
    records: Sequence[RolloutRecord],
    kl: dict[str, float],
    decode: Callable[[Sequence[int]], str],
    num: int,
) -> list[RolloutRow]:
    return [
        RolloutRow(
            uid=r.uid,
            prompt=decode(r.prompt_ids),
            completion=decode(r.token_ids),
            reward=r.reward,
            reward_parts=r.reward_parts,
            teacher=r.teacher,
            kl=kl.get(r.uid),
        )
        for r in (records[:: -(-len(records) // num)] if num and records else ())
    ]
