"""A domain: where prompts come from, which tools an episode has, and who judges it.

A domain is a `datasets` dataset plus a verifier named by import path, so a user's own JSONL or
parquet file becomes one by configuration alone (`file_domain.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Problem:
    """One row of a domain's dataset.

    id         stable, derived from the content; equal ids mean equal problems (split checks use it)
    messages   conversation in the prompt protocol's message form, without the answer
               ({"role": "system"|"user", "content": str, "tools": [...]?})
    metadata   JSON-plain facts the verifier needs (expected answer, hidden cases). Never enters
               the prompt or the agent's box.
    files      workspace files of the agent's box, path -> text; empty where no box is needed
    demo       assistant messages of a worked solution for SFT, in protocol form, tool results
               included ({"role": "assistant"|"tool", ...}); empty where there is none
    user_turns what the user says after each answer of the model's; empty where one answer is all
    branches   quick instructions to answer beside (rollout/jobs.py); their answers are in the metadata
    """

    id: str
    domain: str
    messages: tuple[Mapping[str, Any], ...]
    metadata: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)
    demo: tuple[Mapping[str, Any], ...] = ()
    user_turns: tuple[str, ...] = ()
    branches: tuple[str, ...] = ()


class Domain(Protocol):
    """name, effort ("chat" or "think"), tools, reward path, limits, and the three splits."""

    name: str
    effort: str
    reward: str  # "package.module:function" or "file.py:function"
    max_turns: int  # assistant turns an episode may take (1 = no tools)
    max_tokens: int  # sampled tokens an episode may take
    needs_sandbox: bool

    def problems(self, split: str, num: int, *, start: int = 0) -> list[Problem]:
        """`num` problems of "train", "validation" or "test", from index `start`; deterministic.

        TaskError if the split has fewer.
        """
        ...
