"""Code: a small Python function from input/output examples, judged by running it.

The default problem shows

    abcdef -> c,D,4,a
    ghijkl -> i,J,4,g

and is solved by

    def f(x):
     X=x.upper()
     return (x[2]+X[3]+str(4)+x[0])

Every term and every output character has its own fixed number of tokens, and the shown inputs are the
alphabet in order (`example_inputs`), so the program follows from a few facts (c is x[2], D is X[3]).
The hidden cases have fresh random inputs; they stay in the metadata, and the judge
(`rewards/code_scores.py`) runs the candidate in a sandbox that never sees the expected outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilience.conf.fields import setting
from consilience.tasks.domain import Problem
from consilience.tasks.parameters import require
from consilience.tasks.programs import ProgramSpace, Term, apply_term, expression_of
from consilience.tasks.splits import content_id

REWARD = "consilience.rewards.code_scores:score"
MIN_PROGRAMS = 100_000


@dataclass(frozen=True)
class CodeParameters:
    """The space of programs (22^4 = 234,256 by default; at least 10^5) and how it is shown."""

    length: int = setting(6, "characters of an input", unit="characters", low=1, high=20)
    min_terms: int = setting(4, "fewest terms of a program", unit="terms", low=1, high=32)
    max_terms: int = setting(4, "most terms of a program", unit="terms", low=1, high=32)
    alphabet: str = setting("abcdefghijklmnopqrstuvwxyz", "letters inputs are drawn from; more than `length`")
    transforms: tuple[str, ...] = setting(
        ("upper",), "what may happen to an indexed character", choices=("upper", "mark")
    )
    literals: str = setting("0123456789", "characters that may stand as literals; empty: none")
    literal_share: float = setting(0.2, "share of terms that are literals", low=0, high=1)
    transform_share: float = setting(0.25, "share of indexed terms with a transform", low=0, high=1)
    num_examples: int = setting(2, "examples shown", unit="cases", low=1, high=16)
    num_hidden: int = setting(6, "cases kept back", unit="cases", low=5, high=64)
    example_inputs: str = setting(
        "ordered",
        "ordered: the examples' inputs are the first letters of the alphabet, then the next; "
        "consecutive: letters in alphabetical order from a random one; random: any",
        choices=("ordered", "consecutive", "random"),
    )
    show_positions: bool = setting(False, "show each input character followed by its index")
    input_separator: str = setting("", "shown between input characters")
    output_separator: str = setting(",", "shown between output characters")
    quote_output: bool = setting(False, "show the output as a sum of quoted characters")
    work: str = setting(
        "expression",
        "think mode: demonstrations think the sum first, or each output character with its index",
        choices=("expression", "characters", "none"),
    )
    pass_reward: float = setting(
        0.0, "reward of passing all but few cases, times the share passed", low=0, high=0.9
    )

    def space(self) -> ProgramSpace:
        """The programs. TaskError if there are fewer than 10^5."""
        space = ProgramSpace(
            self.length, self.min_terms, self.max_terms, self.alphabet, tuple(self.transforms), self.literals
        )
        require(
            space.num_programs >= MIN_PROGRAMS,
            f"code: {space.num_programs} possible programs, at least {MIN_PROGRAMS} are needed; "
            "raise length, max_terms, transforms or literals.",
        )
        needed = self.length * self.num_examples
        if self.example_inputs == "consecutive":
            needed = self.length + self.num_examples
        require(
            self.example_inputs == "random" or len(self.alphabet) >= needed,
            f"code: {self.num_examples} {self.example_inputs} examples of length {self.length} need "
            f"{needed} letters, the alphabet has {len(self.alphabet)}; give more letters or "
            "example_inputs=random.",
        )
        return space


class CodeSource:
    """Problems of the `string_programs` dataset (a `Source`). Imports reasoning_gym (2 s)."""

    def __init__(self, domain: str, parameters: CodeParameters, *, effort: str, seed: int) -> None:
        from consilience.tasks.program_dataset import StringProgramsConfig, StringProgramsDataset

        self.domain = domain
        self.parameters = parameters
        self.space = parameters.space()
        self.work = parameters.work if effort != "chat" else "none"
        self.dataset = StringProgramsDataset(
            StringProgramsConfig(
                space=self.space,
                num_examples=parameters.num_examples,
                example_inputs=parameters.example_inputs,
                num_hidden=parameters.num_hidden,
                literal_share=parameters.literal_share,
                transform_share=parameters.transform_share,
                seed=seed << 40,
                size=1 << 40,
            )
        )

    @property
    def num_programs(self) -> int:
        return self.space.num_programs

    def draw(self, index: int) -> tuple[str, Any] | None:
        program = self.dataset.program(index)
        return content_id("code", expression_of(program)), program

    def build(self, problem_id: str, draft: tuple[Term, ...]) -> Problem:
        entry = self.dataset.entry(draft)
        cases = entry["metadata"]
        demo = {"role": "assistant", "content": entry["answer"]}
        if self.work == "expression":
            demo["reasoning_content"] = expression_of(draft)
        elif self.work == "characters":
            x = cases["examples"][0][0]
            demo["reasoning_content"] = "".join(f"{apply_term(term, x)}{term.value}" for term in draft)
        metadata = {
            "inputs": cases["hidden_inputs"],
            "outputs": cases["hidden_outputs"],
            "answer": entry["answer"],
            "pass_reward": self.parameters.pass_reward,
        }
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=({"role": "user", "content": self._question(cases["examples"])},),
            metadata=metadata,
            demo=(demo,),
        )

    def _question(self, examples: list[list[str]]) -> str:
        shown = self.parameters
        lines = []
        for x, y in examples:
            characters = [c + str(i) for i, c in enumerate(x)] if shown.show_positions else list(x)
            output = '"' + '" + "'.join(y) + '"' if shown.quote_output else shown.output_separator.join(y)
            lines.append(f"{shown.input_separator.join(characters)} -> {output}")
        return "\n".join(lines)
