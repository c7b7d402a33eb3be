"""Recall: a base's exercise in copying, single turns that repeat what stands in brackets.

`see note [q4]` is answered `q4`. An agent's episode is mostly fixed text around a few copied names, so a
small model finds out late, or by luck, that it must copy them; here almost every token is a copy. The
phrases are the agent domain's (agent.py), without tools and without a trail to follow.
"""

from __future__ import annotations

import random
import string

from consilience.tasks.agent import pointer_note, question_about, value_note
from consilience.tasks.corpus import Conversation

NAME = "recall"


def recall_texts(num: int, seed: int, *, effort: str = "think") -> list[Conversation]:
    """`num` conversations; in think mode the name is thought and then said. Deterministic in `seed`."""
    rng = random.Random(f"{NAME} {seed}")
    return [_conversation(rng, effort) for _ in range(num)]


def _conversation(rng: random.Random, effort: str) -> Conversation:
    phrase = rng.choice((question_about, pointer_note, value_note))
    name = rng.choice(string.ascii_lowercase) + rng.choice(string.digits)
    copied = str(rng.randrange(10, 100)) if phrase is value_note else name
    thought = {} if effort == "chat" else {"reasoning_content": copied}
    messages = (
        {"role": "user", "content": phrase(copied)},
        {"role": "assistant", "content": copied, **thought},
    )
    return Conversation(NAME, effort, messages, 1)
