"""Distillation loss of one teacher's share of a mini-batch (post-training notes 6.1 and 6.3).

    L = Σ_e w_e Σ_t m_t K_t / N,   N = loss tokens of the whole mini-batch, all teachers together

K_t is the exact reverse KL of `model/kernels/reverse_kl.py`; here it only gets its weight. Every loss token
of a mini-batch counts the same but for its teacher's w_e, and since N comes from outside, neither the
order of teachers nor the number of micro-batches changes a gradient.

Shapes: n tokens, V vocabulary, D student width, Dt teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.conf.errors import ConfigError
from consilience.model.kernels.reverse_kl import ReverseKL, reverse_kl


class DistillLoss(NamedTuple):
    """loss: scalar with gradient; sums to report, over loss tokens; tokens: the per-token values."""

    loss: Tensor
    sums: dict[str, float]
    tokens: ReverseKL


def denominators(loss_tokens: Mapping[str, int], normalisation: str = "tokens") -> dict[str, float]:
    """N for each teacher of a mini-batch, from its loss tokens by teacher.

    "tokens" (default): N is the mini-batch's total, every loss token equal. "teacher": N is the teacher's
    own count, so that w_e means what the sum over teachers says even where lengths differ by domain.
    Teachers without loss tokens are left out. ConfigError on another word.
    """
    counts = {teacher: float(count) for teacher, count in loss_tokens.items() if count > 0}
    if normalisation == "teacher":
        return counts
    if normalisation != "tokens":
        raise ConfigError(f"distill.normalisation is '{normalisation}'; it must be 'tokens' or 'teacher'")
    return dict.fromkeys(counts, sum(counts.values()))


def token_weights(loss_mask: Tensor, teacher_weight: float, num_loss_tokens: float) -> Tensor:
    """[n] fp32 weight w_e · m_t / N of each token; 0 where the mask is 0.

    loss_mask [n] 1 for tokens the student sampled; teacher_weight w_e ≥ 0; num_loss_tokens N > 0 over the
    mini-batch. ValueError outside these ranges.
    """
    if not num_loss_tokens > 0:
        raise ValueError(f"num_loss_tokens is {num_loss_tokens}; skip a mini-batch without loss tokens")
    if not (teacher_weight >= 0 and math.isfinite(teacher_weight)):
        raise ValueError(f"teacher weight is {teacher_weight}; it must be finite and at least 0")
    return loss_mask.to(torch.float32) * (teacher_weight / num_loss_tokens)


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    teacher_weight: float,
    num_loss_tokens: float,
    target_ids: Tensor | None = None,
    loss_mask: Tensor | None = None,
    chunk_tokens: int = 256,
) -> DistillLoss:
    """Weighted reverse KL of tokens that share one teacher.

    student_hidden [n, D] with gradient, student_head [V, D], teacher_hidden [n, Dt], teacher_head [V, Dt];
    target_ids [n] the sampled tokens (for the student's log-prob); loss_mask [n], all ones if None.

    `sums`: tokens (of the mask), kl, student_entropy, top1_agreement (sums over them), max_kl, and
    sampled_logprob where targets were given. ValueError as `reverse_kl` and `token_weights`.
    """
    mask = student_hidden.new_ones(student_hidden.shape[0]) if loss_mask is None else loss_mask
    weight = token_weights(mask, teacher_weight, num_loss_tokens)
    out = reverse_kl(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        weight,
        chunk_tokens,
        target_ids=target_ids,
    )
    chosen = mask > 0
    kl = out.kl[chosen]
    sums = {
        "tokens": float(chosen.sum()),
        "kl": float(kl.sum()),
        "student_entropy": float(out.student_entropy[chosen].sum()),
        "top1_agreement": float(out.top1_agreement[chosen].sum()),
        "max_kl": float(kl.max()) if kl.numel() else 0.0,
    }
    if out.sampled_logprob is not None:
        sums["sampled_logprob"] = float(out.sampled_logprob[chosen].sum())
    return DistillLoss(out.loss, sums, out)
