"""report.json: what a run found, as typed rows, and the check that a file is one.

The schema is the contract in docs/architecture.md; report_page.py draws it, report_terminal.py
prints it, report_build.py computes it from gradings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from consilience.conf.errors import RunError
from consilience.training.durable_files import write_text_atomically

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class StageRow:
    """A stage's cost. tokens_per_s counts trained and sampled tokens; share is of all stages' wall times."""

    name: str
    wall_s: float
    train_tokens: int
    sampled_tokens: int
    tokens_per_s: float
    share: float


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """`correct` of `n` held-out problems; ci95 is the interval of correct / n; temperature 0 is greedy."""

    model: str
    domain: str
    n: int
    correct: float
    ci95: tuple[float | None, float | None]
    temperature: float

    @property
    def share(self) -> float:
        return self.correct / self.n if self.n else math.nan


@dataclass(frozen=True, slots=True)
class GainRow:
    """GRPO minus SFT of a domain's specialist on its own domain, paired."""

    domain: str
    delta: float
    ci95: tuple[float | None, float | None]


@dataclass(frozen=True, slots=True)
class KlRow:
    """Mean reverse KL (nats per token) to a teacher at a distillation step."""

    teacher: str
    step: int
    mean: float


@dataclass(frozen=True, slots=True)
class HeadLoadRow:
    """Teachers in a mini-batch, and how often a prediction head was loaded for it."""

    distinct: int
    loads: int


@dataclass(frozen=True, slots=True)
class CheckRow:
    """One thing the run had to show: its value, its bound in words (">= 0.9"), whether it holds."""

    name: str
    value: float | None
    bound: str
    ok: bool


_COMPARE = MappingProxyType(
    {
        ">": lambda value, bound: value > bound,
        ">=": lambda value, bound: value >= bound,
        "<": lambda value, bound: value < bound,
        "<=": lambda value, bound: value <= bound,
        "==": lambda value, bound: value == bound,
    }
)


def check(name: str, value: float | None, relation: str, bound: float) -> CheckRow:
    """The row of `value relation bound`; a value that is None or NaN does not hold."""
    known = value is not None and not math.isnan(value)
    return CheckRow(
        name, value if known else None, f"{relation} {bound:g}", known and _COMPARE[relation](value, bound)
    )


@dataclass(frozen=True, slots=True)
class Report:
    """All of report.json. `retention` is (student - base) / (specialist - base), None if undefined.

    `elapsed_s` is the time in which any stage ran, None in reports that did not tell; it is less than
    the sum of the stages' wall times where some ran side by side. `health` is what stalled, was given out
    again, dropped or resumed (`rollout/phase_health.py`), summed over the run; empty in older reports.
    """

    command: str
    commit: str
    seed: int
    machine: Mapping[str, Any]
    stages: Sequence[StageRow]
    scores: Sequence[ScoreRow]
    gains: Sequence[GainRow]
    retention: Mapping[str, float | None]
    kl: Sequence[KlRow]
    self_kl: float | None
    head_loads: Sequence[HeadLoadRow]
    mismatch_max: float | None
    sandbox: Mapping[str, Any]
    checks: Sequence[CheckRow]
    elapsed_s: float | None = None
    health: Mapping[str, Any] = field(default_factory=dict)
    schema: int = field(default=SCHEMA)

    @property
    def is_ok(self) -> bool:
        return all(row.ok for row in self.checks)

    def to_plain(self) -> dict[str, Any]:
        """JSON-plain data, `schema` first; NaN and infinities become None."""
        plain = asdict(self)
        return finite({"schema": plain.pop("schema"), **plain})

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Report:
        """Inverse of `to_plain`. RunError lists what is wrong."""
        problems = validate(plain)
        if problems:
            raise RunError(f"not a report of schema {SCHEMA}: {'; '.join(problems[:3])}")
        rows = {name: [row_type(**_tupled(r)) for r in plain[name]] for name, row_type in _ROWS.items()}
        return cls(**{**plain, **rows})


def spoken_health(health: Mapping[str, Any]) -> dict[str, int]:
    """Name as a person reads it -> count."""
    return {name.replace("_", " "): int(value) for name, value in health.items()}


