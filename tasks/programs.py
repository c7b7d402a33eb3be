"""The string functions of the code domain: their space, their source text, what they compute.

Nothing is executed here: outputs come from the terms, so that the expected values of hidden cases
never depend on running code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from consilience.conf.errors import TaskError
from consilience.tasks.parameters import require

# Name -> (variable that holds the transformed characters, its definition, what it does to one). Every
# transform is recognisable in the output: it maps the alphabet outside itself.
TRANSFORMS = {
    "upper": ("X", "x.upper()", str.upper),
    "mark": ("M", "[c+'!' for c in x]", lambda c: c + "!"),
}


class Term(NamedTuple):
    """kind "index" (value: the position, transform: a name or "") or "literal" (value: the text)."""

    kind: str
    value: int | str
    transform: str = ""


@dataclass(frozen=True)
class ProgramSpace:
    """All programs of `min_terms`..`max_terms` terms over strings of `length` distinct letters."""

    length: int
    min_terms: int
    max_terms: int
    alphabet: str
    transforms: tuple[str, ...]
    literals: str

    def __post_init__(self) -> None:
        letters = set(self.alphabet)
        require(
            len(letters) == len(self.alphabet) and self.alphabet.isascii() and self.alphabet.islower(),
            f"alphabet {self.alphabet!r}: distinct lower-case ASCII letters are needed.",
        )
        require(
            self.alphabet.isalpha() and len(letters) > self.length,
            f"alphabet {self.alphabet!r}: more than {self.length} letters (`length`) are needed.",
        )
        require(
            self.min_terms <= self.max_terms,
            f"min_terms {self.min_terms} is above max_terms {self.max_terms}.",
        )
        for name in self.transforms:
            if name not in TRANSFORMS:
                raise TaskError(f"unknown transform {name!r}; allowed: {', '.join(TRANSFORMS)}.")
        require(
            len(set(self.literals)) == len(self.literals) and all(c in "0123456789" for c in self.literals),
            f"literals {self.literals!r}: distinct digits are needed.",
        )

    @property
    def num_programs(self) -> int:
        """Programs that differ in what they compute on some input (no two texts are equivalent)."""
        choices = self.length * (1 + len(set(self.transforms))) + len(self.literals)
        return sum(choices**n for n in range(self.min_terms, self.max_terms + 1))


def term_source(term: Term) -> str:
    """`x[3]`, `X[3]` (a transform) or `str(7)`: equally many tokens for a tokenizer that splits at signs."""
    if term.kind == "literal":
        return f"str({term.value})"
    return f"{TRANSFORMS[term.transform][0] if term.transform else 'x'}[{term.value}]"


def expression_of(program: tuple[Term, ...]) -> str:
    """`x[2]+X[3]+str(4)+x[0]`."""
    return "+".join(term_source(term) for term in program)


def source_of(program: tuple[Term, ...], transforms: tuple[str, ...] = ()) -> str:
    """The program as a Python function `f`, with the variables of `transforms` defined first."""
    lines = [f" {name}={text}\n" for name, text, _ in (TRANSFORMS[t] for t in transforms)]
    return f"def f(x):\n{''.join(lines)} return ({expression_of(program)})"


def apply_term(term: Term, x: str) -> str:
    """What the term adds to the output on input `x`."""
    if term.kind == "literal":
        return str(term.value)
    character = x[int(term.value)]
    return TRANSFORMS[term.transform][2](character) if term.transform else character


def apply_program(program: tuple[Term, ...], x: str) -> str:
    """f(x)."""
    return "".join(apply_term(term, x) for term in program)
