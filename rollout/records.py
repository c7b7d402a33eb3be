"""What one rollout leaves behind: the record that every later stage reads.

Axis legend: N tokens after the prompt (sampled tokens and observations, in stream order).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from consilience.rollout.columns import DTYPES, Column
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.token_routing import TokenRouting

SCHEMA = 1


class FinishReason(StrEnum):
    """Why the episode ended."""

    STOP = "stop"  # the model emitted end-of-sentence and asked for no tool
    LENGTH = "length"  # the token budget ran out
    TURNS = "turns"  # the tool-call budget ran out
    MALFORMED = "malformed"  # a tool block that does not parse (typed, never repaired)
    ABORT = "abort"  # infrastructure; the sample is masked


class OutcomeKind(StrEnum):
    """How the reward came about. `INFRA` and `FAILED` mask the sample; `TAMPER` is an alarm; `LOST` and
    `UNKNOWN` take the sample's whole group out of training (rollout/drops.py)."""

    GRADED = "graded"
    FAILED = "failed"  # the reward function raised, returned a NaN or timed out
    TAMPER = "tamper"
    INFRA = "infra"
    LOST = "lost"  # the episode's environment is gone, or none could be had
    UNKNOWN = "unknown"  # a tool call was begun and its result never seen


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict's type and, unless graded, one line on what happened."""

    kind: OutcomeKind
    detail: str = ""

    @property
    def is_scored(self) -> bool:
        return self.kind in (OutcomeKind.GRADED, OutcomeKind.TAMPER)


