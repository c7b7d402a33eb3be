"""What the reverse KL does to rows of logits, in PyTorch; `triton_kl_rows.py` is the same on a GPU.

A row's statistics are eight numbers from which everything about it follows, and which combine over parts of
the vocabulary (blocks of a kernel, ranks):

    0 m_s   largest student logit            4 m_t    largest teacher logit
    1 S_s   Σ e^(z_s − m_s)                  5 S_t    Σ e^(z_t − m_t)
    2 A     Σ e^(z_s − m_s) (z_s − z_t)      6 agree  1 if a token has both largest logits
    3 B     Σ e^(z_s − m_s) (z_s − m_s)      7 z_y    student logit of the target, −inf if not here

    c = (m_s − m_t) + log(S_s / S_t)    lse_s − lse_t, without subtracting two large numbers
    K = A / S_s − c,  entropy = log S_s − B / S_s,  log p_y = z_y − m_s − log S_s
    ∂K/∂z_v = p_v (z_s − z_t − c − K)

Shapes: c rows, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NUM_STATISTICS = 8


def row_pass(
    z_s: Tensor,
    z_t: Tensor,
    target: Tensor | None,
    weight: Tensor,
    g: Tensor,
    wants_gradient: bool,
    merge: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Statistics [c, 8] of student and teacher logits z_s, z_t [c, V]; fills g [c, V] with ω ∂K/∂z_s.

    target [c] column of the sampled token, −1 if it lies on another rank; None gives z_y = −inf. weight
    [c]. g is scratch where no gradient is wanted. `merge` makes the whole vocabulary's statistics out of
    this part's. z_s and z_t are overwritten.
    """
    m_s, m_t = z_s.amax(-1, keepdim=True), z_t.amax(-1, keepdim=True)
    agree = z_s.eq(m_s).logical_and_(z_t == m_t).any(-1)
    z_y = torch.full_like(m_s[:, 0], -torch.inf)
    if target is not None:
        chosen = z_s.gather(1, target.long().clamp_min(0)[:, None]).squeeze(1)
        z_y = torch.where(target >= 0, chosen, z_y)
    S_t = torch.exp(torch.sub(z_t, m_t, out=g), out=g).sum(-1)
    torch.sub(z_s, z_t, out=z_t)
    torch.exp(z_s.sub_(m_s), out=g)
    S_s, A, B = g.sum(-1), torch.linalg.vecdot(g, z_t), torch.linalg.vecdot(g, z_s)
    columns = [m_s.squeeze(1), S_s, A, B, m_t.squeeze(1), S_t, agree.to(A.dtype), z_y]
    here = torch.stack(columns, dim=1)
    statistics = here if merge is None else merge(here)
    if wants_gradient:
        # g holds e^(z − own maximum); the whole vocabulary's may be larger.
        share = torch.exp(here[:, 0] - statistics[:, 0]) / statistics[:, 1]
        z_t.sub_((statistics[:, 2] / statistics[:, 1])[:, None])  # c + K = A / S_s
        g.mul_(z_t).mul_((share * weight)[:, None])
    return statistics


def difference(statistics: Tensor) -> Tensor:
    """c = lse_s − lse_t [n] of statistics [n, 8]."""
    m_s, S_s, _, _, m_t, S_t, _, _ = statistics.unbind(1)
    return (m_s - m_t) + torch.log(S_s / S_t)


def divergence(statistics: Tensor) -> Tensor:
    """K [n] in nats of statistics [n, 8]."""
    return statistics[:, 2] / statistics[:, 1] - difference(statistics)


def summary(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """kl, entropy, log-probability of the target, top-1 agreement, each [n]."""
    m_s, S_s, _, B, _, _, agree, z_y = statistics.unbind(1)
    log_sum = torch.log(S_s)
    return divergence(statistics), log_sum - B / S_s, z_y - m_s - log_sum, agree.clone()


def merged(parts: Tensor) -> Tensor:
    """Statistics [c, 8] of the whole vocabulary from those of its parts [R, c, 8], added in their order."""
    m_s, S_s, A, B, m_t, S_t, agree, z_y = parts.unbind(2)
    top_s, top_t = m_s.amax(0), m_t.amax(0)
    scale_s, scale_t = torch.exp(m_s - top_s), torch.exp(m_t - top_t)
    shifted = B + (m_s - top_s) * S_s
    sums = [_in_order(scale_s * x) for x in (S_s, A, shifted)]
    has_both = (m_s == top_s) & (m_t == top_t) & (agree > 0)
    last = [top_t, _in_order(scale_t * S_t), has_both.any(0).to(A.dtype), z_y.amax(0)]
    return torch.stack([top_s, *sums, *last], dim=1)


def _in_order(parts: Tensor) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
