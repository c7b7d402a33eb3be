"""The resumable run graph: stages in dependency order, each skipped where its result still stands.

A stage is finished when its `done.json` exists. Its fingerprint covers the settings it depends on,
the files it reads and the results of the stages before it; where it still matches, the stage is
skipped, otherwise the old folder is set aside (one generation, `stale/<stage>`) and the stage runs
again. A stage that was cut short and whose fingerprint still matches finds its folder as it left
it and resumes from its own checkpoints.
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

from consilience.cli.progress_display import RunProgress
from consilience.cli.report import finite, write_atomic
from consilience.conf.errors import RunError
from consilience.conf.fields import nearest
from consilience.conf.schema import Config
from consilience.training.run_folder import RunFolder, StageFolder

SCHEMA = 1


@dataclass(frozen=True)
class StageContext:
    """What a stage function gets.

    cfg       settings as this stage sees them (a specialist's own values applied)
    folder    stages/<stage>; survives an interruption, so a stage keeps its checkpoints there
    run       the run folder; paths in a result are relative to it, so that it may be moved
    inputs    results of the stages it needs, by stage name
    progress  start(stage, total, unit), advance(n, **info), finish()
    """

    name: str
    domain: str | None
    cfg: Config
    folder: StageFolder
    run: RunFolder
    inputs: Mapping[str, Mapping[str, Any]]
    progress: RunProgress


@dataclass(frozen=True)
class Stage:
    """A node. `run` returns a JSON-plain result, which is all that later stages see of it.

    settings  digest of the settings it depends on
    files     files outside the run whose content it depends on
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[StageContext], Mapping[str, Any]]
    cfg: Config
    settings: str = ""
    domain: str | None = None
    files: tuple[str, ...] = ()


@dataclass
class StageState:
    """One entry of graph.json. `spent_s` sums the attempts that did not finish."""

    state: str = "waiting"  # waiting, running, done, failed, interrupted
    wall_s: float = 0.0
    spent_s: float = 0.0
    attempts: int = 0
    message: str = ""
    needs: list[str] = field(default_factory=list)


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """Every stage after what it needs, otherwise as given. RunError on a cycle, a gap or a double name."""
    waiting = list(stages)
    names = [stage.name for stage in waiting]
    for stage in waiting:
        if names.count(stage.name) > 1:
            raise RunError(f"two stages are called '{stage.name}'")
        for need in stage.needs:
            if need not in names:
                raise RunError(
                    f"stage '{stage.name}' needs '{need}', which does not exist; {nearest(need, names)}"
                )
    ordered: list[Stage] = []
    while waiting:
        known = {stage.name for stage in ordered}
        ready = next((stage for stage in waiting if known.issuperset(stage.needs)), None)
        if ready is None:
            raise RunError(f"stages need each other in a circle: {', '.join(s.name for s in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def up_to(stages: Sequence[Stage], targets: Iterable[str]) -> list[Stage]:
    """The targets and everything they need, in order. RunError on an unknown target."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    frontier = list(targets)
    while frontier:
        name = frontier.pop()
        if name not in by_name:
            raise RunError(f"there is no stage '{name}'; {nearest(name, by_name)}")
        if name not in wanted:
            wanted.add(name)
            frontier += by_name[name].needs
    return [stage for stage in in_order(stages) if stage.name in wanted]


def dependents(stages: Sequence[Stage], name: str) -> set[str]:
    """`name` and every stage that needs it, directly or not. RunError if it does not exist."""
    found = {up_to(stages, [name])[-1].name}
    for stage in in_order(stages):
        if found.intersection(stage.needs):
            found.add(stage.name)
    return found


class Graph:
    """The stages of one run folder and how far each of them is.

    The caller holds the folder's lock (training.run_folder.open_run).
    """

    def __init__(self, run: RunFolder, stages: Sequence[Stage], progress: RunProgress) -> None:
        self.run_folder, self.progress = run, progress
        self.stages = in_order(stages)
        self.results: dict[str, Mapping[str, Any]] = {}
        self._digests: dict[str, str] = {}
        self._states = self._read_states()

    def run(self, *, redo_from: str | None = None) -> dict[str, Mapping[str, Any]]:
        """Execute what is not finished; stage name -> result.

        `redo_from` redoes that stage and all that depend on it. Whatever a stage raises (Ctrl-C
        too) is recorded in graph.json and raised on.
        """
        redo = dependents(self.stages, redo_from) if redo_from else set()
        self.progress.plan([stage.name for stage in self.stages])
        for stage in self.stages:
            fingerprint = self._fingerprint(stage)
            done = None if stage.name in redo else self.stage_folder(stage.name).done()
            if done is not None and done.get("fingerprint") == fingerprint:
                self._skip(stage, done)
            else:
                self._execute(stage, fingerprint, start_over=stage.name in redo)
        return self.results

    def stage_folder(self, name: str) -> StageFolder:
        """ "sft/math" lives in stages/sft-math."""
        return self.run_folder.stage(name.replace("/", "-"))

    def states(self) -> Mapping[str, StageState]:
        return self._states

    def _skip(self, stage: Stage, done: Mapping[str, Any]) -> None:
        self._keep(stage, done)
        self._set(stage, state="done", wall_s=done["wall_s"])
        self.progress.leave(stage.name, "skipped", done["wall_s"])

    def _keep(self, stage: Stage, done: Mapping[str, Any]) -> None:
        self.results[stage.name] = done["result"]
        self._digests[stage.name] = _digest([done["fingerprint"], done["result"]])

    def _execute(self, stage: Stage, fingerprint: str, *, start_over: bool) -> None:
        folder = self.stage_folder(stage.name)
        earlier = self._prepare(stage, folder, fingerprint, start_over=start_over)
        attempts = self._states[stage.name].attempts + 1
        self._set(stage, state="running", attempts=attempts, spent_s=earlier, wall_s=0.0, message="")
        inputs = {need: self.results[need] for need in stage.needs}
        context = StageContext(
            stage.name, stage.domain, stage.cfg, folder, self.run_folder, inputs, self.progress
        )
        self.progress.enter(stage.name)
        began = time.monotonic()
        try:
            result = stage.run(context)
            wall_s = earlier + time.monotonic() - began
            done = {
                "schema": SCHEMA,
                "stage": stage.name,
                "fingerprint": fingerprint,
                "inputs": {need: self._digests[need] for need in stage.needs},
                "wall_s": wall_s,
                "result": dict(result),
            }
            write_json(folder.path / "done.json", done)
        except BaseException as error:
            spent = time.monotonic() - began
            state = "failed" if isinstance(error, Exception) else "interrupted"
            self.progress.leave(stage.name, state, spent)
            with contextlib.suppress(RunError):  # a full disk must not hide what happened
                self._set(stage, state=state, spent_s=earlier + spent, message=_one_line(error))
            raise
        self._keep(stage, folder.done() or done)  # as a later run will read it
        self._set(stage, state="done", wall_s=wall_s, spent_s=0.0)
        self.progress.leave(stage.name, "done", wall_s)

    def _prepare(self, stage: Stage, folder: StageFolder, fingerprint: str, *, start_over: bool) -> float:
        """Make the folder ready; seconds that earlier attempts at this same work took."""
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
        return self._states[stage.name].spent_s if resumes else 0.0

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
