"""What one rollout leaves behind: the record that every later stage reads.

Axis legend: N tokens after the prompt (sampled tokens and observations, in stream order).
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

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
    """How the reward came about. `INFRA` and `FAILED` mask the sample; `TAMPER` is an alarm."""

    GRADED = "graded"
    FAILED = "failed"  # the reward function raised, returned a NaN or timed out
    TAMPER = "tamper"
    INFRA = "infra"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The verdict's type and, unless graded, one line on what happened."""

    kind: OutcomeKind
    detail: str = ""

    @property
    def is_scored(self) -> bool:
        return self.kind in (OutcomeKind.GRADED, OutcomeKind.TAMPER)


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """One finished episode, append-only token stream, never re-tokenised.

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
    """

    uid: str
    group: str
    domain: str
    effort: str
    teacher: str | None
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    loss_mask: tuple[int, ...]
    weight_version: tuple[int, ...]
    finish: FinishReason
    outcome: Outcome
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    routing: TokenRouting | None = None
    kept: KeptSets | None = None
    isolation: str = "none"
    sandbox_ids: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
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
        return sum(self.loss_mask)

    def with_reward(self, reward: float | None, parts: dict[str, float], outcome: Outcome) -> RolloutRecord:
        return replace(self, reward=reward, reward_parts=parts, outcome=outcome)

    def to_json(self) -> str:
        """One line of JSON; NaN log-probs become null."""
        row = asdict(self)
        for key, heavy in (("routing", self.routing), ("kept", self.kept)):
            row[key] = None if heavy is None else heavy.to_json()
        row["logprobs"] = [None if math.isnan(x) else x for x in self.logprobs]
        return json.dumps(row, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> RolloutRecord:
        """Inverse of `to_json`. ValueError on an unknown schema version."""
        row = json.loads(line)
        if row.get("schema") != SCHEMA:
            raise ValueError(f"rollout record schema {row.get('schema')}, this version reads {SCHEMA}")
        row["logprobs"] = tuple(math.nan if x is None else x for x in row["logprobs"])
        for key in ("prompt_ids", "token_ids", "loss_mask", "weight_version", "sandbox_ids"):
            row[key] = tuple(row[key])
        if row["routing"] is not None:
            row["routing"] = TokenRouting.from_json(row["routing"])
        if row.get("kept") is not None:
            row["kept"] = KeptSets.from_json(row["kept"])
        row["finish"] = FinishReason(row["finish"])
        row["outcome"] = Outcome(OutcomeKind(row["outcome"]["kind"]), row["outcome"]["detail"])
        return cls(**row)
