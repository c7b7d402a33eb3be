"""From logits to tokens: temperature, draws by inverse CDF, and the verdict on a draft. Plain mathematics.

Every draw is a function of the uniform number handed in, so a stream's tokens depend on its own random
numbers alone. R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.exact import log_softmax
from consilience.model.kernels import decode_head
from consilience.model.kernels.choice import uses_triton


def tempered(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V], temperature [R] -> log-probabilities [R, V] fp32 and probabilities [R, V] fp64.

    Temperature 0 is greedy: all probability lies on the first of the highest logits, while the
    log-probabilities are those of temperature 1.
    """
    is_greedy = temperature <= 0
    scale = torch.where(is_greedy, 1.0, temperature).to(logits.device, torch.float32)
    logprobs = log_softmax(logits.float() / scale[:, None])
    probabilities = logprobs.double().exp()
    if is_greedy.any():
        rows = is_greedy.nonzero()[:, 0].to(logits.device)
        probabilities[rows] = 0.0
        probabilities[rows, logits[rows].argmax(-1)] = 1.0
    return logprobs, probabilities


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability, [R] each: `draw` from what `tempered` makes of the logits.

    logits [R, V], temperature [R] fp32 and uniform [R] fp64 in [0, 1), these two on the host or beside the
    logits. On a GPU by kernels that ask the host nothing, but in exact mode by those of the definition.
    """
    if uses_triton(logits):
        from consilience.model.kernels import triton_sampler

        device = logits.device
        return triton_sampler.sample(logits, temperature.to(device), uniform.to(device))
    if decode_head.is_available(logits):
        return decode_head.draw(logits, temperature, uniform)
    logprobs, probabilities = tempered(logits, temperature)
    tokens = draw(probabilities, uniform)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inverse CDF: [R]. Rows of probabilities [R, V] sum to any positive number.

    uniform [R] in [0, 1).
    """
    cumulative = probabilities.cumsum(-1)
    target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=cumulative.shape[-1] - 1)


def accept(p: Tensor, q: Tensor, draft: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """A token of p from a draft of q: token [R], is_accepted bool [R].

    p, q [R, V] fp64, draft [R] drawn from q, uniform [R, 2] in [0, 1). The draft stands with probability
    min(1, p/q), else the token comes from the positive part of p − q: either way it follows p, whatever q is
    (Leviathan et al. 2023, theorem 1; arXiv 2211.17192). A q that is not finite is never believed.
    """
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    at, uniform = draft[:, None], uniform.to(p)
    is_accepted = uniform[:, 0] * q.gather(1, at)[:, 0] < p.gather(1, at)[:, 0]
    rest = (p - q).clamp_(min=0)
    # Nothing is left where p and q are equal (a draft is refused there by rounding only) or q is not finite.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    return torch.where(is_accepted, draft, draw(rest, uniform[:, 1])), is_accepted
