"""A rollout job: one sample to draw, everything a worker needs and nothing it could leak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from consilience.rollout.engine import SamplingParams
from consilience.rollout.protocol import TASK_TOKENS

BRANCH_NAMES = frozenset(TASK_TOKENS) - {"read_url"}  # that one asks about a URL, which a prompt says itself


@dataclass(frozen=True, slots=True)
class RolloutJob:
    """One episode to run. JSON-plain but for `sampling`, so that it travels and is stored as it is.

    Fields
        uid            unique over the run: "<stage>/<step>/<prompt>/<sample>"
        group          samples of one prompt share it (one prefill, one GRPO group)
        domain         domain name
        effort         "chat", "think", or an effort level of the protocol ("low", "high", "max")
        teacher        owner teacher of the prompt, None outside distillation
        messages       conversation in message form, without the answer
        user_turns     what the user says next, one after each answer; the answer to the last ends the episode
        metadata       what the verifier needs; never enters the prompt or the box
        files          workspace files of the agent's box, path -> text
        reward         reward function by import path or file, "" where nothing is graded
        max_turns      assistant turns that may follow one user message (1 = no tool is ever run)
        max_tokens     sampled tokens the whole episode may take
        tools          names of built-in tools (rollout/tools.py) that the episode may call
        sampling       how each turn is sampled; `max_tokens` there caps one turn
        needs_sandbox  the verifier wants a box
        branches       quick instructions that are answered beside (`branches.py`), names of BRANCH_NAMES
        branch_tokens  sampled tokens that each of them may take
    """

    uid: str
    group: str
    domain: str
    effort: str
    messages: tuple[Mapping[str, Any], ...]
    teacher: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    reward: str = ""
    max_turns: int = 1
    max_tokens: int = 256
    tools: tuple[str, ...] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    needs_sandbox: bool = False
    user_turns: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()
    branch_tokens: int = 64

    def __post_init__(self) -> None:
        if set(self.branches) - BRANCH_NAMES or self.branch_tokens < 1:
            raise ValueError(
                f"job {self.uid}: branches {self.branches} of {self.branch_tokens} tokens; allowed are "
                f"{', '.join(sorted(BRANCH_NAMES))}, of at least 1 token"
            )
        if min(self.max_turns, self.max_tokens, self.sampling.max_tokens) < 1:
            raise ValueError(f"job {self.uid}: max_turns, max_tokens and sampling.max_tokens are at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain form; `from_dict` is its inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> RolloutJob:
        sampling = dict(row["sampling"])
        sampling["stop_ids"] = tuple(sampling["stop_ids"])
        return cls(
            **{
                **row,
                "sampling": SamplingParams(**sampling),
                "messages": tuple(row["messages"]),
                "tools": tuple(row["tools"]),
                "user_turns": tuple(row.get("user_turns", ())),
                "branches": tuple(row.get("branches", ())),
            }
        )
