"""Numbers of a training stage: one JSON line a step on disk, and any number of other sinks."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from consilience.conf.errors import RunError
from consilience.training.durable_files import write_text_atomically
from consilience.training.plain_json import plain

ROLLED_BACK_FROM = "rolled_back_from"  # key of a row that marks a return to its step


@dataclass(frozen=True, slots=True)
class RolloutRow:
    """One line of the rollout table a person can open.

    reward_parts  named parts of the reward; advantage, teacher and kl are None where the stage has none
    """

    uid: str
    prompt: str
    completion: str
    reward: float | None = None
    reward_parts: Mapping[str, float] | None = None
    advantage: float | None = None
    teacher: str | None = None
    kl: float | None = None

    def cells(self) -> dict[str, Any]:
        """Column -> plain value; the reward parts become one JSON text."""
        row = asdict(self)
        row["reward_parts"] = json.dumps(plain(dict(self.reward_parts or {})), sort_keys=True)
        return row


class MetricsSink(Protocol):
    """Where numbers and samples go."""

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Values after `step` finished updates."""
        ...

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Samples of the rollout phase before update `step` ended."""
        ...

    def finish(self) -> None: ...


class MetricsLog:
    """Appends to `metrics.jsonl`: {"step": 12, "time": 1763764000.1, "loss": 0.7, …}, flushed line by line.

    resume_step  updates the checkpoint being resumed has done: later lines, and a line torn by a
                 crash, are cut off first, so that no step appears twice. None starts at the end.
    A value that is not finite is written as null.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = read_metrics(self.path)
            if resume_step is not None:
                kept = [row for row in kept if row.get("step", 0) <= resume_step]
            with self._clear():
                write_text_atomically(self.path, "".join(_line(row) for row in kept))
        with self._clear():
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by finish)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        with self._clear():
            self._file.write(_line({"step": int(step), "time": round(time.time(), 3), **plain(values)}))
            self._file.flush()

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """Whole rollout records are written by the stage itself; the log keeps numbers only."""

    def finish(self) -> None:
        """Safe to call twice. RunError where the last lines found no room."""
        if self._file.closed:
            return
        with self._clear():
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.close()  # tries those lines once more, and closes whatever happens
                raise
            self._file.close()

    @contextlib.contextmanager
    def _clear(self) -> Iterator[None]:
        """What the file system refuses, as one clear error."""
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path} could not be written ({error.strerror or error}); free disk space and run "
                "again: it resumes from the last checkpoint"
            ) from error


class FanOut:
    """Sends everything to several sinks, in order."""

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self.sinks = list(sinks)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        for sink in self.sinks:
            sink.scalars(step, values)

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        for sink in self.sinks:
            sink.rollouts(step, rows)

    def finish(self) -> None:
        for sink in self.sinks:
            sink.finish()


class MemorySink:
    """Keeps everything in lists: for tests and for tracking switched off."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.samples: list[tuple[int, RolloutRow]] = []
        self.is_finished = False

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self.rows.append({"step": step, **values})

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        self.samples.extend((step, row) for row in rows)

    def finish(self) -> None:
        self.is_finished = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file; [] when there is none. A torn last line is left out.

    RunError when a line before the last does not read: that is damage, not a crash.
    """
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    lines, tail = lines[:-1], lines[-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a table of values")
        except ValueError as error:
            if number == len(lines) and not tail:
                break
            raise RunError(
                f"{path}, line {number}: not a line of metrics ({error}); repair or remove it"
            ) from error
        rows.append(row)
    return rows


def surviving(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the updates that led to the end: without those that a stage went back over.

    A row of step n with ROLLED_BACK_FROM says that what came before it and lies beyond step n was undone.
    """
    kept: list[dict[str, Any]] = []
    for row in rows:
        if ROLLED_BACK_FROM in row:
            kept = [earlier for earlier in kept if earlier["step"] <= row["step"]]
        else:
            kept.append(row)
    return kept


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
