"""The GRPO objective as DeepSeek-V3.2 states it, on packed tokens (post-training notes 2.3).

    r_t  = π_θ(o_t) / π_old(o_t)                       π_old: the sampler's own probability
    s_t  = min(r_t A, clip(r_t, 1 − ε, 1 + ε) A)
    KL_t = r_t (ρ_t − log ρ_t − 1),  ρ_t = π_ref / π_θ   (K3 times the ratio: value and gradient unbiased)
    M_i  = 0 if A_i < 0 and mean_t log(π_old / π_θ) > δ, else 1
    loss = −1/S Σ_i 1/|o_i| Σ_t (w_t s_t M_i − β KL_t)

w_t is 1, or what `corrections.py` makes of a sampler that disagrees; π_old in r_t is then the trainer's own,
while M_i keeps the sampler's. M and w act on the surrogate only. M and 1/|o_i| need whole sequences, so a
sample is never split across micro-batches, and where ranks cut rows its sums go over them; with S, the kept
samples of the mini-batch, handed in from outside, the number of micro-batches changes no gradient.

Shapes: n sampled tokens of all samples, flat; S kept samples of the mini-batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.grpo.by_sample import Samples
from consilience.model.ranks import Ranks

CLIP_EPS = 0.2
KL_BETA = 1e-3
MASK_DELTA = 0.1


class GrpoLoss(NamedTuple):
    """loss: scalar with gradient; sums: what `shares` turns into metrics after summing micro-batches."""

    loss: Tensor
    sums: dict[str, float]


def grpo_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    ref_logprob: Tensor,
    advantage: Tensor,
    sample_index: Tensor,
    num_samples: float,
    *,
    clip_eps: float = CLIP_EPS,
    kl_beta: float = KL_BETA,
    mask_delta: float = MASK_DELTA,
    weight: Tensor | None = None,
    sampler_logprob: Tensor | None = None,
    share: Tensor | None = None,
) -> GrpoLoss:
    """Loss of one micro-batch of whole samples, already divided by the mini-batch's `num_samples`.

    logprob [n] log π_θ of the sampled tokens, carries the gradient; old_logprob [n] the sampler's;
    ref_logprob [n] the SFT reference's; advantage [n] A_i of the token's sample; sample_index [n] int ≥ 0,
    equal for the tokens of one sample, gaps allowed; num_samples S > 0. Tokens that were not sampled are
    not passed in. n = 0 gives loss 0. weight [n] w_t, None: 1; sampler_logprob [n] what M_i reads where
    old_logprob is not the sampler's. share [n], equal for the tokens of one sample: the part of one of the S
    that the sample is, where several samples are one episode; None: each is one.

    `sums`: tokens, samples, clipped (tokens whose clip binds), abs_log_ratio Σ|log r|, kl Σ KL_t,
    masked_tokens, masked_samples, and max_abs_log_ratio, the one that combines by maximum.

    EngineError if old or reference log-probs are not finite: a token without a sampler's log-prob must
    leave the mask before this point, never be filled in. ValueError on shapes or an S that make no sense.
    """
    inputs = (logprob, old_logprob, ref_logprob, advantage, sample_index)
    _check(*inputs, num_samples=num_samples)
    old, ref, A = (x.detach().to(logprob.dtype) for x in (old_logprob, ref_logprob, advantage))
    samples = Samples(sample_index, logprob.dtype)
    sample, length = samples.of, samples.length

    log_ratio = logprob - old
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    surrogate = torch.minimum(ratio * A, clipped * A)
    log_rho = ref - logprob
    kl = ratio * (torch.expm1(log_rho) - log_rho)

    since = log_ratio if sampler_logprob is None else logprob - sampler_logprob.detach().to(logprob.dtype)
    drift = samples.sums(-since) / length
    is_masked = (A < 0) & (drift > mask_delta)[sample]
    surrogate = surrogate if weight is None else surrogate * weight.detach().to(logprob.dtype)
    per_token = kl_beta * kl - torch.where(is_masked, 0.0, surrogate)
    if share is not None:
        per_token = per_token * share.detach().to(logprob.dtype)
    loss = (per_token / length[sample]).sum() / num_samples

    with torch.no_grad():
        is_clipped = torch.where(A >= 0, ratio > 1 + clip_eps, ratio < 1 - clip_eps) & (A != 0)
        size = log_ratio.abs()
        sums = {
            "tokens": float(logprob.numel()),
            "samples": samples.reported(),
            "clipped": float(is_clipped.sum()),
            "abs_log_ratio": float(size.sum()),
            "kl": float(kl.sum()),
            "masked_tokens": float(is_masked.sum()),
            "masked_samples": samples.reported(is_masked),
            "max_abs_log_ratio": float(size.max()) if size.numel() else 0.0,
        }
    return GrpoLoss(loss, sums)


def shares(sums: dict[str, float]) -> dict[str, float]:
    """Summed `sums` as the figures to report: shares and means over tokens (masked share over samples)."""
    tokens, samples = max(sums["tokens"], 1.0), max(sums["samples"], 1.0)
    found = {"mtp_loss": sums["mtp_loss"] / tokens} if "mtp_loss" in sums else {}
    return found | {
        "clip_share": sums["clipped"] / tokens,
        "mean_abs_log_ratio": sums["abs_log_ratio"] / tokens,
        "max_abs_log_ratio": sums["max_abs_log_ratio"],
        "mean_kl": sums["kl"] / tokens,
        "masked_share": sums["masked_samples"] / samples,
    }


def combine(left: dict[str, float], right: dict[str, float]) -> dict[str, float]:
    """Sums of two micro-batches as one; `max_…` keys by maximum, all others added."""
    keys = left.keys() | right.keys()
    pairs = {key: (left.get(key, 0.0), right.get(key, 0.0)) for key in keys}
    return {key: max(pair) if key.startswith("max_") else sum(pair) for key, pair in pairs.items()}


def summed(ranks: Ranks, sums: dict[str, float]) -> dict[str, float]:
    """Sums of this rank's micro-batches, {} where it had none, as those of all, added in their order."""
    return functools.reduce(combine, ranks.gather(sums))


def _check(
    logprob: Tensor, old: Tensor, ref: Tensor, advantage: Tensor, sample_index: Tensor, *, num_samples: float
) -> None:
    shapes = [list(x.shape) for x in (logprob, old, ref, advantage, sample_index)]
    if logprob.dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"shapes {shapes}; all five must be [n], one entry for each sampled token")
    if not num_samples > 0:
        raise ValueError(f"num_samples is {num_samples}; skip the step when no sample is kept")
    for name, values in (("sampler", old), ("reference", ref), ("advantage", advantage)):
        num_bad = int((~torch.isfinite(values)).sum())
        if num_bad:
            what = "advantages" if name == "advantage" else f"{name} log-probs"
            raise EngineError(
                f"{num_bad} of {values.numel()} {what} are not finite; every token of the loss needs one: "
                "drop the token from mask and denominator before the loss"
            )
