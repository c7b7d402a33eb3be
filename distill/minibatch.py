"""Which samples form a mini-batch, and in which order a mini-batch runs (post-training notes 7.2, 7.1).

Membership is drawn first, by a global shuffle, so that every mini-batch mixes teachers. Only then is each
mini-batch sorted by teacher, stably: a prediction head is loaded once for each teacher in it, and since
sorting permutes inside the mini-batch the accumulated gradient stays the same up to summation order.

Plain arrays in, plain records out; nothing here knows about tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Neighbouring samples of one mini-batch with the same teacher.

    Example: members 4 7 5 with teachers math code math → Segment("code", (7,)), Segment("math", (4, 5)).
    """

    teacher: str
    samples: tuple[int, ...]


def draw_minibatches(num_samples: int, num_minibatches: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Membership: all samples shuffled and cut into `num_minibatches` parts whose sizes differ by at most 1.

    Returns int64 index arrays that cover range(num_samples) exactly once; parts that would be empty are
    left out. ValueError if num_minibatches < 1.
    """
    if num_minibatches < 1:
        raise ValueError(f"num_minibatches is {num_minibatches}; it must be at least 1")
    order = rng.permutation(num_samples)
    return [part for part in np.array_split(order, num_minibatches) if part.size]


def sort_by_teacher(
    members: Sequence[int] | np.ndarray, teachers: Sequence[str], heads: Mapping[str, str] | None = None
) -> np.ndarray:
    """`members` ordered by their teacher's head, then by its name, otherwise as they were (stable).

    `teachers` [S] names the owner of every sample, indexed by the entries of `members`; `heads` the digest
    of each teacher's head, so that names of one checkpoint lie side by side (none: every name its own).
    """
    chosen = np.asarray(members, dtype=np.int64)
    digests = heads or {}
    rank = {name: i for i, name in enumerate(sorted(set(teachers), key=lambda n: (digests.get(n, ""), n)))}
    return chosen[np.argsort([rank[teachers[int(i)]] for i in chosen], kind="stable")]


def segments_by_teacher(
    members: Sequence[int] | np.ndarray, teachers: Sequence[str], heads: Mapping[str, str] | None = None
) -> list[Segment]:
    """The sorted mini-batch cut at each change of teacher; neighbours with one head load it once."""
    ordered: list[int] = sort_by_teacher(members, teachers, heads).tolist()
    runs = groupby(ordered, key=lambda i: teachers[i])
    return [Segment(teacher, tuple(samples)) for teacher, samples in runs]
