"""Training samples of a phase: what of the rollouts is scored, by whom, and what is left out.

A sample whose states cannot be right is masked: it leaves the loss and every denominator, and is counted.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from consilience.model.context_parallel import own_tokens
from consilience.rollout.records import FinishReason, RolloutRecord
from consilience.teachers.scheduler import ScoreRequest
from consilience.training.packing import PackedRows, pack_episodes


def training_samples(records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    """The streams that teach: of a prompt with a teacher, not aborted, with something sampled."""
    usable = [r for r in records if r.teacher and r.finish is not FinishReason.ABORT]
    return [sample for r in usable for sample in r.samples() if sample.num_sampled]


def score_request(record: RolloutRecord) -> ScoreRequest:
    """Positions whose next token the student sampled: the state at t predicts token t + 1."""
    positions = np.flatnonzero(record.loss_mask) + len(record.prompt_ids) - 1
    ids = (*record.prompt_ids, *record.token_ids)
    return ScoreRequest(record.uid, record.teacher or "", ids, tuple(positions.tolist()))


def by_teacher(record: RolloutRecord) -> list[RolloutRecord]:
    """A record with several teachers ("a+b") once for each, the teacher in its uid; others as they are."""
    names = (record.teacher or "").split("+")
    if len(names) == 1:
        return [record]
    return [replace(record, uid=f"{record.uid}@{name}", teacher=name) for name in names]


def without(
    records: Sequence[RolloutRecord], bad: Container[str]
) -> tuple[list[RolloutRecord], list[RolloutRecord]]:
    """Records to train on, and those that are masked because the states of one of their teachers are bad.

    bad  uids as scored: with several teachers the whole sample goes, or its denominator would be wrong
    """
    kept: list[RolloutRecord] = []
    masked: list[RolloutRecord] = []
    for record in records:
        is_bad = any(copy.uid in bad for copy in by_teacher(record))
        (masked if is_bad else kept).append(record)
    return kept, masked


class Span(NamedTuple):
    """Loss tokens first … stop - 1 of the `size` that a sample has."""

    first: int
    stop: int
    size: int


def own_spans(rows: PackedRows, order: Sequence[int]) -> list[Span]:
    """Which loss tokens of the samples `order` this rank has: all, or its piece's where rows are cut."""
    here = own_tokens(rows.token_ids.shape[1])
    found = []
    for sample in order:
        line = (rows.sample_index == sample) & (rows.loss_mask > 0)
        first, own = int(line[:, : here.start].sum()), int(line[:, here].sum())
        found.append(Span(first, first + own, int(line.sum())))
    return found


def pack_records(
    records: Sequence[RolloutRecord],
    row_tokens: int,
    weights: Sequence[float] | None = None,
    factors: Sequence[Sequence[float] | np.ndarray] | None = None,
    arrays: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> PackedRows:
    """Prompt and episode of each record as one sample; each sampled token has the sample's weight, or 1.

    factors  [N] of each record, by which its tokens' weights are multiplied; None: 1 where it was sampled
    arrays   name -> [N] of each record, for what the loss needs of each token besides
    """
    weights = [1.0] * len(records) if weights is None else weights
    factors = [r.loss_mask for r in records] if factors is None else factors
    return pack_episodes(
        [r.prompt_ids for r in records],
        [r.token_ids for r in records],
        [np.asarray(own, np.float64) * weight for own, weight in zip(factors, weights, strict=True)],
        row_tokens,
        arrays,
    )
