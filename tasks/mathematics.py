"""Mathematics: any of reasoning-gym's generators, by default the sum of two numbers of three digits.

The default problem reads `795+670`; its worked solution thinks the columns, units first, each with its
carry, `5+0+0=05 9+7+0=16 7+6+1=14`, and answers `1465`. What is learnt on one problem (find the digits,
add two, carry) serves all others; sums of single numbers (`chain_sum`) are a table of facts, of which a
reward on one says nothing about the next. Answers are judged by the generator's own scorer
(`rewards/reasoning_gym_scores.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilience.conf.errors import TaskError
from consilience.conf.fields import nearest, setting
from consilience.tasks.domain import Problem
from consilience.tasks.splits import content_id

REWARD = "consilience.rewards.reasoning_gym_scores:score"

# Generator -> pattern whose first group is the part of the question that is kept.
QUESTION_PATTERNS = {"chain_sum": r"problem: (.*)$", "basic_arithmetic": r"^Calculate (.*)\.$"}

# Generator -> its settings where none are given. The generators whose work can be shown.
DEFAULTS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 4, "max_terms": 4, "min_digits": 1, "max_digits": 1},
    "basic_arithmetic": {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 3,
        "max_digits": 3,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
}


@dataclass(frozen=True)
class MathematicsParameters:
    """Which generator, how hard. Two terms of three digits make 810,000 distinct problems."""

    generator: str = setting("basic_arithmetic", "a dataset name of reasoning-gym whose answers are text")
    params: dict[str, Any] = setting(
        {}, "the generator's own settings, over ours (DEFAULTS); size: where it cannot be endless"
    )
    question_pattern: str | None = setting(
        None, "regular expression whose first group is the question kept; null: the built-in one, if any"
    )
    compact: bool = setting(True, "sums: no spaces in the question")
    work: str = setting(
        "auto",
        "sums in think mode: demonstrations think the columns (additions only), the running totals, each "
        "step, or nothing; auto: columns where they can, else totals",
        choices=("auto", "columns", "totals", "steps", "none"),
    )
    partial_credit: bool = setting(
        False, "reward what reasoning-gym gives an answer that merely contains the right one"
    )


class MathematicsSource:
    """Problems of one reasoning-gym generator (a `Source`). Construction imports reasoning_gym (2 s)."""

    def __init__(self, domain: str, parameters: MathematicsParameters, *, effort: str, seed: int) -> None:
        self.domain = domain
        self.parameters = parameters
        self.settings = DEFAULTS.get(parameters.generator, {}) | parameters.params
        self.dataset = open_generator(parameters.generator, self.settings, seed=seed)
        self.pattern = _compile(parameters.question_pattern or QUESTION_PATTERNS.get(parameters.generator))
        is_sum = parameters.generator in DEFAULTS
        self.work = self._work(parameters.work) if effort != "chat" and is_sum else "none"
        self.is_compact = parameters.compact and is_sum

    def _work(self, asked: str) -> str:
        adds_only = self.settings.get("operators") == ["+"] and not self.settings.get("allow_negation", True)
        if asked == "columns" and not adds_only:
            raise TaskError(
                "work 'columns' shows sums of whole numbers; give generator basic_arithmetic with params "
                "{operators: ['+'], allow_negation: false}, or take work: totals"
            )
        has_products = {"*", "/"} & set(self.settings.get("operators", ()))
        if asked == "auto":
            return "columns" if adds_only else "none" if has_products else "totals"
        return asked

    def draw(self, index: int) -> tuple[str, Any] | None:
        if index >= len(self.dataset):
            return None
        entry = self.dataset[index]
        if not isinstance(entry.get("answer"), str):
            raise TaskError(
                f"generator {self.parameters.generator!r} gives no text answer "
                f"({type(entry.get('answer')).__name__}); choose one that does, such as 'chain_sum'."
            )
        match = self.pattern.search(entry["question"]) if self.pattern else None
        question = match.group(1) if match else entry["question"]
        problem_id = content_id("mathematics", question)
        return problem_id, (question.replace(" ", "") if self.is_compact else question, entry)

    def build(self, problem_id: str, draft: Any) -> Problem:
        question, entry = draft
        demo = {"role": "assistant", "content": entry["answer"]}
        if self.work != "none":
            demo["reasoning_content"] = WORK[self.work](entry["metadata"]["expression"])
        metadata = {
            "generator": self.parameters.generator,
            "params": self.settings,
            "entry": _json_plain(entry),
            "answer": entry["answer"],
            "partial_credit": self.parameters.partial_credit,
        }
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=({"role": "user", "content": question},),
            metadata=metadata,
            demo=(demo,),
        )


def running_totals(expression: str) -> str:
    """`4 + 7 - 2 + 5` -> `11 9 14`: the total after each operator."""
    first, *rest = expression.split()
    total, totals = int(first), []
    for sign, term in zip(rest[::2], rest[1::2]):
        total += int(term) if sign == "+" else -int(term)
        totals.append(str(total))
    return " ".join(totals)


def steps(expression: str) -> str:
    """`4 + 7 - 2 + 5` -> `4+7=11-2=9+5=14`: every operation with its two numbers side by side."""
    first, *rest = expression.split()
    totals = running_totals(expression).split()
    return first + "".join(f"{s}{t}={total}" for s, t, total in zip(rest[::2], rest[1::2], totals))


def columns(expression: str) -> str:
    """`795 + 670` -> `5+0+0=05 9+7+0=16 7+6+1=14`: each column's digits and carry, units first.

    Every column has as many characters as the others. `expression` is a sum of whole numbers.
    """
    terms = expression.split(" + ")
    width = max(map(len, terms))
    carry, shown = 0, []
    for place in range(1, width + 1):
        digits = [int(term[-place]) if place <= len(term) else 0 for term in terms]
        total = sum(digits) + carry
        shown.append("+".join(map(str, [*digits, carry])) + f"={total:02d}")
        carry = total // 10
    return " ".join(shown)


WORK = {"columns": columns, "totals": running_totals, "steps": steps}


def open_generator(name: str, params: Mapping[str, Any], *, seed: int, size: int = 10_000_000) -> Any:
    """The reasoning-gym dataset `name`, practically endless.

    `seed` is spread over 32 bits: reasoning-gym draws item i from `seed + i`, so neighbouring
    seeds would give the same problems in another order. TaskError on an unknown name or setting.
    """
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise TaskError(f"reasoning-gym has no generator {name!r}; {nearest(name, DATASETS)}")
    spread = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big") % (2**32 - size)
    own = {"seed": spread, "size": size}
    try:
        return reasoning_gym.create_dataset(name, **(own | dict(params)))
    except (TypeError, ValueError, AssertionError) as error:
        raise TaskError(f"generator {name!r} refuses its settings {dict(params)}: {error}") from error


def _compile(pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise TaskError(f"question_pattern {pattern!r} is no regular expression: {error}.") from error
    if compiled.groups < 1:
        raise TaskError(f"question_pattern {pattern!r} has no group; put the part to keep in parentheses.")
    return compiled


def _json_plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(entry), default=str))
