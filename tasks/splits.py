"""Train, validation and test by the content of a problem, so that they cannot overlap.

The split of a problem is a function of its content id alone: u = hash(id) in [0, 1) falls into the
test, the validation or the train interval. Nothing else (the seed, the difficulty knobs, how many
problems were asked for, the order they were generated in) takes part, so a problem that is held out
once is held out for every seed and every size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from consilience.conf.errors import TaskError
from consilience.conf.fields import nearest, setting
from consilience.tasks.domain import Domain
from consilience.tasks.parameters import require

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class SplitFractions:
    """Expected share of all problems in each split; they sum to 1.

    Two runs that are to agree on what is held out need the same `validation` and `test`.
    """

    train: float = setting(0.8, "share of the training split", low=0, high=1)
    validation: float = setting(0.1, "share of the validation split", low=0, high=1)
    test: float = setting(0.1, "share of the held-out test split", low=0, high=1)

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.test)
        require(min(shares) >= 0, f"split shares {shares}: each lies in [0, 1].")
        require(
            abs(sum(shares) - 1) < 1e-9, f"split shares {shares} sum to {sum(shares):g}; they must sum to 1."
        )


def content_id(*parts: Any) -> str:
    """20 hex digits of a sha256 over JSON-plain parts; equal exactly where the parts are equal."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def split_of(problem_id: str, fractions: SplitFractions) -> str:
    """The split of a problem, from its id alone."""
    u = int.from_bytes(hashlib.sha256(f"split:{problem_id}".encode()).digest()[:8], "big") / 2.0**64
    if u < fractions.test:
        return "test"
    return "validation" if u < fractions.test + fractions.validation else "train"


def check_split_name(split: str) -> None:
    """TaskError unless `split` is one of the three."""
    if split not in SPLITS:
        raise TaskError(f"no split {split!r}; {nearest(str(split), SPLITS)}")


def check_disjoint(domains: Mapping[str, Domain], num: Mapping[str, int]) -> dict[str, int]:
    """Distinct problems seen in each split over all given domains (say, one domain at many seeds).

    `num` says how many problems to take of each split. TaskError names the first problem found in
    two splits, or twice in one split of one domain.
    """
    owner: dict[str, tuple[str, str]] = {}
    seen: dict[str, set[str]] = {split: set() for split in num}
    for name, domain in domains.items():
        for split, count in num.items():
            ids = [problem.id for problem in domain.problems(split, count)]
            if len(set(ids)) != len(ids):
                raise TaskError(
                    f"domain {name}: split {split!r} repeats {len(ids) - len(set(ids))} problems."
                )
            for problem_id in ids:
                first, first_domain = owner.setdefault(problem_id, (split, name))
                if first != split:
                    raise TaskError(
                        f"problem {problem_id} is in {first!r} of {first_domain} and in {split!r} of {name}; "
                        "use the same split fractions for both."
                    )
            seen[split].update(ids)
    return {split: len(ids) for split, ids in seen.items()}
