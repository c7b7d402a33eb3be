"""A domain over an endless (or finite) source of problems, split by content and drawn lazily."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from consilience.conf.errors import TaskError
from consilience.tasks.domain import Problem
from consilience.tasks.splits import SPLITS, SplitFractions, check_split_name, split_of

if TYPE_CHECKING:
    from datasets import Dataset

# So many draws in a row without a new problem mean that the space of problems is used up.
STALE_DRAWS = 20_000


class Source(Protocol):
    """Where a domain's problems come from: cheap drafts by index, whole problems on demand."""

    def draw(self, index: int) -> tuple[str, Any] | None:
        """(content id, draft) of the index-th draw, or None when the source has no more."""
        ...

    def build(self, problem_id: str, draft: Any) -> Problem:
        """The problem of a draft. Deterministic in its arguments."""
        ...


@dataclass
class SplitDomain:
    """A `Domain` (tasks/domain.py) made of a source, a reward path and limits.

    `tools` names the built-in tools of rollout/tools.py an episode may call; `needs_sandbox` says that
    the judge runs code (an episode's own box is a matter of `Problem.files`). Draws are kept in memory
    as drafts, split by content id, duplicates dropped and counted; the problems themselves are built
    when asked for. `hint` says what makes the source larger.
    """

    name: str
    effort: str
    reward: str
    max_turns: int
    max_tokens: int
    needs_sandbox: bool
    source: Source
    tools: tuple[str, ...] = ()
    fractions: SplitFractions = field(default_factory=SplitFractions)
    hint: str = "ask for fewer or widen the domain's parameters"
    num_duplicates: int = 0
    _drafts: dict[str, list[tuple[str, Any]]] = field(default_factory=lambda: {s: [] for s in SPLITS})
    _seen: set[str] = field(default_factory=set)
    _next: int = 0
    _stale: int = 0
    _is_exhausted: bool = False

    def problems(self, split: str, num: int, *, start: int = 0) -> list[Problem]:
        """`num` problems of a split from index `start`; the same whatever was asked for before.

        TaskError on an unknown split, a negative number, or a split with fewer problems.
        """
        check_split_name(split)
        if num < 0 or start < 0:
            raise TaskError(f"domain {self.name}: num {num}, start {start}; both are 0 or more.")
        drafts = self._drafts[split]
        while len(drafts) < start + num and not self._is_exhausted:
            self._advance()
        if len(drafts) < start + num:
            raise TaskError(
                f"domain {self.name}: split {split!r} has {len(drafts)} distinct problems, "
                f"{start + num} are needed (num {num}, start {start}); {self.hint}."
            )
        return [self.source.build(*draft) for draft in drafts[start : start + num]]

    def as_dataset(self, split: str, num: int, *, start: int = 0) -> Dataset:
        """The problems as a `datasets.Dataset`, one row each.

        Columns: id, domain, prompt (the user's words), and messages, metadata, files, demo as JSON
        text, so that rows of any shape fit one schema and read back exactly; a parquet or JSONL file
        written from it is a valid input of `tasks/file_domain.py`.
        """
        from datasets import Dataset

        return Dataset.from_list([problem_row(p) for p in self.problems(split, num, start=start)])

    def _advance(self) -> None:
        drawn = self.source.draw(self._next)
        self._next += 1
        if drawn is None:
            self._is_exhausted = True
            return
        if drawn[0] in self._seen:
            self.num_duplicates += 1
            self._stale += 1
            self._is_exhausted = self._stale >= STALE_DRAWS
            return
        self._stale = 0
        self._seen.add(drawn[0])
        self._drafts[split_of(drawn[0], self.fractions)].append(drawn)


def problem_row(problem: Problem) -> dict[str, str]:
    """One flat row of text columns; `file_domain` reads it back."""
    words = [str(m.get("content") or "") for m in problem.messages if m.get("role") == "user"]
    row = {"id": problem.id, "domain": problem.domain, "prompt": words[-1] if words else ""}
    for name in ("messages", "metadata", "files", "demo"):
        row[name] = json.dumps(getattr(problem, name), ensure_ascii=False)
    return row
