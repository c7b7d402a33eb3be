"""Repositories: small Python packages with an issue, repaired with tools in a box, judged by hidden tests.

A task is one file of `repositories/`: the issue, the tree as the agent gets it (a plain tree: no history
could hold the repair), a right and a wrong patch, and hidden tests with which of them fail before the repair.
Hidden tests are in the metadata alone. What the agent leaves in its box is compared with the tree outside of
it (`rewards/workspace.py`) and judged in another box (`rewards/suite_scores.py`, tier C).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from consilience.conf.fields import nearest, setting
from consilience.rollout.tools import tool_schemas
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import require
from consilience.tasks.splits import content_id

REWARD = "consilience.rewards.suite_scores:score"
TOOLS = ("list", "read", "edit", "write", "shell")
FOLDER = Path(__file__).parent / "repositories"
CHECK = "python3 -m unittest discover -s tests 2>&1 | tail -n 1"
SYSTEM = (
    "You repair a Python package. It lies in the current folder; its tests run with\n"
    "python3 -m unittest discover -s tests\n"
    "Change the package so that the issue is solved. Changes of tests are not taken over."
)


@dataclass(frozen=True)
class RepositoryParameters:
    """Which tasks, and what the model is told beside the issue."""

    tasks: tuple[str, ...] = setting((), "names of tasks; empty: all that are shipped")
    folder: str = setting("", "folder of task files (.toml) of your own; empty: those that are shipped")
    system: str = setting(SYSTEM, "system text before the tool declarations")


@dataclass(frozen=True, slots=True)
class Repository:
    """One task file. base, tests: path -> text; gold, broken: unified diffs of the base tree."""

    name: str
    issue: str
    base: Mapping[str, str]
    tests: Mapping[str, str]
    fails_before: tuple[str, ...]
    passes_before: tuple[str, ...]
    gold: str
    broken: str

    @property
    def metadata(self) -> dict[str, Any]:
        """What the judge reads (`suite_scores.score`)."""
        return {
            "base": dict(self.base),
            "tests": dict(self.tests),
            "fails_before": list(self.fails_before),
            "passes_before": list(self.passes_before),
            "allowed": ["*.py"],
        }


class RepositorySource:
    """The tasks of a folder, by name (a `Source`)."""

    def __init__(self, domain: str, parameters: RepositoryParameters) -> None:
        self.domain = domain
        self.system = parameters.system
        folder = Path(parameters.folder).expanduser() if parameters.folder else FOLDER
        present = task_names(folder)
        require(bool(present), f"{domain}.parameters.folder: no task file (.toml) in {str(folder)!r}.")
        for name in parameters.tasks:
            require(
                name in present, f"{domain}.parameters.tasks: unknown task {name!r}; {nearest(name, present)}"
            )
        self.repositories = [read_repository(folder / f"{n}.toml") for n in parameters.tasks or present]

    def draw(self, index: int) -> tuple[str, Any] | None:
        if index >= len(self.repositories):
            return None
        repository = self.repositories[index]
        return content_id("repository", repository.issue, dict(repository.base)), repository

    def build(self, problem_id: str, draft: Repository) -> Problem:
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=(
                {"role": "system", "content": self.system, "tools": tool_schemas(TOOLS)},
                {"role": "user", "content": draft.issue},
            ),
            metadata=draft.metadata,
            files=dict(draft.base),
            demo=demo_of(draft),
        )


def task_names(folder: Path = FOLDER) -> list[str]:
    """The tasks of a folder, sorted."""
    return sorted(file.stem for file in folder.glob("*.toml"))


@cache
def read_repository(file: Path) -> Repository:
    """One task file. TaskError names it and what is wrong."""
    try:
        row = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        require(False, f"task file {str(file)!r} cannot be read: {error}.")
        raise AssertionError from error
    wanted = {"issue": str, "base": dict, "tests": dict, "gold": str, "broken": str}
    wanted |= {"fails_before": list, "passes_before": list}
    for key, kind in wanted.items():
        require(isinstance(row.get(key), kind), f"task file {str(file)!r}: {key} must be a {kind.__name__}.")
    for key in row:
        require(key in wanted, f"task file {str(file)!r}: unknown key {key!r}; {nearest(key, wanted)}")
    return Repository(
        name=file.stem,
        issue=row["issue"].strip(),
        base=row["base"],
        tests=row["tests"],
        fails_before=tuple(row["fails_before"]),
        passes_before=tuple(row["passes_before"]),
        gold=row["gold"],
        broken=row["broken"],
    )


def edits_of(patch: str) -> dict[str, list[tuple[str, str]]]:
    """Path -> (text before, text after) of each hunk, of a task's own patch: it changes files, no more."""
    found: dict[str, list[tuple[str, str]]] = {}
    path = ""
    for line in patch.splitlines(keepends=True):
        if line.startswith("--- a/"):
            path = line[6:].strip()
        elif line.startswith("@@ "):
            found.setdefault(path, []).append(("", ""))
        elif line[0] in " +-" and not line.startswith("+++ b/"):
            old, new = found[path][-1]
            found[path][-1] = (old + line[1:] * (line[0] != "+"), new + line[1:] * (line[0] != "-"))
    return found


def demo_of(repository: Repository) -> tuple[Mapping[str, Any], ...]:
    """Looks at each file that the right patch changes, edits it hunk by hunk, runs the tests, and says so."""
    steps: list[tuple[str, dict[str, str], str]] = []
    for path, hunks in edits_of(repository.gold).items():
        steps.append(("read", {"path": path}, repository.base[path]))
        for old, new in hunks:
            steps.append(("edit", {"path": path, "old": old, "new": new}, f"edited {path}\n"))
    steps.append(("shell", {"command": CHECK}, "OK\n"))
    demo: list[Mapping[str, Any]] = []
    for i, (name, arguments, answer) in enumerate(steps):
        function = {"name": name, "arguments": arguments}
        call = {"id": f"call_{i}", "type": "function", "function": function}
        demo.append({"role": "assistant", "content": "", "tool_calls": [call]})
        demo.append({"role": "tool", "tool_call_id": call["id"], "content": answer})
    return (*demo, {"role": "assistant", "content": "The issue is solved; the tests pass."})
