"""Top-k, top-p and min-p: which tokens a draw may give, and the draw from those alone. Plain mathematics.

In this order, as transformers has them: the k most probable tokens; of these the fewest whose probability
reaches p of theirs; of all those with at least min-p times the highest probability. The most probable token
always stays. Nothing asks the host, so that a step can be captured.

R rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consilience.model.exact import log_softmax
from consilience.rollout.sampling import draw

NO_CUT = (0.0, 1.0, 0.0)


def kept_tokens(logprobs: Tensor, cut: Tensor) -> Tensor:
    """bool [R, V] from log-probabilities [R, V] and cut [R, 3] fp64: k (0: all), p and min-p of each row."""
    top_k, top_p, min_p = (x[:, None] for x in cut.to(logprobs.device).unbind(1))
    order = logprobs.sort(dim=-1, descending=True, stable=True)
    p = order.values.double().exp()
    rank = torch.arange(p.shape[1], device=p.device)
    is_kept = (top_k <= 0) | (rank < top_k)
    among = p * is_kept
    before = among.cumsum(-1) - among
    is_kept &= (top_p >= 1) | (before < top_p * among.sum(-1, keepdim=True))
    is_kept &= p >= min_p * p[:, :1]
    is_kept[:, 0] = True
    return torch.zeros_like(is_kept).scatter_(1, order.indices, is_kept)


def renormalised(logits: Tensor, is_kept: Tensor) -> Tensor:
    """Log-probabilities [R, V] over the kept tokens [R, V] alone; −∞ at the others."""
    return log_softmax(logits.masked_fill(~is_kept, float("-inf")))


def sample_kept(
    logits: Tensor, temperature: Tensor, uniform: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, its log-probability among the kept ones, [R] each, and these as `bits_of`.

    logits [R, V]; temperature [R] fp32, 0 greedy and not to be cut; uniform [R] fp64 in [0, 1); cut as above.
    """
    device = logits.device
    temperature = temperature.to(device)
    is_greedy = temperature <= 0
    scaled = logits.float() / torch.where(is_greedy, 1.0, temperature)[:, None]
    is_kept = kept_tokens(log_softmax(scaled), cut)
    logprobs = renormalised(scaled, is_kept)
    best = torch.zeros_like(logprobs, dtype=torch.float64).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    tokens = draw(torch.where(is_greedy[:, None], best, logprobs.double().exp()), uniform.to(device))
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0], bits_of(is_kept)


def bits_of(is_kept: Tensor) -> Tensor:
    """bool [R, V] -> uint8 [R, ⌈V/8⌉], the first token in the lowest bit."""
    whole = torch.nn.functional.pad(is_kept, (0, -is_kept.shape[1] % 8)).unflatten(1, (-1, 8))
    powers = 2 ** torch.arange(8, device=is_kept.device)
    return (whole * powers).sum(-1).to(torch.uint8)


def ids_of(bits: np.ndarray) -> np.ndarray:
    """Ascending ids of the bits [⌈V/8⌉] uint8 that are set."""
    return np.flatnonzero(np.unpackbits(bits, bitorder="little")).astype(np.uint32)
