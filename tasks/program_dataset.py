"""Small string functions as a reasoning-gym dataset, registered as `string_programs`.

A program is a sum of terms over its argument, a string x of fixed length: an indexed character
(`x[3]`), a transformed one (`X[3]` with `X=x.upper()`), or a literal (`str(7)`). With distinct
characters in the example inputs each output character names its term, so one example already
determines the program.
Importing this file imports reasoning_gym (2 s).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reasoning_gym.factory import ProceduralDataset, register_dataset

from consilience.tasks.programs import ProgramSpace, Term, apply_program, expression_of, source_of

NAME = "string_programs"


@dataclass
class StringProgramsConfig:
    """The space of programs and how many cases are shown and kept back."""

    space: ProgramSpace
    num_examples: int = 2
    num_hidden: int = 6
    example_inputs: str = "random"
    literal_share: float = 0.2
    transform_share: float = 0.25
    seed: int | None = None
    size: int = 500


class StringProgramsDataset(ProceduralDataset):
    """question: the visible examples; answer: the program; metadata: terms, examples, hidden cases."""

    def __init__(self, config: StringProgramsConfig) -> None:
        super().__init__(config=config, seed=config.seed, size=config.size)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        program = self.program(idx)
        return self.entry(program, idx)

    def program(self, idx: int) -> tuple[Term, ...]:
        """The idx-th random program."""
        config: StringProgramsConfig = self.config
        rng = random.Random(self.seed + idx)
        num_terms = rng.randint(config.space.min_terms, config.space.max_terms)
        return tuple(self._term(rng) for _ in range(num_terms))

    def entry(self, program: tuple[Term, ...], idx: int = -1) -> dict[str, Any]:
        """The whole problem of a program: its cases are a function of the program alone."""
        config: StringProgramsConfig = self.config
        source = source_of(program, config.space.transforms)
        rng = random.Random(
            int.from_bytes(hashlib.sha256(expression_of(program).encode()).digest()[:8], "big")
        )
        inputs = self._example_inputs(rng)
        while len(inputs) < config.num_examples + config.num_hidden:
            x = "".join(rng.sample(config.space.alphabet, config.space.length))
            if x not in inputs:
                inputs.append(x)
        outputs = [apply_program(program, x) for x in inputs]
        shown = config.num_examples
        return {
            "question": "\n".join(f"{x} -> {y}" for x, y in zip(inputs[:shown], outputs[:shown])),
            "answer": source,
            "metadata": {
                "source_dataset": NAME,
                "source_index": idx,
                "examples": [list(pair) for pair in zip(inputs[:shown], outputs[:shown])],
                "hidden_inputs": inputs[shown:],
                "hidden_outputs": outputs[shown:],
                "difficulty": {"num_terms": (config.space.min_terms, config.space.max_terms)},
            },
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        """1.0 for the reference text, else 0.0; running a candidate is `rewards/code_scores.py`'s part."""
        return float(answer is not None and answer.strip() == entry["answer"])

    def _example_inputs(self, rng: random.Random) -> list[str]:
        """Inputs of the shown cases, unless random: runs of the alphabet, `abcdef`, `ghijkl`, … in
        order, or starting anywhere (`consecutive`)."""
        config: StringProgramsConfig = self.config
        letters, length, shown = config.space.alphabet, config.space.length, config.num_examples
        if config.example_inputs == "random":
            return []
        starts: Sequence[int] = [i * length for i in range(shown)]
        if config.example_inputs == "consecutive":
            starts = rng.sample(range(len(letters) - length + 1), shown)
        return [letters[start : start + length] for start in starts]

    def _term(self, rng: random.Random) -> Term:
        config: StringProgramsConfig = self.config
        space = config.space
        if space.literals and rng.random() < config.literal_share:
            return Term("literal", rng.choice(space.literals))
        transform = ""
        if space.transforms and rng.random() < config.transform_share:
            transform = rng.choice(space.transforms)
        return Term("index", rng.randrange(space.length), transform)


register_dataset(NAME, StringProgramsDataset, StringProgramsConfig)
