"""How far a trainer's probabilities are from the sampler's, on the tokens that the sampler drew.

    d_t = log π(o_t) − log μ(o_t)              π: trainer, μ: sampler
    k1  = mean_t −d_t                          KL(μ ‖ π), unbiased, of either sign
    k3  = mean_t (exp d_t − 1 − d_t)           KL(μ ‖ π), unbiased, never negative (Schulman's estimators)

n sampled tokens, flat.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUNDS = (0.5, 5.0)
"""Ratios that count as in bounds: the reference bounds of IcePop (post-training notes 2.4)."""


@torch.no_grad()
def mismatch_sums(log_ratio: Tensor, bounds: tuple[float, float] = BOUNDS) -> dict[str, float]:
    """Sums of d [n] that `mismatch_report` makes figures of; `grpo.loss.combine` joins two."""
    d = log_ratio.double()
    ratio = d.exp()
    is_out = (ratio < bounds[0]) | (ratio > bounds[1])
    sums = torch.stack((-d.sum(), (torch.expm1(d) - d).sum(), is_out.sum().double())).tolist()
    return {
        "sampler_tokens": float(d.numel()),
        "sampler_k1": sums[0],
        "sampler_k3": sums[1],
        "sampler_out": sums[2],
        "max_sampler_gap": float(d.abs().max()) if d.numel() else 0.0,
    }


def mismatch_report(sums: dict[str, float]) -> dict[str, float]:
    """sampler_kl_k1, sampler_kl_k3, sampler_gap_max = max |d|, sampler_out_of_bounds (share), and of a
    replayed routing: routing_differs (share of compared (token, layer) pairs whose free choice is another
    set) and routing_replayed (share of all pairs that had a record). What was not measured is left out."""
    found = {}
    if (tokens := sums.get("sampler_tokens", 0.0)) > 0:
        found = {
            "sampler_kl_k1": sums["sampler_k1"] / tokens,
            "sampler_kl_k3": sums["sampler_k3"] / tokens,
            "sampler_gap_max": sums["max_sampler_gap"],
            "sampler_out_of_bounds": sums["sampler_out"] / tokens,
        }
    if (pairs := sums.get("routing_pairs", 0.0)) > 0:
        found["routing_differs"] = sums["routing_differing"] / max(sums["routing_compared"], 1.0)
        found["routing_replayed"] = sums["routing_compared"] / pairs
    return found
