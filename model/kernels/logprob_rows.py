"""Log-probabilities and entropies through a prediction head on a CPU, chunk by chunk (logprob_rows.c).

The twin is `_LinearLogprob` in linear_logprob.py: there a chunk's logits are passed over nine times forward
and eleven backward. Here logits are kept as they come from the product, with the log of their sum.

n tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model import exact
from consilience.model.kernels.compiled import call, library
from consilience.model.kernels.head_products import project


def is_available(*tensors: Tensor) -> bool:
    """Whether rows of these, widened to fp32, go through the compiled kernel: on the CPU, not exact."""
    fits = all(t.device.type == "cpu" and t.dtype != torch.float64 for t in tensors)
    return fits and not exact.is_on() and not isinstance(library("logprob_rows"), str)


def run(
    hidden: Tensor, head: Tensor, target_ids: Tensor, settings: tuple[int, float, int]
) -> tuple[Tensor, Tensor]:
    """logprob, entropy [n] of hidden [n, D], head [V, D], both fp32, and target_ids [n].

    settings: tokens of a chunk, temperature, bytes that may be kept for the backward.
    """
    return _LogprobRows.apply(hidden, head.contiguous(), target_ids.long().contiguous(), settings)  # type: ignore[return-value]


def _logits(hidden: Tensor, head: Tensor, temperature: float, out: Tensor) -> Tensor:
    project(hidden, head, out)
    return out if temperature == 1.0 else out.div_(temperature)


class _LogprobRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, settings: tuple[int, float, int]
    ) -> tuple[Tensor, Tensor]:
        chunk, temperature, keep_bytes = settings
        (n, _), V = hidden.shape, head.shape[0]
        lse, logprob, entropy = hidden.new_empty(3, n).unbind(0)
        is_kept = 0 < n * V * hidden.itemsize <= keep_bytes
        kept = hidden.new_empty(n if is_kept else 0, V)
        buffer = hidden.new_empty(0 if is_kept else min(chunk, n), V)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            logits = kept[rows] if is_kept else buffer[:size]
            _logits(hidden[rows], head, temperature, logits)
            found = (target_ids[rows], lse[rows], logprob[rows], entropy[rows])
            call("logprob_rows", "logprob_forward", size, V, logits, *found)
        ctx.save_for_backward(hidden, head, target_ids, lse, entropy, kept)
        ctx.settings = (chunk, temperature, is_kept)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden, head, target_ids, lse, entropy, kept = ctx.saved_tensors
        chunk, temperature, is_kept = ctx.settings
        d_logprob, d_entropy = (grad.contiguous() for grad in grads)
        (n, _), V = hidden.shape, head.shape[0]
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        buffer = hidden.new_empty(min(chunk, n), V)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            g = buffer[:size]
            logits = kept[rows] if is_kept else _logits(hidden[rows], head, temperature, g)
            given = (target_ids[rows], lse[rows], entropy[rows], d_logprob[rows], d_entropy[rows], g)
            call("logprob_rows", "logprob_backward", size, V, temperature, logits, *given)
            if d_hidden is not None:
                torch.mm(g, head, out=d_hidden[rows])
            if d_head is not None:
                d_head.addmm_(g.t(), hidden[rows])
        return d_hidden, d_head, None, None