@dataclass(frozen=True, slots=True)
class UserTurn:
    """A stream that a later user message ended: from there on its reasoning is not in the prompt any more.

    Columns as in `RolloutRecord`.
    """

    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    loss_mask: Sequence[int]
    weight_version: Sequence[int]
    routing: TokenRouting | None = None
    kept: KeptSets | None = None


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One finished episode, append-only token stream, never re-tokenised.

    Its per-token fields are tuples, or, of a long one, references to a file (`columns.Column`): then the
    record itself is light, whoever iterates a field or makes an array of it reads the file, and nothing of it
    stays in memory behind that.

    Example: prompt `12 + 3 =`, the policy samples `15` and end-of-sentence:
        prompt_ids (0, 9, 17, 18, 11, 19, 12, 10), token_ids (17, 21, 1),
        logprobs (-0.2, -0.1, -0.01), loss_mask (1, 1, 1), weight_version (4, 4, 4).

    Fields
        uid            unique over the run: "<stage>/<step>/<prompt>/<sample>"
        group          samples of one prompt share it (GRPO's group)
        domain, effort domain name; "chat" or "think"
        teacher        owner teacher of the prompt, None outside distillation
        prompt_ids     token ids of the prompt
        token_ids      [N] sampled tokens and tool observations
        logprobs       [N] log-probability under the sampler; NaN where the token was not sampled
        loss_mask      [N] 1 for sampled tokens, 0 for observations
        weight_version [N] version of the weights that sampled the token; -1 for observations
        routing        experts that each token of prompt and episode visited in the sampler, missing ones
                       marked (`token_routing.py`); None: not recorded
        kept           tokens that each sampled one was drawn from, where sampling was truncated
                       (`kept_sets.py`); None: it was not
        finish         FinishReason
        reward         scalar the trainer uses, None unless the outcome is scored
        reward_parts   named parts the reward function returned
        outcome        Outcome
        isolation      isolation level really enforced ("none" where no sandbox was needed)
        sandbox_ids    sandboxes used, in order
        metadata       small JSON-plain facts of the task (index, split, difficulty)
        earlier        streams before this one, of a conversation whose reasoning is dropped (`samples`)
    """

    uid: str
    group: str
    domain: str
    effort: str
    teacher: str | None
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    loss_mask: Sequence[int]
    weight_version: Sequence[int]
    finish: FinishReason
    outcome: Outcome
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    routing: TokenRouting | None = None
    kept: KeptSets | None = None
    isolation: str = "none"
    sandbox_ids: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[UserTurn, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        lengths = (len(self.logprobs), len(self.loss_mask), len(self.weight_version))
        if lengths != (n, n, n):
            raise ValueError(f"{self.uid}: {n} tokens but {lengths} logprobs, loss_mask, weight_version")
        whole = len(self.prompt_ids) + n
        if self.routing is not None and self.routing.num_tokens != whole:
            raise ValueError(f"{self.uid}: {whole} tokens, routing of {self.routing.num_tokens}")
        if self.kept is not None and self.kept.num_tokens != n:
            raise ValueError(f"{self.uid}: {n} tokens, kept sets of {self.kept.num_tokens}")

    @property
    def num_sampled(self) -> int:
        """Tokens of the whole episode that the model sampled."""
        return sum(_total(stream.loss_mask) for stream in (self, *self.earlier))

    @property
    def num_tokens(self) -> int:
        """Prompt and episode, of all its streams."""
        return sum(len(stream.prompt_ids) + len(stream.token_ids) for stream in (self, *self.earlier))

    def samples(self) -> list[RolloutRecord]:
        """The training samples of the episode: one for each stream, uid "<uid>@<number>" but for the last."""
        before = [
            replace(
                self,
                uid=f"{self.uid}@{number}",
                prompt_ids=turn.prompt_ids,
                token_ids=turn.token_ids,
                logprobs=turn.logprobs,
                loss_mask=turn.loss_mask,
                weight_version=turn.weight_version,
                routing=turn.routing,
                kept=turn.kept,
                earlier=(),
            )
            for number, turn in enumerate(self.earlier)
        ]
        return [*before, replace(self, earlier=()) if before else self]

    def with_reward(self, reward: float | None, parts: dict[str, float], outcome: Outcome) -> RolloutRecord:
        return replace(self, reward=reward, reward_parts=parts, outcome=outcome)

    def to_json(self) -> str:
        """One line of JSON; NaN log-probs become null, references stay references."""
        row = asdict(self)
        for stream, columns in zip((self, *self.earlier), (row, *row["earlier"])):
            columns |= {key: _plain(columns[key]) for key in DTYPES}
            for key, heavy in (("routing", stream.routing), ("kept", stream.kept)):
                columns[key] = None if heavy is None else heavy.to_json()
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str, root: Path | None = None) -> RolloutRecord:
        """Inverse of `to_json`; references are to files under `root`. ValueError on an unknown schema."""
        row = json.loads(line)
        if row.get("schema") != SCHEMA:
            raise ValueError(f"rollout record schema {row.get('schema')}, this version reads {SCHEMA}")
        root = root or Path()
        row["earlier"] = tuple(
            UserTurn(**_columns(turn, root), **_heavy(turn, root)) for turn in row.get("earlier", ())
        )
        row |= _columns(row, root) | _heavy(row, root)
        row["sandbox_ids"] = tuple(row["sandbox_ids"])
        row["finish"] = FinishReason(row["finish"])
        row["outcome"] = Outcome(OutcomeKind(row["outcome"]["kind"]), row["outcome"]["detail"])
        return cls(**row)


def _columns(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """The per-token fields of a JSON row."""
    found: dict[str, Any] = {}
    for key in DTYPES:
        if isinstance(row[key], dict):
            found[key] = Column.from_dict(row[key], root)
        elif key == "logprobs":
            found[key] = tuple(math.nan if x is None else x for x in row[key])
        else:
            found[key] = tuple(row[key])
    return found


def _heavy(row: dict[str, Any], root: Path) -> dict[str, Any]:
    """What was recorded of a stream's sampling."""
    kinds = {"routing": TokenRouting, "kept": KeptSets}
    found = {key: row.get(key) for key in kinds}
    return {key: None if one is None else kinds[key].from_json(one, root) for key, one in found.items()}


def _plain(column: Sequence[Any]) -> Any:
    if isinstance(column, Column):
        return column.to_dict()
    return [None if isinstance(x, float) and math.isnan(x) else x for x in column]


def _total(column: Sequence[int]) -> int:
    total = column.total if isinstance(column, Column) else sum(column)
    assert total is not None  # an integer column
    return total
