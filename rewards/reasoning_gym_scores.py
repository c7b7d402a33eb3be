"""Judge of every reasoning-gym generator: its own `score_answer`. Importing this imports it (2 s)."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import reasoning_gym

from consilience.rewards.interface import Completion, Tier

TIER = Tier.TEXT


def score(
    completion: Completion, *, prompt: str, metadata: Mapping[str, Any], sandbox: Any
) -> dict[str, float]:
    """{"reward", "correct", "score"} of the final answer.

    score is what reasoning-gym gives; correct is 1.0 where that is full marks. Several scorers give
    something to a text that merely contains the answer (`14` for 4), so the reward is `correct` unless
    metadata["partial_credit"] is true.
    """
    dataset = _dataset(metadata["generator"], json.dumps(metadata["params"], sort_keys=True))
    marks = float(dataset.score_answer(completion.text.strip(), metadata["entry"]))
    correct = float(marks >= 1.0 - 1e-9)
    return {
        "reward": marks if metadata.get("partial_credit") else correct,
        "correct": correct,
        "score": marks,
    }


@functools.lru_cache(maxsize=64)
def _dataset(generator: str, params: str) -> Any:
    """The generator's scorer; no problem is generated."""
    return reasoning_gym.create_dataset(generator, **({"seed": 0} | json.loads(params)))
