"""The run folder and its stage folders (docs/architecture.md, "Records and folders").

    runs/<name>/{config.yaml, manifest.json, stages/<stage>/{metrics.jsonl, rollouts/, checkpoints/,
                 done.json}, wandb/}

A stage is finished when its `done.json` exists, and that is written last, atomically.
"""

from __future__ import annotations

import difflib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.conf.errors import RunError
from consilience.training.durable_files import write_text_atomically
from consilience.training.plain_json import plain
from consilience.training.run_lock import RunLock

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class StageFolder:
    """`stages/<stage>`; nothing is created until it is used."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def create(self) -> StageFolder:
        """Make the folder and its parts; returns itself."""
        for folder in (self.rollouts, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def done(self) -> dict[str, Any] | None:
        """What `finish` wrote, None while the stage is not finished. RunError when it does not read."""
        return _read_json(self.path / "done.json")

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `done.json`: the stage is finished from here on. What is not finite becomes null."""
        _write(self.path / "done.json", _dump(result))

    def reset(self) -> None:
        """Forget the stage, so that it runs again from its start; `done.json` goes first."""
        (self.path / "done.json").unlink(missing_ok=True)
        if self.path.exists():
            shutil.rmtree(self.path)


@dataclass(frozen=True, slots=True)
class RunFolder:
    """`runs/<name>`, locked while `open_run` has it open."""

    path: Path

    @property
    def wandb(self) -> Path:
        """The folder handed to `WandbSink`, which makes `wandb/` inside it."""
        return self.path

    def stage(self, name: str) -> StageFolder:
        """The folder of one stage. RunError for a name that is no plain file name."""
        return StageFolder(self.path / "stages" / _checked(name, "stage"))

    def stages(self) -> list[StageFolder]:
        """Stages that have a folder, by name."""
        root = self.path / "stages"
        return [StageFolder(p) for p in sorted(root.iterdir()) if p.is_dir()] if root.is_dir() else []

    def manifest(self) -> dict[str, Any] | None:
        return _read_json(self.path / "manifest.json")

    def write_json(self, name: str, row: Mapping[str, Any]) -> None:
        """Replace a JSON file of the run (graph.json, report.json) atomically."""
        _write(self.path / name, _dump(row))

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run, None when there is none. RunError when it does not read."""
        return _read_json(self.path / name)


@contextmanager
def open_run(
    root: Path,
    name: str,
    *,
    config_yaml: str,
    manifest: Mapping[str, Any],
    accept_changed_config: bool = False,
) -> Iterator[RunFolder]:
    """Create or resume `root/name`, locked for this process until the block ends.

    The first time writes config.yaml and manifest.json. A resume keeps the first manifest and
    appends the new one to its "resumes"; a config that differs is a RunError that shows the first
    differing lines, unless accepted (the old one is then kept as config.1.yaml, config.2.yaml, …).
    """
    run = RunFolder(Path(root) / _checked(name, "run"))
    if run.path.exists() and not run.path.is_dir():
        raise RunError(f"{run.path} is a file; remove it or choose another run name")
    lock = RunLock(run.path / ".lock")
    try:
        lock.acquire()  # no limit: it refuses, it does not wait
    except OSError as error:
        raise RunError(
            f"{run.path} cannot be used as a run folder ({error}); choose another place"
        ) from error
    try:
        _write_config(run.path, config_yaml, accept_changed_config)
        first = run.manifest()
        if first is None:
            run.write_json("manifest.json", manifest)
        else:
            run.write_json("manifest.json", first | {"resumes": [*first.get("resumes", []), dict(manifest)]})
        yield run
    finally:
        lock.release()


def _write_config(folder: Path, config_yaml: str, accept_changed: bool) -> None:
    path = folder / "config.yaml"
    old = path.read_text("utf-8") if path.exists() else None
    if old == config_yaml:
        return
    if old is not None:
        if not accept_changed:
            lines = difflib.unified_diff(old.splitlines(), config_yaml.splitlines(), lineterm="", n=0)
            changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            raise RunError(
                f"{folder} was started with another configuration ({'; '.join(changed[:6])}); resume it with "
                "the same one, or choose another run name"
            )
        number = 1
        while (folder / f"config.{number}.yaml").exists():
            number += 1
        _write(folder / f"config.{number}.yaml", old)
    _write(path, config_yaml)


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{what} name {name!r} cannot be a folder; use letters, digits, dot, dash and underscore, "
            "starting with a letter or digit"
        )
    return name


def _write(path: Path, text: str) -> None:
    try:
        write_text_atomically(path, text)
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); what was there before is untouched. "
            "Free disk space or repair the folder, then run again"
        ) from error


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        row = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); remove it to run that part again") from error
    if not isinstance(row, dict):
        raise RunError(f"{path} holds no table of fields; remove it to run that part again")
    return row
