"""Judge of the agent domain: the right value, really read along the trail."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from consilience.rewards.interface import Completion, Tier, ToolCall

TIER = Tier.TEXT


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "read"}.

    read     share of the trail's files read in order, by calls whose results hold the files' text
    correct  1.0 if the final text is the value and the whole trail was read: a guess is worth nothing
    reward   correct, or metadata["hop_reward"] for each file read
    """
    chain = metadata["chain"]
    num_read = _hops_read(completion.tool_calls, chain)
    is_correct = completion.text.strip() == metadata["answer"] and num_read == len(chain)
    partial = metadata.get("hop_reward", 0.0) * num_read
    return {
        "reward": 1.0 if is_correct else partial,
        "correct": float(is_correct),
        "read": num_read / len(chain),
    }


def _hops_read(calls: Sequence[ToolCall], chain: Sequence[Mapping[str, str]]) -> int:
    """How far along the trail the calls got; other calls in between do no harm."""
    num_read = 0
    for call in calls:
        if num_read < len(chain) and _reads(call, chain[num_read]):
            num_read += 1
    return num_read


def _reads(call: ToolCall, step: Mapping[str, str]) -> bool:
    path = call.arguments.get("path")
    return (
        call.name == "read"
        and isinstance(path, str)
        and posixpath.normpath(path) == step["path"]
        and call.result is not None
        and call.result.strip() == step["text"]
    )
