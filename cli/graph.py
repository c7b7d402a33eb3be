"""The resumable run graph: stages in dependency order, each skipped where its result still stands.

A stage is finished when its `done.json` exists. Its fingerprint covers the settings it depends on,
the files it reads and the results of the stages before it; where it still matches, the stage is
skipped, otherwise the old folder is set aside (one generation, `stale/<stage>`) and the stage runs
again. A stage that was cut short and whose fingerprint still matches finds its folder as it left
it and resumes from its own checkpoints.

Which stage runs when, and in which process, is side_by_side.py's; what is recorded of it, this file's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consilience.cli.progress_display import RunProgress, StageProgress
from consilience.cli.report import finite, write_atomic
from consilience.cli.side_by_side import OpenWorkers, SideBySide
from consilience.cli.stage import Stage, StageContext, dependents, in_order
from consilience.conf.errors import RunError
from consilience.training.run_folder import RunFolder, StageFolder

SCHEMA = 1


@dataclass
class StageState:
    """One entry of graph.json. `spent_s` sums the attempts that did not finish.

    `spans` are the attempts at this same work that ended, each [began, ended] in seconds since 1970.
    """

    state: str = "waiting"  # waiting, running, done, failed, interrupted
    wall_s: float = 0.0
    spent_s: float = 0.0
    attempts: int = 0
    message: str = ""
    needs: list[str] = field(default_factory=list)
    spans: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Attempt:
    """A stage that was begun. `earlier_s` is what earlier attempts at the same work took."""

    stage: Stage
    context: StageContext
    fingerprint: str
    earlier_s: float
    began: float  # time.monotonic()


class Graph:
    """The stages of one run folder and how far each of them is.

    The caller holds the folder's lock (training.run_folder.open_run).
    """

    def __init__(self, run: RunFolder, stages: Sequence[Stage], progress: RunProgress) -> None:
        self.run_folder, self.progress = run, progress
        self.stages = in_order(stages)
        self.results: dict[str, Mapping[str, Any]] = {}
        self._digests: dict[str, str] = {}
        self._redo: set[str] = set()
        self._states = self._read_states()

    def run(
        self, *, redo_from: str | None = None, slots: int = 1, open_workers: OpenWorkers | None = None
    ) -> dict[str, Mapping[str, Any]]:
        """Execute what is not finished; stage name -> result.

        `redo_from` redoes that stage and all that depend on it. With more than one of `slots`, stages
        that do not need each other run side by side in processes of their own (side_by_side.py).
        Whatever a stage raises (Ctrl-C too) is recorded in graph.json and raised on.
        """
        self._redo = dependents(self.stages, redo_from) if redo_from else set()
        self.progress.plan([stage.name for stage in self.stages])
        if slots > 1:
            SideBySide(self, slots, open_workers).run()  # pyright: ignore[reportArgumentType]
        else:
            for stage in self.stages:
                if not self.skip(stage):
                    self.execute(stage)
        self.results = {stage.name: self.results[stage.name] for stage in self.stages}
        return self.results

    def stage_folder(self, name: str) -> StageFolder:
        """ "sft/math" lives in stages/sft-math."""
        return self.run_folder.stage(name.replace("/", "-"))

    def states(self) -> Mapping[str, StageState]:
        return self._states

    def elapsed_s(self) -> float:
        """Seconds in which a stage of this graph ran; those in which several did count once.

        A stage without spans (an older run folder) counts with its wall time.
        """
        states = [self._states[stage.name] for stage in self.stages]
        return covered_s(span for s in states for span in s.spans) + sum(
            s.wall_s for s in states if not s.spans
        )

    def skip(self, stage: Stage) -> bool:
        """Whether its result still stands; then it is kept. Its needs must have results."""
        done = None if stage.name in self._redo else self.stage_folder(stage.name).done()
        if done is None or done.get("fingerprint") != self._fingerprint(stage):
            return False
        self._keep(stage, done)
        self._set(stage, state="done", wall_s=done["wall_s"])
        self.progress.leave(stage.name, "skipped", done["wall_s"])
        return True

    def execute(self, stage: Stage) -> None:
        """Run a stage in this process."""
        attempt = self.begin(stage)
        self.settle(attempt, lambda: stage.run(attempt.context))

    def begin(self, stage: Stage, threads: int | None = None) -> Attempt:
        """Make the folder ready and record that the stage runs. Its needs must have results."""
        folder, fingerprint = self.stage_folder(stage.name), self._fingerprint(stage)
        resumes = self._prepare(stage, folder, fingerprint)
        state = self._states[stage.name]
        earlier_s, spans = (state.spent_s, state.spans) if resumes else (0.0, [])
        attempts = state.attempts + 1
        self._set(
            stage, state="running", attempts=attempts, spent_s=earlier_s, spans=spans, wall_s=0.0, message=""
        )
        inputs = {need: self.results[need] for need in stage.needs}
        progress = StageProgress(self.progress, stage.name)
        context = StageContext(
            stage.name, stage.domain, stage.cfg, folder, self.run_folder, inputs, progress, threads
        )
        self.progress.enter(stage.name)
        return Attempt(stage, context, fingerprint, earlier_s, time.monotonic())

    def settle(self, attempt: Attempt, work: Callable[[], Mapping[str, Any]]) -> None:
        """Record how an attempt ends: `work()` is the stage's result, or raises, and that is raised on."""
        stage, folder = attempt.stage, attempt.context.folder
        try:
            result = work()
            wall_s = attempt.earlier_s + time.monotonic() - attempt.began
            done = {
                "schema": SCHEMA,
                "stage": stage.name,
                "fingerprint": attempt.fingerprint,
                "inputs": {need: self._digests[need] for need in stage.needs},
                "wall_s": wall_s,
                "result": dict(result),
            }
            write_json(folder.path / "done.json", done)
        except BaseException as error:
            spent_s = time.monotonic() - attempt.began
            state = "failed" if isinstance(error, Exception) else "interrupted"
            self.progress.leave(stage.name, state, spent_s)
            with contextlib.suppress(RunError):  # a full disk must not hide what happened
                self._end(attempt, state=state, spent_s=attempt.earlier_s + spent_s, message=_one_line(error))
            raise
        self._keep(stage, folder.done() or done)  # as a later run will read it
        self._end(attempt, state="done", wall_s=wall_s, spent_s=0.0)
        self.progress.leave(stage.name, "done", wall_s)

    def _keep(self, stage: Stage, done: Mapping[str, Any]) -> None:
        self.results[stage.name] = done["result"]
        self._digests[stage.name] = _digest([done["fingerprint"], done["result"]])

    def _end(self, attempt: Attempt, **changes: Any) -> None:
        now = time.time()
        span = [now - (time.monotonic() - attempt.began), now]
        spans = [*self._states[attempt.stage.name].spans, span]
        self._set(attempt.stage, spans=spans, **changes)

    def _prepare(self, stage: Stage, folder: StageFolder, fingerprint: str) -> bool:
        """Make the folder ready; whether earlier attempts at this same work are gone on with."""
        start_over = stage.name in self._redo
        started = RunFolder(folder.path).read_json("started.json")
        resumes = started is not None and started.get("fingerprint") == fingerprint and not start_over
        if resumes:
            self.progress.note(f"{stage.name} resumes where it was cut short")
        elif folder.path.exists():
            stale = self.run_folder.path / "stale" / folder.name
            why = "" if start_over else ": its settings or inputs changed"
            self.progress.note(f"{stage.name} is redone{why}; what it left before is kept in {stale}")
            shutil.rmtree(stale, ignore_errors=True)
            stale.parent.mkdir(parents=True, exist_ok=True)
            folder.path.rename(stale)
        folder.create()
        write_json(folder.path / "started.json", {"fingerprint": fingerprint})
        return resumes

    def _fingerprint(self, stage: Stage) -> str:
        inputs = {need: self._digests[need] for need in stage.needs}
        return _digest(
            [stage.name, stage.settings, inputs, {path: _file_digest(path) for path in stage.files}]
        )

    def _set(self, stage: Stage, **changes: Any) -> None:
        state = self._states[stage.name]
        for name, value in changes.items():
            setattr(state, name, value)
        stages = {name: vars(s) for name, s in self._states.items()}
        write_json(self.run_folder.path / "graph.json", {"schema": SCHEMA, "stages": stages})

    def _read_states(self) -> dict[str, StageState]:
        """States an earlier process left; one that says "running" was killed and counts as interrupted."""
        saved = (self.run_folder.read_json("graph.json") or {}).get("stages", {})
        states = {name: StageState(**entry) for name, entry in saved.items()}
        for state in states.values():
            state.state = "interrupted" if state.state == "running" else state.state
        for stage in self.stages:
            states.setdefault(stage.name, StageState()).needs = list(stage.needs)
        return states


def covered_s(spans: Iterable[list[float]]) -> float:
    """Length of the union of [began, ended] spans."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Beside its place, then renamed; NaN becomes null. RunError if not JSON-plain, or the disk is full."""
    try:
        text = json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"'{path.name}' would hold something that is not plain JSON: {error}") from error
    write_atomic(path, text + "\n")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _file_digest(path: str) -> str:
    """sha256 of a file; of a checkpoint folder, its consilience.json, which names the weights' digest."""
    source = Path(path)
    if source.is_dir():
        source = next(
            (source / n for n in ("consilience.json", "config.json") if (source / n).is_file()), source
        )
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"'{path}' cannot be read: {error.strerror}; the run depends on it") from error


def _one_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
