"""Paired bootstrap: how sure a score, a gain or a retention is.

Legend: P problems, R resamples. Models are compared on the same problems, so one resample draws
problem indices once and reads every model at them: what the problems' difficulty adds to two
scores cancels in their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 1 << 22  # indices drawn at once: 32 MiB of int64


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and the percentile interval (2.5 %, 97.5 %) of its bootstrap distribution."""

    value: float
    ci95: tuple[float, float]


def score(correct: ArrayLike, *, seed: int = 0, num_resamples: int = 10_000) -> Estimate:
    """Mean of `correct` [P], each 0 to 1. ValueError if it is empty or not finite."""
    (values_P,) = _aligned(correct)
    return _estimate(float(values_P.mean()), _resampled_means([values_P], seed, num_resamples)[0])


def gain(after: ArrayLike, before: ArrayLike, *, seed: int = 0, num_resamples: int = 10_000) -> Estimate:
    """mean(after) - mean(before) on the same problems, [P] and [P] in the same order.

    ValueError on different lengths.
    """
    after_P, before_P = _aligned(after, before)
    difference_P = after_P - before_P
    return _estimate(float(difference_P.mean()), _resampled_means([difference_P], seed, num_resamples)[0])


def retention(
    student: ArrayLike,
    base: ArrayLike,
    specialist: ArrayLike,
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
) -> Estimate:
    """(student - base) / (specialist - base), three times [P]: the share of a gain that was kept.

    NaN where the specialist is not better than base: there is nothing to retain. Resamples in
    which it is not are left out of the interval (NaN, NaN if that is all of them).
    """
    arrays = _aligned(student, base, specialist)
    student_R, base_R, specialist_R = _resampled_means(arrays, seed, num_resamples)
    is_better_R = specialist_R > base_R
    ratio_R = (student_R - base_R)[is_better_R] / (specialist_R - base_R)[is_better_R]
    student_mean, base_mean, specialist_mean = (float(a.mean()) for a in arrays)
    if specialist_mean <= base_mean:
        return Estimate(float("nan"), (float("nan"), float("nan")))
    return _estimate((student_mean - base_mean) / (specialist_mean - base_mean), ratio_R)


def _aligned(*arrays: ArrayLike) -> list[NDArray[np.float64]]:
    values = [np.asarray(a, dtype=np.float64).ravel() for a in arrays]
    lengths = {v.size for v in values}
    if len(lengths) != 1:
        raise ValueError(f"paired statistics need the same problems, got {sorted(lengths)} of them")
    if lengths == {0}:
        raise ValueError("statistics of no problems")
    if not all(np.isfinite(v).all() for v in values):
        raise ValueError("a score is not finite; leave failed gradings out of every model alike")
    return values


def _resampled_means(
    arrays: Sequence[NDArray[np.float64]], seed: int, num_resamples: int
) -> NDArray[np.float64]:
    """[len(arrays), R] means over the same resampled problems."""
    stacked = np.stack(arrays)
    num_problems = stacked.shape[1]
    rng = np.random.default_rng(seed)
    rows = max(1, CHUNK // num_problems)
    means = np.empty((len(arrays), num_resamples))
    for start in range(0, num_resamples, rows):
        stop = min(start + rows, num_resamples)
        index_RP = rng.integers(num_problems, size=(stop - start, num_problems))
        means[:, start:stop] = stacked[:, index_RP].mean(axis=2)
    return means


def _estimate(value: float, samples_R: NDArray[np.float64]) -> Estimate:
    if samples_R.size == 0:
        return Estimate(value, (float("nan"), float("nan")))
    low, high = np.percentile(samples_R, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)))


def paired(
    models: dict[str, dict[str, float]],
) -> dict[str, list[float]]:
    """model -> problem -> correct, cut down to the problems every model has a grade for.

    A failed grading is absent, never 0; dropping the problem everywhere keeps the pairs aligned.
    Values come in the order of the sorted problem ids.
    """
    if not models:
        return {}
    common = sorted(set.intersection(*(set(grades) for grades in models.values())))
    return {name: [grades[p] for p in common] for name, grades in models.items()}
