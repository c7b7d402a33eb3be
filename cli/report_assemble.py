"""From the results the stages left to one Report.

A stage result may hold (everything is optional except what a kind of stage is about):
    train_tokens, sampled_tokens   what the stage trained on and sampled
    checks                         rows {name, value, relation, bound}: what a part had to show
    curves                         chart title -> {series name -> [[step, …], [value, …]]}
distillation, besides: kl [{teacher, step, mean}], self_kl, head_loads [{distinct, loads}];
any sampling stage: mismatch_max, sandbox {isolation level: rollouts that had it}, health {name: sum};
evaluation: grades_file, path in the run folder of [{model, domain, temperature, grades: {problem: correct}}].
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.cli import report_build as build
from consilience.cli.report import CheckRow, HeadLoadRow, KlRow, Report, check
from consilience.cli.report_page import Chart
from consilience.conf.errors import RunError
from consilience.conf.schema import Config
from consilience.rollout.deadlines import STALLS, num_stalls, read_stalls
from consilience.rollout.phase_health import HEALTH

Results = Mapping[str, Mapping[str, Any]]
GradeKey = tuple[str, str, float]


def assemble(
    cfg: Config,
    folder: Path,
    results: Results,
    walls: Mapping[str, float],
    *,
    elapsed_s: float,
    command: str,
    commit: str,
    machine: Mapping[str, Any],
) -> Report:
    """The report of a finished run. RunError if the evaluation left no gradings.

    walls      stage -> its own wall time; those of stages side by side overlap
    elapsed_s  seconds in which any stage ran
    """
    measured = build.measure(
        read_grades(folder, results),
        list(cfg.task.domains),
        temperature=cfg.evaluate.temperature,
        seed=cfg.run.seed,
        num_resamples=cfg.evaluate.num_resamples,
    )
    distilled = results.get("distill", {})
    kl = [KlRow(**row) for row in distilled.get("kl", ())]
    head_loads = [HeadLoadRow(**row) for row in distilled.get("head_loads", ())]
    self_kl = distilled.get("self_kl")
    mismatches = [r["mismatch_max"] for r in results.values() if r.get("mismatch_max") is not None]
    timed = [
        (name, walls[name], int(r.get("train_tokens", 0)), int(r.get("sampled_tokens", 0)))
        for name, r in results.items()
    ]
    return Report(
        command=command,
        commit=commit,
        seed=cfg.run.seed,
        machine=machine,
        stages=build.stage_rows(timed),
        scores=measured.scores,
        gains=measured.gains,
        retention=measured.retention,
        kl=kl,
        self_kl=self_kl,
        head_loads=head_loads,
        mismatch_max=max(mismatches, default=None),
        sandbox=_isolation(results),
        health=_health(folder, results),
        elapsed_s=elapsed_s,
        checks=[
            *build.score_checks(measured),
            *build.distill_checks(kl, self_kl, head_loads),
            *_stage_checks(results),
        ],
    )


def charts_of(results: Results) -> list[Chart]:
    """The curves of all stages; series of charts with the same title share it."""
    merged: dict[str, dict[str, Any]] = {}
    for result in results.values():
        for title, series in result.get("curves", {}).items():
            merged.setdefault(title, {}).update({name: _points(*xy) for name, xy in series.items()})
    return [Chart(title, series) for title, series in merged.items()]


def _points(steps: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """A series as a stage left it; null (not measured) breaks the line."""
    return list(steps), [math.nan if value is None else value for value in values]


def read_grades(folder: Path, results: Results) -> dict[GradeKey, dict[str, float]]:
    """(model, domain, temperature) -> problem id -> correct."""
    named = results.get("evaluate", {}).get("grades_file")
    if named is None:
        raise RunError(
            "the evaluation left no gradings, so there is nothing to report; redo it: run.from=evaluate"
        )
    try:
        rows = json.loads((folder / named).read_text(encoding="utf-8"))
        return {(row["model"], row["domain"], float(row["temperature"])): row["grades"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"'{folder / named}' holds no gradings ({error}); redo it: run.from=evaluate"
        ) from error


def _isolation(results: Results) -> dict[str, int]:
    """Isolation level -> rollouts of the whole run that had it."""
    counts: dict[str, int] = {}
    for result in results.values():
        for level, count in (result.get("sandbox") or {}).items():
            counts[level] = counts.get(level, 0) + count
    return counts


def _health(folder: Path, results: Results) -> dict[str, float]:
    """Sums over the stages; `stalls` counts all of the run, those that had no sample too."""
    sums = dict.fromkeys(HEALTH, 0.0)
    for result in results.values():
        for name, value in (result.get("health") or {}).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums | {"stalls": float(num_stalls(read_stalls(folder / STALLS)))}


def _stage_checks(results: Results) -> Iterable[CheckRow]:
    for name, result in results.items():
        for row in result.get("checks", ()):
            yield check(f"{name}: {row['name']}", row["value"], row["relation"], row["bound"])
