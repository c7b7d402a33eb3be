"""Exact match: the answer is the text `metadata["answer"]`, but for surrounding white space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from consilience.rewards.interface import Completion, Tier

TIER = Tier.TEXT


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct"}: 1.0 or 0.0. KeyError (a failure, not a zero) without an answer to compare."""
    is_correct = float(completion.text.strip() == str(metadata["answer"]).strip())
    return {"reward": is_correct, "correct": is_correct}
