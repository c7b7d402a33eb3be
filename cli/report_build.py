"""From gradings to the report's rows: scores, gains, retention, and the checks every run makes.

A model is named by the stage that made it: "base", "sft/math", "grpo/math", "student".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consilience.cli import bootstrap
from consilience.cli.report import CheckRow, GainRow, HeadLoadRow, KlRow, ScoreRow, StageRow, check

Grades = Mapping[str, float]  # problem id -> correct, 0 to 1; a failed grading is absent


@dataclass(frozen=True)
class Measured:
    """What the held-out gradings say. `reach` is model -> the least retention over all domains."""

    scores: list[ScoreRow]
    gains: list[GainRow]
    retention: dict[str, float | None]
    reach: dict[str, float]


def measure(
    grades: Mapping[tuple[str, str, float], Grades],
    domains: Sequence[str],
    *,
    temperature: float = 1.0,
    seed: int = 0,
    num_resamples: int = 10_000,
) -> Measured:
    """Scores of every (model, domain, temperature), gains and retention at `temperature`.

    ValueError if a model lacks gradings, or no problem of a domain was graded for all models.
    """
    scores = []
    for (model, domain, at), graded in sorted(grades.items()):
        estimate = bootstrap.score(list(graded.values()), seed=seed, num_resamples=num_resamples)
        scores.append(ScoreRow(model, domain, len(graded), float(sum(graded.values())), estimate.ci95, at))
    gains, retention = [], {}
    reach: dict[str, list[float]] = {}
    for domain in domains:
        aligned = bootstrap.paired(
            {m: dict(g) for (m, d, at), g in grades.items() if d == domain and at == temperature}
        )
        gained = bootstrap.gain(
            aligned[f"grpo/{domain}"], aligned[f"sft/{domain}"], seed=seed, num_resamples=num_resamples
        )
        gains.append(GainRow(domain, gained.value, gained.ci95))
        for model, correct in aligned.items():
            if model.startswith("grpo/") or model == "student":
                kept = _kept(correct, aligned["base"], aligned[f"grpo/{domain}"])
                reach.setdefault(model, []).append(kept)
        kept = reach["student"][-1] if "student" in reach else math.nan
        retention[domain] = None if math.isnan(kept) else kept
    return Measured(scores, gains, retention, {m: _least(values) for m, values in reach.items()})


def _kept(student: Sequence[float], base: Sequence[float], specialist: Sequence[float]) -> float:
    # The interval is not part of the report, so one resample is enough here.
    return bootstrap.retention(student, base, specialist, num_resamples=1).value


def _least(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else min(values)


def score_checks(measured: Measured) -> list[CheckRow]:
    """GRPO beats SFT in every domain, the student keeps it, and no specialist is that good everywhere."""
    rows = [check(f"gain of {g.domain}: lower bound", g.ci95[0], ">", 0.0) for g in measured.gains]
    kept = [math.nan if v is None else v for v in measured.retention.values()]
    rows += [check(f"retention of {d}", v, ">=", 0.8) for d, v in measured.retention.items()]
    rows.append(check("retention, mean", sum(kept) / len(kept) if kept else None, ">=", 0.9))
    if len(measured.gains) < 2:
        return rows  # with one domain, "everywhere" says nothing
    specialists = {m: v for m, v in measured.reach.items() if m.startswith("grpo/")}
    rows += [
        check(f"least retention of {m} over domains", v, "<", 0.8) for m, v in sorted(specialists.items())
    ]
    return rows


def fall(means: Sequence[float]) -> float | None:
    """Geometric mean of the last quarter of the steps over that of the first; None for a single step.

    Geometric, because a KL per token is heavy-tailed: one episode in a hundred that leaves the teacher's
    path after an unlikely token has a thousand times the KL of the others and would decide a plain mean.
    """
    if len(means) < 2:
        return None
    part = max(1, len(means) // 4)
    logs = [math.log(max(mean, 1e-12)) for mean in means]
    return math.exp(sum(logs[-part:]) / part - sum(logs[:part]) / part)


def distill_checks(
    kl: Sequence[KlRow], self_kl: float | None, head_loads: Sequence[HeadLoadRow]
) -> list[CheckRow]:
    """KL falls for every teacher, a model equals itself, and heads are loaded once a mini-batch."""
    rows = []
    for teacher in sorted({row.teacher for row in kl}):
        means = [row.mean for row in sorted(kl, key=lambda r: r.step) if row.teacher == teacher]
        rows.append(check(f"KL to {teacher}: last quarter over first", fall(means), "<", 1.0))
    rows.append(check("KL of a model distilled from itself", self_kl, "<=", 1e-6))
    extra = max((row.loads - row.distinct for row in head_loads), default=None)
    rows.append(check("head loads beyond the distinct teachers", extra, "==", 0))
    return rows


def acting_checks(counters: Mapping[str, float]) -> list[CheckRow]:
    """Each named counter of a part that must have acted is above 0."""
    return [check(name, value, ">", 0.0) for name, value in counters.items()]


def stage_rows(stages: Sequence[tuple[str, float, int, int]]) -> list[StageRow]:
    """(name, wall_s, train_tokens, sampled_tokens) -> rows with tokens per second and share of the sum."""
    total = sum(wall for _, wall, _, _ in stages)
    return [
        StageRow(
            name,
            wall,
            trained,
            sampled,
            (trained + sampled) / wall if wall else 0.0,
            wall / total if total else 0.0,
        )
        for name, wall, trained, sampled in stages
    ]