_ROWS: Mapping[str, type] = MappingProxyType(
    {
        "stages": StageRow,
        "scores": ScoreRow,
        "gains": GainRow,
        "kl": KlRow,
        "head_loads": HeadLoadRow,
        "checks": CheckRow,
    }
)
_PLAIN_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "schema": (int,),
        "command": (str,),
        "commit": (str,),
        "seed": (int,),
        "machine": (Mapping,),
        "retention": (Mapping,),
        "self_kl": (float, int, type(None)),
        "mismatch_max": (float, int, type(None)),
        "sandbox": (Mapping,),
        "elapsed_s": (float, int, type(None)),
        "health": (Mapping,),
    }
)
_FIELD_KINDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "float | None": (int, float, type(None)),
    }
)


def validate(plain: Mapping[str, Any]) -> list[str]:
    """What keeps `plain` from being a report, one line a problem; empty if nothing does."""
    problems = []
    plain = {"elapsed_s": None, "health": {}, **plain}
    for name, kinds in _PLAIN_KINDS.items():
        if name not in plain:
            problems.append(f"'{name}' is missing")
        elif not isinstance(plain[name], kinds):
            problems.append(f"'{name}' is {type(plain[name]).__name__}")
    for name, row_type in _ROWS.items():
        rows = plain.get(name)
        if not isinstance(rows, list | tuple):
            problems.append(f"'{name}' is no list of rows")
            continue
        for i, row in enumerate(rows):
            problems += [f"{name}[{i}]: {p}" for p in _row_problems(row_type, row)]
    unknown = set(plain) - set(_PLAIN_KINDS) - set(_ROWS)
    problems += [f"'{name}' is not part of the schema" for name in sorted(unknown)]
    if plain.get("schema", SCHEMA) != SCHEMA:
        problems.append(f"schema is {plain['schema']}, this version reads {SCHEMA}")
    return problems


def _row_problems(row_type: type, row: Any) -> list[str]:
    if not isinstance(row, Mapping):
        return [f"{type(row).__name__} instead of a row"]
    names = {f.name: str(f.type) for f in fields(row_type)}
    problems = [f"'{n}' is missing" for n in names if n not in row]
    problems += [f"'{n}' is not part of the schema" for n in row if n not in names]
    for name in names.keys() & row.keys():
        value = row[name]
        if name == "ci95":
            if not (isinstance(value, list | tuple) and len(value) == 2):
                problems.append("'ci95' is no pair")
        elif not isinstance(value, _FIELD_KINDS[names[name]]) or (
            isinstance(value, bool) and names[name] != "bool"
        ):
            problems.append(f"'{name}' is {type(value).__name__}")
    return problems


def missing_parts(report: Report, domains: Sequence[str], num_problems: int) -> list[str]:
    """What a complete run of these domains leaves in its report and this one lacks (not margins)."""
    stages = {row.name for row in report.stages}
    per_domain = [f"{kind}/{d}" for kind in ("sft", "grpo") for d in domains]
    missing = [f"stage {n}" for n in ("base", *per_domain, "distill", "evaluate") if n not in stages]
    graded = {(row.model, row.domain, row.temperature > 0): row.n for row in report.scores}
    for model in ("base", *per_domain, "student"):
        for domain in domains:
            if graded.get((model, domain, True), 0) < num_problems:
                missing.append(f"{num_problems} sampled answers of {model} on {domain}")
    missing += [f"gain of {d}" for d in domains if d not in {row.domain for row in report.gains}]
    missing += [f"retention of {d}" for d in domains if d not in report.retention]
    if domains and len({row.teacher for row in report.kl}) == 0:
        missing.append("KL per teacher")
    missing += [name for name in ("self_kl", "mismatch_max") if getattr(report, name) is None]
    missing += [name for name in ("head_loads", "checks", "sandbox", "machine") if not getattr(report, name)]
    return missing


def write_report(path: Path, report: Report) -> None:
    """Write report.json beside its place, then rename it there. RunError if it breaks the schema."""
    plain = report.to_plain()
    problems = validate(plain)
    if problems:
        raise RunError(f"the report breaks its own schema: {'; '.join(problems[:3])}")
    write_atomic(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_report(path: Path) -> Report:
    """RunError if there is no readable report at `path`."""
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"no report at '{path}'; finish the run first: consilience run run.name=NAME"
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"'{path}' cannot be read: {error}; remove it and run again, finished stages are kept"
        ) from None
    return Report.from_plain(plain)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all. RunError if the file system refuses."""
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise RunError(
            f"cannot write '{path}': {error.strerror}; free some space or choose run.folder"
        ) from error


def _tupled(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, at any depth: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
