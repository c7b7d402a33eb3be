"""Guards against the published failures of on-policy distillation (post-training notes 12, rows 1, 2 and 5).

    failure          seen as                                               one switch away (`distill.guard.…`)
    length           samples cut at their limit, or longer than at first   ramp_phases, reference_weight
    repetition       n-grams that a sample has had before                  mask_repeated, reference_weight
    eos              end of text likely to one of the two models only      eos_weight
    late             KL of a sample's last tokens far above its first's    late_weight, horizon

All are measured in every phase and warned of; a counter-measure is off until it is asked for, as each changes
what is trained. Thresholds are our own: the sources publish none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from consilience.rollout.records import FinishReason, RolloutRecord

ADVICE = {
    "length": "ramp_phases=N or reference_weight=0.1",
    "repetition": "mask_repeated=true or reference_weight=0.1",
    "eos": "eos_weight=4, after the special tokens were compared",
    "late": "late_weight=0.3 or horizon=0.3",
}


@dataclass(frozen=True)
class GuardSettings:
    """What counts as a failure, and what is done against it; defaults do nothing but warn.

    max_truncated   share of samples cut at their limit;  max_growth  mean length over the first phase's
    ngram           length of the n-grams;  max_repeated  share of them seen before, in a sample that repeats
    max_repeating   share of such samples
    max_eos_gap     between the two models' probability of ending, where the student does or does not
    max_late_ratio  KL of the last three tenths of a sample over that of the first three
    mask_repeated   samples that repeat leave loss and denominators
    ramp_phases     phases until samples may have their full length, from `ramp_from` of it; 0: at once
    late_weight     weight of a sample's last token relative to its first, linear between
    eos_weight      weight of the end of text relative to other tokens
    horizon         share of a sample's tokens that are trained on, from its first
    eos             token id, None: ends are not looked at
    """

    max_truncated: float = 0.3
    max_growth: float = 2.0
    ngram: int = 8
    max_repeated: float = 0.5
    max_repeating: float = 0.1
    max_eos_gap: float = 0.3
    max_late_ratio: float = 3.0
    mask_repeated: bool = False
    ramp_phases: int = 0
    ramp_from: float = 0.25
    late_weight: float = 1.0
    eos_weight: float = 1.0
    horizon: float = 1.0
    eos: int | None = None


def repeated_share(token_ids: Sequence[int] | np.ndarray, n: int) -> float:
    """Share of the n-grams of a text that occurred earlier in it; 0 where it has none.

    Example, n = 2: 1 2 1 2 1 → 12 21 12 21, of which the last two are repeats: 0.5.
    """
    ids = np.asarray(token_ids, np.int64)
    if len(ids) < n:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(ids, n)
    return 1.0 - len(np.unique(grams, axis=0)) / len(grams)


def guard_samples(
    records: Sequence[RolloutRecord], settings: GuardSettings
) -> tuple[list[RolloutRecord], dict[str, float]]:
    """The samples to train on, cut and masked as asked for, and what was measured on all of them.

    length_mean (sampled tokens), truncated_share, repeated_share (mean over samples), repeating_share,
    masked_repeated (samples). If all repeat, all stay: there would be nothing to train on.
    """
    if not records:
        return [], {}
    shares = [
        repeated_share(np.asarray(r.token_ids)[np.asarray(r.loss_mask) > 0], settings.ngram) for r in records
    ]
    repeats = [share > settings.max_repeated for share in shares]
    kept = [r for r, is_repeat in zip(records, repeats) if not is_repeat]
    kept = kept if settings.mask_repeated and kept else list(records)
    num = len(records)
    numbers = {
        "length_mean": sum(r.num_sampled for r in records) / num,
        "truncated_share": sum(r.finish is FinishReason.LENGTH for r in records) / num,
        "repeated_share": sum(shares) / num,
        "repeating_share": sum(repeats) / num,
        "masked_repeated": float(num - len(kept)),
    }
    return [cut_at(r, settings.horizon) for r in kept], numbers


def cut_at(record: RolloutRecord, horizon: float) -> RolloutRecord:
    """The record up to a share of its sampled tokens (at least one); the rest is neither run nor scored."""
    if horizon >= 1:
        return record
    sampled = np.flatnonzero(np.asarray(record.loss_mask))
    end = int(sampled[max(1, round(horizon * len(sampled))) - 1]) + 1
    if end == len(record.token_ids):
        return record
    columns = ("token_ids", "logprobs", "loss_mask", "weight_version")
    cut = {name: tuple(getattr(record, name)[:end]) for name in columns}
    return replace(record, **cut, routing=None, kept=None)


def token_factors(record: RolloutRecord, settings: GuardSettings) -> np.ndarray:
    """[N] factor of each token's weight, 0 where it was not sampled; the mean over sampled tokens is 1.

    So a sample's share of the loss stays what the normalisation says, and only its tokens' shares change.
    """
    mask = np.asarray(record.loss_mask, np.float64)
    if settings.late_weight == 1 and settings.eos_weight == 1:
        return mask
    place = np.cumsum(mask) - 1
    factor = 1 + (settings.late_weight - 1) * place / max(mask.sum() - 1, 1)
    if settings.eos is not None:
        factor[np.asarray(record.token_ids) == settings.eos] *= settings.eos_weight
    factor *= mask
    return factor * mask.sum() / factor.sum() if mask.any() else mask


def length_share(step: int, settings: GuardSettings) -> float:
    """Share of its full length that a sample of phase `step` (from 0) may have."""
    if step >= settings.ramp_phases:
        return 1.0
    return settings.ramp_from + (1 - settings.ramp_from) * step / settings.ramp_phases


def full_length(numbers: Mapping[str, float], step: int, settings: GuardSettings) -> float:
    """Mean length of a phase, as it would be at the full length where the ramp held it short."""
    return numbers["length_mean"] / length_share(step, settings)


def failures(
    numbers: Mapping[str, float], first_length: float | None, settings: GuardSettings, step: int = 0
) -> dict[str, float]:
    """1 for each failure that the numbers of a phase show, else 0: guard_length, guard_repetition, …

    numbers       of `guard_samples` and `TokenWatch.numbers`; what is missing shows nothing
    first_length  `full_length` of the first phase
    step          phase, from 0: while the ramp holds samples short, being cut is what was asked for
    """
    is_free = length_share(step, settings) == 1
    found = {
        "length": is_free
        and (
            numbers.get("truncated_share", 0) > settings.max_truncated
            or numbers.get("length_mean", 0) > settings.max_growth * (first_length or float("inf"))
        ),
        "repetition": numbers.get("repeating_share", 0) > settings.max_repeating,
        "eos": max(numbers.get("eos_gap_at_end", 0), numbers.get("eos_gap_elsewhere", 0))
        > settings.max_eos_gap,
        "late": numbers.get("late_ratio", 0) > settings.max_late_ratio,
    }
    return {f"guard_{name}": float(is_seen) for name, is_seen in found.items()}


def spoken(flags: Mapping[str, float]) -> str:
    """The failures of `flags` with the switch against each, for the progress line; "" for none."""
    seen = [name for name in ADVICE if flags.get(f"guard_{name}")]
    return "; ".join(f"{name}: distill.guard.{ADVICE[name]}" for name in seen)
