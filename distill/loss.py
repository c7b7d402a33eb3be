"""Distillation loss of one teacher's share of a mini-batch (post-training notes 6.1 and 6.3).

    L = Σ_i ω_i Σ_t m_t K_t,     ω_i the weight of each loss token of sample i

K_t is the objective, by default the exact reverse KL; here it only gets its weight. Every ω comes from counts
over the whole mini-batch, so neither the order of teachers nor the number of micro-batches or ranks changes
a gradient.

Shapes: n tokens, V vocabulary, D student width, Dt teacher width.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from consilience.conf.errors import ConfigError
from consilience.distill.objectives import Objective, ObjectiveLoss, objective_loss

NORMALISATIONS = ("tokens", "teacher", "sequences")
REVERSE_KL = Objective()


class DistillLoss(NamedTuple):
    """loss: scalar with gradient; sums to report, over loss tokens; tokens: the per-token values."""

    loss: Tensor
    sums: dict[str, float]
    tokens: ObjectiveLoss


def sample_weights(
    num_tokens: Sequence[int],
    teachers: Sequence[str],
    teacher_weights: Mapping[str, float],
    normalisation: str = "tokens",
    num_teachers: Sequence[int] | None = None,
) -> list[float]:
    """ω of each loss token of each sample of a mini-batch, w_e of its teacher included.

    num_tokens  loss tokens of each sample;  teachers  its owner;  teacher_weights  w_e ≥ 0 by teacher
    num_teachers  how many teachers its trajectory has, which then stands here once for each (all 1 if
                  None): its tokens are counted once, so L is the sum over teachers of w_e KL_e

    "tokens" (default)  w_e / all loss tokens: every token equal, long samples dominate
    "teacher"           w_e / the teacher's own: w_e means what the sum over teachers says, even where
                        lengths differ by domain
    "sequences"         w_e / (samples · the sample's own): every sample equal

    A sample without loss tokens has weight 0. ConfigError on another word, ValueError on a w_e that is
    not finite or below 0.
    """
    if normalisation not in NORMALISATIONS:
        raise ConfigError(
            f"distill.normalisation is '{normalisation}'; it must be one of {', '.join(NORMALISATIONS)}"
        )
    for name in set(teachers):
        if not (teacher_weights[name] >= 0 and math.isfinite(teacher_weights[name])):
            raise ValueError(
                f"weight of teacher '{name}' is {teacher_weights[name]}; it must be finite and at least 0"
            )
    own: Counter[str] = Counter()
    for name, count in zip(teachers, num_tokens, strict=True):
        own[name] += count
    shared = num_teachers or [1] * len(num_tokens)
    total = sum(Fraction(count, n) for count, n in zip(num_tokens, shared, strict=True))
    num_samples = sum(Fraction(count > 0, n) for count, n in zip(num_tokens, shared))
    weights = []
    for name, count in zip(teachers, num_tokens):
        divisor = {"tokens": int(total), "teacher": own[name], "sequences": int(num_samples) * count}
        weights.append(teacher_weights[name] / divisor[normalisation] if count else 0.0)
    return weights


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    *,
    objective: Objective = REVERSE_KL,
    target_ids: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> DistillLoss:
    """Weighted objective of tokens that share one teacher.

    student_hidden [n, D] with gradient, student_head [V, D], teacher_hidden [n, Dt], teacher_head [V, Dt];
    weight [n] ω, 0 where a token has no loss; target_ids [n] the sampled tokens, where the objective
    needs them.

    `sums`: tokens (of weight above 0), objective, kl (exact, whatever the objective), student_entropy,
    top1_agreement (sums over them), max_kl. ValueError as `objective_loss`.
    """
    out = objective_loss(
        objective,
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        weight,
        chunk_tokens,
        target_ids=target_ids,
    )
    chosen = weight > 0
    kl = out.kl[chosen]
    sums = {
        "tokens": float(chosen.sum()),
        "objective": float(out.value[chosen].sum()),
        "kl": float(kl.sum()),
        "student_entropy": float(out.student_entropy[chosen].sum()),
        "top1_agreement": float(out.top1_agreement[chosen].sum()),
        "max_kl": float(kl.max()) if kl.numel() else 0.0,
    }
    return DistillLoss(out.loss, sums, out)
