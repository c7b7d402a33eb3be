"""Log-probability of chosen tokens and entropy, straight from hidden states and the prediction head.

    z = h Wᵀ / τ,   logprob = z_y − lse(z),   entropy = −Σ_v p_v log p_v,   p = softmax(z)

and, with upstream gradients a (of logprob) and b (of entropy),

    ∂/∂z_v = a·(1[v = y] − p_v) − b·p_v·(log p_v + entropy)

Tokens go through in chunks, so no more than a few [chunk, V] buffers live at once. The SFT loss, the
GRPO policy and the reference all read their log-probabilities here. `linear_logprob_dense` is the
definition to read; `linear_logprob` is the one to run (post-training notes 7.5, kernel notes 4), on a GPU
through `gpu_linear_logprob.py`.

Shapes: n tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model import exact
from consilience.model.kernels import logprob_rows
from consilience.model.kernels.choice import can_use_triton
from consilience.model.kernels.head_products import compute_dtype, default_chunk, project

KEEP_BYTES = 64 * 2**20
"""Below this size the log-probabilities of all tokens are kept for backward; above, chunks are recomputed."""


GPU_KEEP_BYTES = 2 * 2**30
"""The same on a GPU, where a token's share is kept in 16 bits: 8,192 tokens of V4's vocabulary fit."""


class LinearLogprob(NamedTuple):
    """logprob [n] and entropy [n], fp32 (fp64 if an input is fp64), both differentiable."""

    logprob: Tensor
    entropy: Tensor


def linear_logprob(
    hidden: Tensor,
    head: Tensor,
    target_ids: Tensor,
    chunk_tokens: int | None = None,
    temperature: float = 1.0,
    *,
    keep_bytes: int | None = None,
    head_grad: Tensor | None = None,
) -> LinearLogprob:
    """Log-probability of each target and entropy of each row.

    hidden [n, D], head [V, D] any float type; target_ids [n] integer in [0, V). Logits, softmax and the
    accumulated head gradient are fp32 (fp64 if an input is fp64); gradients come back in the types of
    hidden and head. An empty n gives empty outputs and zero gradients. ValueError on shapes that do not
    fit, on a target outside the vocabulary, on temperature or chunk_tokens not above 0.

    `keep_bytes` bounds what is stored for backward, nothing changes but the time it takes: 64 MiB on a CPU
    and 2 GiB on a GPU if not given. chunk_tokens is 256 on a CPU, 2,048 on a GPU if not given.

    head_grad [V, D] fp32 (GPU kernels only): backward adds the head's gradient to it in place and returns
    none for the head.
    """
    check_pair(hidden, head, chunk_tokens)
    check_targets(target_ids, hidden.shape[0], head.shape[0])
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    chunk = chunk_tokens or default_chunk(hidden)
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    if can_use_triton(hidden, head):
        from consilience.model.kernels.gpu_linear_logprob import Plan, run

        keep = GPU_KEEP_BYTES if keep_bytes is None else keep_bytes
        plan = Plan(chunk, float(temperature), keep if wants_grad else 0, head_grad, exact.is_on())
        return LinearLogprob(*run(hidden, head, target_ids, plan))
    if head_grad is not None:
        raise ValueError("head_grad is given, but this device has no kernel that adds to it; leave it out")
    keep = KEEP_BYTES if keep_bytes is None else keep_bytes
    settings = (chunk, float(temperature), keep if wants_grad else 0)
    if logprob_rows.is_available(hidden, head):
        return LinearLogprob(*logprob_rows.run(hidden.float(), head.float(), target_ids, settings))
    return LinearLogprob(*_LinearLogprob.apply(hidden, head, target_ids, settings))  # pyright: ignore


def linear_logprob_dense(
    hidden: Tensor, head: Tensor, target_ids: Tensor, temperature: float = 1.0
) -> LinearLogprob:
    """The plain twin: the same values through one [n, V] tensor and autograd."""
    dtype = compute_dtype(hidden, head)
    logp = torch.log_softmax(hidden.to(dtype) @ head.to(dtype).t() / temperature, dim=-1)
    chosen = logp.gather(1, target_ids[:, None].long()).squeeze(1)
    return LinearLogprob(chosen, -(logp.exp() * logp).sum(-1))


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, target_ids: Tensor, settings: tuple[int, float, int]
    ) -> tuple[Tensor, Tensor]:
        chunk, temperature, keep_bytes = settings
        n, V = hidden.shape[0], head.shape[0]
        dtype = compute_dtype(hidden, head)
        W = head.to(dtype)
        logprob, entropy = hidden.new_empty(2, n, dtype=dtype).unbind(0)
        is_kept = 0 < n * V * dtype.itemsize <= keep_bytes
        kept = hidden.new_empty(n if is_kept else 0, V, dtype=dtype)
        buffers = hidden.new_empty(1 if is_kept else 2, min(chunk, n), V, dtype=dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            logp = kept[rows] if is_kept else buffers[1, :size]
            p = buffers[0, :size]
            if exact.is_on():
                logp.copy_(exact.log_softmax(exact.linear(hidden[rows].to(dtype), W) / temperature))
            else:
                log_softmax_(_project(hidden[rows], W, logp, temperature), p)
            torch.exp(logp, out=p)
            logprob[rows] = logp.gather(1, target_ids[rows, None].long()).squeeze(1)
            entropy[rows] = -torch.linalg.vecdot(p, logp)
        ctx.save_for_backward(hidden, head, target_ids, entropy, kept)
        ctx.settings = (chunk, temperature, is_kept)
        return logprob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_logprob, grad_entropy = grads
        hidden, head, target_ids, entropy, kept = ctx.saved_tensors
        chunk, temperature, is_kept = ctx.settings
        n, V = hidden.shape[0], head.shape[0]
        dtype = entropy.dtype
        W = head.to(dtype)
        dH = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
        buffers = hidden.new_empty(2, min(chunk, n), V, dtype=dtype)
        for start in range(0, n, chunk):
            rows = slice(start, min(start + chunk, n))
            size = rows.stop - start
            p, g = buffers[0, :size], buffers[1, :size]
            if is_kept:
                g.copy_(kept[rows])
            else:
                log_softmax_(_project(hidden[rows], W, g, temperature), p)
            torch.exp(g, out=p)
            a, b = grad_logprob[rows, None], grad_entropy[rows, None]
            # g holds log p; turn it into −p·(a + b·(log p + entropy)), then add a at the target.
            g.add_(entropy[rows, None]).mul_(b).add_(a).mul_(p).neg_()
            g.scatter_add_(1, target_ids[rows, None].long(), a)
            g.div_(temperature)
            if dH is not None:
                dH[rows] = torch.mm(g, W).to(dH.dtype)
            if dW is not None:
                dW.addmm_(g.t(), hidden[rows].to(dtype))
        return dH, None if dW is None else dW.to(head.dtype), None, None


def _project(hidden: Tensor, head: Tensor, out: Tensor, temperature: float) -> Tensor:
    """`out` [c, V] = hidden [c, D] · head [V, D]ᵀ / temperature."""
    project(hidden, head, out)
    return out if temperature == 1.0 else out.div_(temperature)


def log_softmax_(logits: Tensor, scratch: Tensor) -> Tensor:
    """Log-softmax over the last axis in place; `scratch` has the shape of `logits` and is overwritten.

    Subtracting the maximum first keeps every value finite for any finite logits.
    """
    logits.sub_(logits.amax(-1, keepdim=True))
    log_sum = torch.exp(logits, out=scratch).sum(-1, keepdim=True).log_()
    return logits.sub_(log_sum)


def check_pair(hidden: Tensor, head: Tensor, chunk_tokens: int | None, who: str = "hidden") -> None:
    """ValueError unless hidden is [n, D], head [V, D] with V ≥ 1, and chunk_tokens ≥ 1."""
    shapes = f"{who} {list(hidden.shape)}, head {list(head.shape)}"
    if hidden.dim() != 2 or head.dim() != 2 or hidden.shape[1] != head.shape[1] or head.shape[0] == 0:
        raise ValueError(f"{shapes}; they must be [n, D] and [V, D] with the same D and V of at least 1")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")


def check_targets(target_ids: Tensor, n: int, vocab: int) -> None:
    """ValueError unless target_ids is [n] and every id lies in [0, vocab)."""
    if tuple(target_ids.shape) != (n,):
        raise ValueError(f"target_ids {list(target_ids.shape)} for {n} tokens; it must be [{n}]")
    if n and (int(target_ids.min()) < 0 or int(target_ids.max()) >= vocab):
        low, high = int(target_ids.min()), int(target_ids.max())
        raise ValueError(f"target ids run from {low} to {high}; the head allows 0 to {vocab - 1}")
