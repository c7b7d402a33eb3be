"""Programs on lists of whole numbers, told in words: stdin to stdout (tier A), or a function (tier B).

A problem is a chain of steps and what to make of the list at its end:

    Write a Python program. It reads one line of whole numbers, does this, and prints the result:
    1. keep the even numbers
    2. add 3 to each number
    3. sort the numbers, smallest first
    4. give their sum
    For the input 4 7 -2 10 the output is 21.

Expected values come from the steps themselves (`apply_chain`), never from running a text. The hidden cases
hold an empty list, one number, and random lists; chains that they do not tell from shorter ones are left out.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from consilience.conf.fields import setting
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import require
from consilience.tasks.splits import content_id

PROGRAM_REWARD = "consilience.rewards.program_scores:score"
FUNCTION_REWARD = "consilience.rewards.code_scores:score"
Numbers = list[int]


class Step(NamedTuple):
    """Words and code of a step, with {k} for its number, and what it does."""

    words: str
    code: str
    apply: Callable[[Numbers, int], Numbers]


STEPS = {
    "even": Step("keep the even numbers", "[x for x in xs if x % 2 == 0]",
                 lambda xs, k: [x for x in xs if not x % 2]),
    "positive": Step("keep the numbers above 0", "[x for x in xs if x > 0]",
                     lambda xs, k: [x for x in xs if x > 0]),
    "multiples": Step("keep the multiples of {k}", "[x for x in xs if x % {k} == 0]",
                      lambda xs, k: [x for x in xs if not x % k]),
    "above": Step("keep the numbers above {k}", "[x for x in xs if x > {k}]",
                  lambda xs, k: [x for x in xs if x > k]),
    "add": Step("add {k} to each number", "[x + {k} for x in xs]", lambda xs, k: [x + k for x in xs]),
    "times": Step("multiply each number by {k}", "[x * {k} for x in xs]", lambda xs, k: [x * k for x in xs]),
    "rest": Step("replace each number by its remainder modulo {k}", "[x % {k} for x in xs]",
                 lambda xs, k: [x % k for x in xs]),
    "squares": Step("square each number", "[x * x for x in xs]", lambda xs, k: [x * x for x in xs]),
    "sizes": Step("drop the sign of each number", "[abs(x) for x in xs]", lambda xs, k: [abs(x) for x in xs]),
    "sort": Step("sort the numbers, smallest first", "sorted(xs)", lambda xs, k: sorted(xs)),
    "reverse": Step("reverse the order", "xs[::-1]", lambda xs, k: xs[::-1]),
    "distinct": Step("of equal numbers keep the first", "list(dict.fromkeys(xs))",
                     lambda xs, k: list(dict.fromkeys(xs))),
    "first": Step("keep the first {k} numbers", "xs[:{k}]", lambda xs, k: xs[:k]),
    "without": Step("drop the first {k} numbers", "xs[{k}:]", lambda xs, k: xs[k:]),
    "sums": Step("replace each number by the sum of all up to it",
                 "[sum(xs[: i + 1]) for i in range(len(xs))]",
                 lambda xs, k: list(itertools.accumulate(xs))),
    "differences": Step("replace the numbers by the differences of neighbours, later minus earlier",
                        "[b - a for a, b in zip(xs, xs[1:])]",
                        lambda xs, k: [b - a for a, b in itertools.pairwise(xs)]),
}  # fmt: skip
ENDS: dict[str, tuple[str, str, Callable[[Numbers], Any]]] = {
    "list": ("give the numbers", "xs", lambda xs: xs),
    "sum": ("give their sum", "sum(xs)", sum),
    "count": ("give how many there are", "len(xs)", len),
    "largest": (
        "give the largest of them, 0 if there is none",
        "max(xs, default=0)",
        lambda xs: max(xs, default=0),
    ),
}


class Chain(NamedTuple):
    """Steps with their numbers (0 where a step has none), and an end."""

    steps: tuple[tuple[str, int], ...]
    end: str


@dataclass(frozen=True)
class NumberListsParameters:
    """The space of chains; with the defaults about a million."""

    min_steps: int = setting(2, "fewest steps", unit="steps", low=1, high=8)
    max_steps: int = setting(3, "most steps", unit="steps", low=1, high=8)
    largest_number: int = setting(9, "largest number in a step", low=2, high=100)
    num_hidden: int = setting(8, "cases kept back", unit="cases", low=4, high=64)

    def __post_init__(self) -> None:
        low, high = self.min_steps, self.max_steps
        require(low <= high, f"min_steps {low} is above max_steps {high}.")


class NumberListsSource:
    """Chains by index (a `Source`). `form`: "program" or "function"."""

    def __init__(self, domain: str, parameters: NumberListsParameters, *, form: str, seed: int) -> None:
        self.domain, self.parameters, self.form, self.seed = domain, parameters, form, seed

    def draw(self, index: int) -> tuple[str, Any] | None:
        rng = random.Random((self.seed << 40) + index)
        while True:
            chain = self._chain(rng)
            problem_id = content_id("number_lists", self.form, chain)
            if is_telling(chain, self._lists(problem_id)[:-1]):
                return problem_id, chain

    def build(self, problem_id: str, draft: Chain) -> Problem:
        *lists, shown = self._lists(problem_id)
        is_program = self.form == "program"
        inputs = [_line(xs) for xs in lists] if is_program else lists
        outputs = [apply_chain(draft, xs) for xs in lists]
        metadata = {"inputs": inputs, "outputs": [_line(y) for y in outputs] if is_program else outputs}
        metadata |= {"checker": "tokens"} if is_program else {"function": "solve"}
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=({"role": "user", "content": question(draft, shown, self.form)},),
            metadata=metadata,
            demo=({"role": "assistant", "content": f"```python\n{solution(draft, self.form)}```"},),
        )

    def _chain(self, rng: random.Random) -> Chain:
        names = rng.sample(list(STEPS), rng.randint(self.parameters.min_steps, self.parameters.max_steps))
        numbers = range(2, self.parameters.largest_number + 1)
        steps = tuple((n, rng.choice(numbers) if "{k}" in STEPS[n].words else 0) for n in names)
        return Chain(steps, rng.choice(list(ENDS)))

    def _lists(self, problem_id: str) -> list[Numbers]:
        """The inputs of the hidden cases, and last the one that is shown."""
        rng = random.Random(int(problem_id, 16))
        lists = [[], [rng.randint(-20, 20)]]
        while len(lists) < self.parameters.num_hidden + 1:
            lists.append([rng.randint(-20, 20) for _ in range(rng.randint(4, 12))])
        return lists


def is_telling(chain: Chain, lists: list[Numbers]) -> bool:
    """Whether the cases tell the chain from one without a step, and have many answers."""
    outputs = [apply_chain(chain, xs) for xs in lists]
    others = [Chain(chain.steps[:i] + chain.steps[i + 1 :], chain.end) for i in range(len(chain.steps))]
    answers = {str(output) for output in outputs}
    return 2 * len(answers) >= len(lists) and all(
        [apply_chain(other, xs) for xs in lists] != outputs for other in others
    )


def apply_chain(chain: Chain, numbers: Numbers) -> Any:
    """What the chain makes of a list: a list or a number."""
    for name, k in chain.steps:
        numbers = STEPS[name].apply(numbers, k)
    return ENDS[chain.end][2](numbers)


def question(chain: Chain, shown: Numbers, form: str) -> str:
    """The task in words, with one case."""
    words = [STEPS[name].words.format(k=k) for name, k in chain.steps] + [ENDS[chain.end][0]]
    result = apply_chain(chain, shown)
    if form == "program":
        first = (
            "Write a Python program. It reads one line of whole numbers, does this, and prints the result:"
        )
        last = (
            f"For the input {_line(shown).strip()} the output is {_line(result).strip() or 'an empty line'}."
        )
    else:
        first = "Write a Python function solve(numbers). It does this with a list of whole numbers:"
        last = f"solve({shown}) is {result}."
    return "\n".join([first, *(f"{i}. {text}" for i, text in enumerate(words, 1)), last])


def solution(chain: Chain, form: str) -> str:
    """The chain as Python text."""
    lines = [f"xs = {STEPS[name].code.replace('{k}', str(k))}" for name, k in chain.steps]
    end = ENDS[chain.end][1]
    if form == "program":
        shown = "*xs" if chain.end == "list" else end
        return "\n".join(["xs = [int(word) for word in input().split()]", *lines, f"print({shown})", ""])
    body = [f"    {line}\n" for line in ("xs = numbers", *lines, f"return {end}")]
    return "def solve(numbers):\n" + "".join(body)


def _line(value: Any) -> str:
    return " ".join(map(str, value if isinstance(value, list) else [value])) + "\n"
