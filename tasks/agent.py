"""Agent: follow a trail of notes with a `read` tool; the value exists only in the box.

The default problem asks `Which number does note [b7] lead to?`. File b7 says `see note [q4]`, file q4
says `the number is [58]`; other files hold other numbers. The second call depends on the result of the
first, and the judge (`rewards/agent.py`) wants both calls in the episode's record. In think mode the
worked solution thinks what it copies next: the name before a call, the number before the answer, so
that a short attention window spans a call's fixed text.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from consilience.conf.fields import setting
from consilience.rollout.tools import tool_schemas
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import require
from consilience.tasks.splits import content_id

REWARD = "consilience.rewards.agent:score"
TOOLS = ("read",)


@dataclass(frozen=True)
class AgentParameters:
    """Length of the trail and of what is copied along it. Default: 6 million trails."""

    hops: int = setting(2, "files to read, each named by the one before", unit="calls", low=2, high=16)
    letters: int = setting(1, "letters of a file name", low=1, high=8)
    digits: int = setting(1, "digits of a file name", low=0, high=8)
    value_digits: int = setting(2, "digits of the value", low=1, high=12)
    distractors: int = setting(3, "other files in the box", unit="files", low=0, high=64)
    hop_reward: float = setting(
        0.0, "reward for each file of the trail read, if the answer is wrong", low=0, high=0.2
    )
    show_work: bool = setting(True, "think mode: demonstrations think what they copy next")
    system: str = setting("", "system text before the tool declarations")

    def __post_init__(self) -> None:
        names = 26**self.letters * 10**self.digits
        needed = self.hops + self.distractors
        require(
            names >= 4 * needed, f"agent: {names} file names for {needed} files; raise letters or digits."
        )
        require(
            self.num_trails >= 20_000,
            f"agent: {self.num_trails} possible trails, at least 20000 are needed; "
            "raise letters, digits or value_digits.",
        )
        require(
            self.hop_reward * self.hops < 1,
            f"agent: hop_reward {self.hop_reward} times {self.hops} hops reaches the full reward; lower it.",
        )

    @property
    def num_trails(self) -> int:
        """Distinct problems: ordered file names of the trail times values."""
        names, count = 26**self.letters * 10**self.digits, self._num_values
        for i in range(self.hops):
            count *= names - i
        return count

    @property
    def _num_values(self) -> int:
        return 9 * 10 ** (self.value_digits - 1)


class Trail(NamedTuple):
    """The files of the trail in reading order, and the value in the last."""

    names: tuple[str, ...]
    value: str


class AgentSource:
    """Trails by index (a `Source`); the distractor files are a function of the trail alone."""

    def __init__(self, domain: str, parameters: AgentParameters, *, effort: str, seed: int) -> None:
        self.domain = domain
        self.parameters = parameters
        self.thinks = effort != "chat" and parameters.show_work
        self.seed = seed

    def draw(self, index: int) -> tuple[str, Any] | None:
        rng = random.Random((self.seed << 40) + index)
        names = self._names(rng, self.parameters.hops, taken=())
        value = self._value(rng)
        return content_id("agent", names, value), Trail(tuple(names), value)

    def build(self, problem_id: str, draft: Trail) -> Problem:
        chain = [
            {"path": name, "text": pointer_note(following) if following else value_note(draft.value)}
            for name, following in zip(draft.names, (*draft.names[1:], ""))
        ]
        question = question_about(draft.names[0])
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=(
                {"role": "system", "content": self.parameters.system, "tools": tool_schemas(TOOLS)},
                {"role": "user", "content": question},
            ),
            metadata={"answer": draft.value, "chain": chain, "hop_reward": self.parameters.hop_reward},
            files={step["path"]: step["text"] for step in chain} | self._distractors(problem_id, draft),
            demo=_solution(chain, draft.value, self.thinks),
        )

    def _distractors(self, problem_id: str, trail: Trail) -> dict[str, str]:
        """Files that look like the trail's, with other values and pointers among themselves."""
        rng = random.Random(int(problem_id, 16))
        names = self._names(rng, self.parameters.distractors, taken=trail.names)
        files = {}
        for name in names:
            value = self._value(rng)
            while value == trail.value:
                value = self._value(rng)
            is_pointer = len(names) > 1 and rng.random() < 0.5
            target = rng.choice([n for n in names if n != name]) if is_pointer else ""
            files[name] = pointer_note(target) if target else value_note(value)
        return files

    def _names(self, rng: random.Random, num: int, *, taken: tuple[str, ...]) -> list[str]:
        names: list[str] = []
        while len(names) < num:
            name = "".join(rng.choice(string.ascii_lowercase) for _ in range(self.parameters.letters))
            name += "".join(rng.choice(string.digits) for _ in range(self.parameters.digits))
            if name not in names and name not in taken:
                names.append(name)
        return names

    def _value(self, rng: random.Random) -> str:
        low = 10 ** (self.parameters.value_digits - 1)
        return str(rng.randrange(low, 10 * low))


def question_about(name: str) -> str:
    """The user's question about the trail that begins at this file."""
    return f"Which number does note [{name}] lead to?"


def pointer_note(name: str) -> str:
    """Text of a file that leads on."""
    return f"see note [{name}]"


def value_note(value: str) -> str:
    """Text of the last file."""
    return f"the number is [{value}]"


def _solution(chain: list[dict[str, str]], value: str, thinks: bool) -> tuple[Mapping[str, Any], ...]:
    """One call and one tool result a file, then the value."""
    demo: list[Mapping[str, Any]] = []
    for i, step in enumerate(chain):
        call = {
            "id": f"call_{i}",
            "type": "function",
            "function": {"name": "read", "arguments": {"path": step["path"]}},
        }
        thought = {"reasoning_content": step["path"]} if thinks else {}
        demo.append({"role": "assistant", "content": "", **thought, "tool_calls": [call]})
        demo.append({"role": "tool", "tool_call_id": call["id"], "content": step["text"]})
    thought = {"reasoning_content": value} if thinks else {}
    return (*demo, {"role": "assistant", "content": value, **thought})
