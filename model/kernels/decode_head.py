"""Logits of few rows and draws from them on a CPU (decode_head.c).

The twins in PyTorch: `nn.functional.linear`, and a log-softmax whose exponentials are summed up to the draw.

R rows, D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library
from consilience.model.kernels.decode_moe import MOST_OUTS, SIDE
from consilience.model.kernels.decode_step import MOST_ROWS

GROUP = 64  # as in the C file


def is_available(*tensors: Tensor) -> bool:
    """Whether few rows can go through the compiled kernels: fp32 on the CPU, no gradients, not exact mode."""
    if torch.is_grad_enabled() or exact.is_on():
        return False
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and tensors[0].shape[:-1].numel() <= MOST_ROWS and not isinstance(library("decode_head"), str)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [..., D] times weight [V, D] transposed: [..., V]."""
    (size, width), rows = weight.shape, hidden.shape[:-1]
    found, work = hidden.new_empty(*rows, size), hidden.new_empty(SIDE * (width + MOST_OUTS))
    arguments = (hidden.contiguous(), weight.contiguous(), found, work)
    call("decode_head", "head_logits", rows.numel(), width, size, *arguments)
    return found


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [R] int64 by inverse CDF and their log-probabilities [R].

    logits [R, V], temperature [R] fp32, 0 greedy: the first of the highest, its log-probability that of
    temperature 1; uniform [R] fp64 in [0, 1). A row with logits that are not finite gets a log-probability
    that is not.
    """
    num_rows, size = logits.shape
    tokens, logprobs = torch.empty(num_rows, dtype=torch.int64), logits.new_empty(num_rows)
    work, groups = logits.new_empty(size), torch.empty(size // GROUP + 1, dtype=torch.float64)
    given = (logits.contiguous(), temperature.contiguous(), uniform.contiguous())
    call("decode_head", "head_draw", num_rows, size, *given, tokens, logprobs, work, groups)
    return tokens, logprobs
