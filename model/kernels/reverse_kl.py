"""Exact reverse KL over the whole vocabulary, from two hidden states and two prediction heads.

    z = h_s W_sᵀ,  p = softmax(z),   q = softmax(h_t W_tᵀ),   K = Σ_v p_v (log p_v − log q_v)
    loss = Σ_t ω_t K_t,              ∂K/∂z_v = p_v (log p_v − log q_v − K)

Logits of one token chunk at a time are built, used and overwritten: the gradients of the student's hidden
states and head are finished inside forward, so nothing of size [n, V] is kept and nothing is computed
twice. The teacher's side never enters the graph (post-training notes 6.1 and 7.5, kernel notes 4).
`reverse_kl_dense` is the definition to read; `reverse_kl` is the one to run.

Shapes: n loss tokens, V vocabulary, D student width, Dt teacher width (they may differ).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.kernels.linear_logprob import (
    check_pair,
    check_targets,
    compute_dtype,
    log_softmax_,
    project,
)


class ReverseKL(NamedTuple):
    """What `reverse_kl` returns; only `loss` carries a gradient. fp32, or fp64 if an input is fp64.

    loss             scalar, Σ weight · kl
    kl               [n] exact KL(student ‖ teacher) in nats; rounding may leave it just below 0
    student_entropy  [n] nats
    sampled_logprob  [n] student's log-probability of target_ids, None if no targets were given
    top1_agreement   [n] 1 where the student's most likely token is also the teacher's, else 0
    """

    loss: Tensor
    kl: Tensor
    student_entropy: Tensor
    sampled_logprob: Tensor | None
    top1_agreement: Tensor


def reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    chunk_tokens: int = 256,
    *,
    target_ids: Tensor | None = None,
) -> ReverseKL:
    """Weighted sum of exact reverse KLs, differentiable in the student's hidden states and head.

    student_hidden [n, D], student_head [V, D], teacher_hidden [n, Dt], teacher_head [V, Dt] any float
    types; weight [n] (mask · teacher weight / denominator, constant; 0 leaves a token out of loss and
    gradient, its kl is still reported); target_ids [n] the sampled tokens. n = 0 gives loss 0 and zero
    gradients. Peak extra memory is three [chunk_tokens, V] buffers and one gradient of each input.
    ValueError on shapes that do not fit together.
    """
    check_pair(student_hidden, student_head, chunk_tokens, "student hidden")
    check_pair(teacher_hidden, teacher_head, chunk_tokens, "teacher hidden")
    n, V = student_hidden.shape[0], student_head.shape[0]
    if teacher_head.shape[0] != V:
        raise ValueError(
            f"student head has {V} rows, teacher head {teacher_head.shape[0]}; both need one a token"
        )
    if teacher_hidden.shape[0] != n or tuple(weight.shape) != (n,):
        rows = f"{n} student rows, {teacher_hidden.shape[0]} teacher rows, weight {list(weight.shape)}"
        raise ValueError(f"{rows}; all three need one entry a token")
    if target_ids is not None:
        check_targets(target_ids, n, V)
    wants_grad = torch.is_grad_enabled()
    wants = (wants_grad and student_hidden.requires_grad, wants_grad and student_head.requires_grad)
    teacher = (teacher_hidden.detach(), teacher_head.detach())
    loss, kl, entropy, logprob, top1 = _ReverseKL.apply(  # pyright: ignore[reportGeneralTypeIssues]
        student_hidden, student_head, teacher, weight.detach(), target_ids, int(chunk_tokens), wants
    )
    return ReverseKL(loss, kl, entropy, None if target_ids is None else logprob, top1)


def reverse_kl_dense(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    *,
    target_ids: Tensor | None = None,
) -> ReverseKL:
    """The plain twin: the same values through two [n, V] tensors and autograd."""
    dtype = compute_dtype(student_hidden, student_head, teacher_hidden, teacher_head)
    logp = torch.log_softmax(student_hidden.to(dtype) @ student_head.to(dtype).t(), dim=-1)
    logq = torch.log_softmax(teacher_hidden.detach().to(dtype) @ teacher_head.detach().to(dtype).t(), dim=-1)
    p = logp.exp()
    kl = (p * (logp - logq)).sum(-1)
    entropy = -(p * logp).sum(-1).detach()
    chosen = None if target_ids is None else logp.detach().gather(1, target_ids[:, None].long()).squeeze(1)
    is_top = (logp == logp.amax(-1, keepdim=True)) & (logq == logq.amax(-1, keepdim=True))
    loss = (weight.detach().to(dtype) * kl).sum()
    return ReverseKL(loss, kl.detach(), entropy, chosen, is_top.any(-1).to(dtype))


class _ReverseKL(torch.autograd.Function):
    """Computes values and gradients in one pass; backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher: tuple[Tensor, Tensor],
        weight: Tensor,
        target_ids: Tensor | None,
        chunk_tokens: int,
        wants: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(student_hidden, student_head, *teacher)
        n, V = student_hidden.shape[0], student_head.shape[0]
        W_s, W_t = student_head.to(dtype), teacher[1].to(dtype)
        dH = torch.empty_like(student_hidden, dtype=dtype) if wants[0] else None
        dW = torch.zeros_like(W_s) if wants[1] else None
        kl, entropy, logprob, top1 = torch.zeros(4, n, dtype=dtype, device=W_s.device).unbind(0)
        weight = weight.to(dtype)
        buffers = student_hidden.new_empty(3, min(chunk_tokens, n), V, dtype=dtype)
        for start in range(0, n, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, n))
            logp, delta, p = buffers[:, : rows.stop - start]
            h = student_hidden[rows].to(dtype)
            log_softmax_(project(h, W_s, logp), p)
            log_softmax_(project(teacher[0][rows], W_t, delta), p)
            is_top = logp == logp.amax(-1, keepdim=True)
            top1[rows] = is_top.logical_and_(delta == delta.amax(-1, keepdim=True)).any(-1).to(dtype)
            torch.exp(logp, out=p)
            torch.sub(logp, delta, out=delta)
            kl[rows] = torch.linalg.vecdot(p, delta)
            entropy[rows] = -torch.linalg.vecdot(p, logp)
            if target_ids is not None:
                logprob[rows] = logp.gather(1, target_ids[rows, None].long()).squeeze(1)
            if dH is None and dW is None:
                continue
            g = delta.sub_(kl[rows, None]).mul_(p).mul_(weight[rows, None])
            if dH is not None:
                torch.mm(g, W_s, out=dH[rows])
            if dW is not None:
                dW.addmm_(g.t(), h)
        loss = torch.dot(weight, kl)
        ctx.types = (student_hidden.dtype, student_head.dtype)
        ctx.save_for_backward(dH, dW)
        ctx.mark_non_differentiable(kl, entropy, logprob, top1)
        return loss, kl, entropy, logprob, top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dH, dW = ctx.saved_tensors
        grad_hidden = None if dH is None else (dH * grads[0]).to(ctx.types[0])
        grad_head = None if dW is None else (dW * grads[0]).to(ctx.types[1])
        return grad_hidden, grad_head, None, None, None, None, None
