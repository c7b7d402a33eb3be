"""The reward plug-in interface.

A reward is a plain function or a coroutine, named by import path or file
(`rewards.path=my_rewards.py:score`):

    def score(completion, *, prompt, metadata, sandbox) -> float | dict[str, float]

A dict's entry "reward" is the scalar used for training (the sum of the entries if there is none);
"correct" (0 or 1), where present, is what evaluation counts. A function that finds the machinery tampered
with raises `Tamper`: reward 0, and an alarm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class Tier(StrEnum):
    """What a reward function's verdict rests on; its module declares one as `TIER` (sandboxes.md 5.5).

    TEXT     the text alone; nothing of the model's is run
    PROGRAM  tier A: stdin to stdout of a fresh process; compared here
    CALLS    tier B: values of function calls, as plain JSON; compared here
    SUITE    tier C: tests that share a process with the candidate; canaries, nonce, counterfactual runs
    """

    TEXT = "text"
    PROGRAM = "program"
    CALLS = "calls"
    SUITE = "suite"


class Tamper(Exception):
    """The candidate did not solve its task but worked on what judges it; the text says how it showed."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed tool call and, where it was executed, its result text."""

    name: str
    arguments: Mapping[str, Any]
    result: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What the policy produced, as the reward function sees it.

    text         final answer: content of the last assistant turn, thinking and tool blocks removed
    thinking     its reasoning text ("" in chat mode)
    token_ids    sampled token ids of the whole episode, in order
    tool_calls   every tool call of the episode, in order
    finish       FinishReason value ("stop", "length", "turns", "malformed")
    answers      of a conversation: the answer to each user message, `text` the last of them
    patch        what the episode changed in its own box, as a unified diff (`workspace.py`); None where it
                 had no box with files, or the reward needs none
    """

    text: str
    thinking: str
    token_ids: tuple[int, ...]
    tool_calls: tuple[ToolCall, ...]
    finish: str
    answers: tuple[str, ...] = ()
    patch: str | None = None


class RewardFunction(Protocol):
    """May also be `async`. `sandbox` is None unless the domain needs one."""

    def __call__(
        self, completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
    ) -> float | dict[str, float]: ...


Verifier = RewardFunction
