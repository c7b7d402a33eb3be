"""What a trainer does about a sampler that computes other probabilities than itself: weights of the loss.

    ρ_t = π(o_t) / μ(o_t)      π: the trainer with the weights it starts a phase with, μ: the sampler

All are constants to the gradient, and all are off unless asked for. The proximal ratio of the loss is then
π_θ / π, and these stand in front of it (post-training notes 2.4; the three policies are verl's bookkeeping).

n sampled tokens of all samples, flat; S samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.grpo.by_sample import Samples

Bounds = tuple[float, float]


def truncated_importance(log_ratio: Tensor, most: float) -> Tensor:
    """Truncated importance sampling: min(ρ_t, most), [n]. Of bounded variance; no token is lost."""
    return log_ratio.detach().exp().clamp(max=most)


def masked_importance(log_ratio: Tensor, bounds: Bounds) -> Tensor:
    """Masked importance sampling (IcePop): ρ_t within the bounds, 0 outside of them, [n]."""
    ratio = log_ratio.detach().exp()
    return torch.where(_within(ratio, bounds), ratio, torch.zeros_like(ratio))


def sequence_mask(log_ratio: Tensor, sample_index: Tensor, bounds: Bounds) -> Tensor:
    """1 for the tokens of samples whose ∏_t ρ_t lies within the bounds, else 0, [n].

    Biased against long samples: a product of more factors leaves the bounds sooner.
    """
    total, _, sample = _by_sample(log_ratio, sample_index)
    return _within(total.exp(), bounds).to(log_ratio.dtype)[sample]


def geometric_mask(log_ratio: Tensor, sample_index: Tensor, bounds: Bounds) -> Tensor:
    """1 for the tokens of samples whose (∏_t ρ_t)^(1/|o|) lies within the bounds, else 0, [n]."""
    total, length, sample = _by_sample(log_ratio, sample_index)
    return _within((total / length).exp(), bounds).to(log_ratio.dtype)[sample]


def sequence_truncated(log_ratio: Tensor, sample_index: Tensor, most: float) -> Tensor:
    """min(∏_t ρ_t, most) for all tokens of a sample, [n]: unbiased below `most`, of large variance."""
    total, _, sample = _by_sample(log_ratio, sample_index)
    return total.exp().clamp(max=most)[sample]


@dataclass(frozen=True)
class Corrections:
    """Which of them a stage uses; None: not this one. At most one weight, and any masks, are multiplied.

    token_truncate     `truncated_importance` at this ratio
    token_mask         `masked_importance` within these
    sequence_truncate  `sequence_truncated` at this ratio
    sequence_mask      `sequence_mask` within these
    geometric_mask     `geometric_mask` within these
    """

    token_truncate: float | None = None
    token_mask: Bounds | None = None
    sequence_truncate: float | None = None
    sequence_mask: Bounds | None = None
    geometric_mask: Bounds | None = None

    @property
    def is_on(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def weights(self, log_ratio: Tensor, sample_index: Tensor) -> Tensor:
        """[n] weights of log ρ [n] fp32 or fp64; sample_index [n] int, equal for the tokens of one sample."""
        weight = torch.ones_like(log_ratio).detach()
        if self.token_truncate is not None:
            weight = weight * truncated_importance(log_ratio, self.token_truncate)
        if self.token_mask is not None:
            weight = weight * masked_importance(log_ratio, self.token_mask)
        if self.sequence_truncate is not None:
            weight = weight * sequence_truncated(log_ratio, sample_index, self.sequence_truncate)
        if self.sequence_mask is not None:
            weight = weight * sequence_mask(log_ratio, sample_index, self.sequence_mask)
        if self.geometric_mask is not None:
            weight = weight * geometric_mask(log_ratio, sample_index, self.geometric_mask)
        return weight


def _within(ratio: Tensor, bounds: Bounds) -> Tensor:
    return (ratio >= bounds[0]) & (ratio <= bounds[1])


def _by_sample(log_ratio: Tensor, sample_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ_t log ρ_t [S], lengths [S], and each token's sample [n] among these."""
    samples = Samples(sample_index, log_ratio.dtype)
    return samples.sums(log_ratio), samples.length, samples.of
