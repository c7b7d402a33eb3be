"""A domain of tiny sums that needs nothing but the standard library; shipped for tests."""

from __future__ import annotations

from typing import Any

from consilience.tasks.domain import Problem
from consilience.tasks.split_domain import SplitDomain
from consilience.tasks.splits import SplitFractions, content_id


class FakeSource:
    """`a + b =` for all 0 <= a, b < side (a `Source`): side² problems and no more."""

    def __init__(self, domain: str = "fake", side: int = 100) -> None:
        self.domain = domain
        self.side = side

    def draw(self, index: int) -> tuple[str, Any] | None:
        if index >= self.side**2:
            return None
        # 7919 is prime and larger than any side used, so the draws visit every pair once.
        a, b = divmod(index * 7919 % self.side**2, self.side)
        return content_id("fake", a, b), (a, b)

    def build(self, problem_id: str, draft: tuple[int, int]) -> Problem:
        a, b = draft
        return Problem(
            id=problem_id,
            domain=self.domain,
            messages=({"role": "user", "content": f"{a} + {b} ="},),
            metadata={"answer": str(a + b)},
            demo=({"role": "assistant", "content": str(a + b)},),
        )


def FakeDomain(name: str = "fake", side: int = 100) -> SplitDomain:
    """The sums as a `Domain`, judged by exact match."""
    return SplitDomain(
        name=name,
        effort="chat",
        reward="consilience.rewards.exact_match:score",
        max_turns=1,
        max_tokens=16,
        needs_sandbox=False,
        source=FakeSource(name, side),
        fractions=SplitFractions(),
    )
