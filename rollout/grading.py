"""The seam between a finished episode and whoever judges it (rewards/ stands behind it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from consilience.rollout.records import Outcome, OutcomeKind


@dataclass(frozen=True, slots=True)
class ExecutedCall:
    """One tool call of the episode and the text it returned (None if it was never run)."""

    name: str
    arguments: Mapping[str, Any]
    result: str | None = None


@dataclass(frozen=True, slots=True)
class GradeItem:
    """A finished episode as a grader sees it.

    Fields
        uid, domain    of the job
        reward         the job's reward path
        prompt         the prompt as text, special tokens spelled out
        text           content of the last assistant turn; "" if the turn was malformed
        thinking       its reasoning, "" in chat mode
        token_ids      sampled token ids of all turns, in order
        tool_calls     every call of the episode, in order
        finish         FinishReason value
        metadata       the job's
        files          the job's workspace files as they were at the start
        needs_sandbox  the verifier wants a box
        sandbox        the episode's own box if it leased one (still in the state the model left it in)
        answers        what the model answered to each user message, the last (`text`) included
    """

    uid: str
    domain: str
    reward: str
    prompt: str
    text: str
    thinking: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ExecutedCall, ...]
    finish: str
    metadata: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    needs_sandbox: bool = False
    sandbox: Any = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Graded:
    """A verdict. `reward` is None unless `outcome.is_scored`; isolation and ids are the judge's boxes."""

    reward: float | None
    parts: dict[str, float]
    outcome: Outcome
    isolation: str = "none"
    sandbox_ids: tuple[str, ...] = ()


class Grader(Protocol):
    """Judges many episodes at once. May be called from a thread, one call at a time per thread."""

    def grade(self, items: Sequence[GradeItem]) -> list[Graded]:
        """One verdict per item, in order. A failing reward function is an Outcome, not an exception."""
        ...


class FakeGrader:
    """Scores by a plain function of the item; `calls` keeps the batch sizes it was asked for."""

    def __init__(self, score: Callable[[GradeItem], float] = lambda item: float(len(item.text))) -> None:
        self._score = score
        self.calls: list[int] = []

    def grade(self, items: Sequence[GradeItem]) -> list[Graded]:
        self.calls.append(len(items))
        verdicts = []
        for item in items:
            reward = float(self._score(item))
            verdicts.append(Graded(reward, {"reward": reward}, Outcome(OutcomeKind.GRADED)))
        return verdicts
