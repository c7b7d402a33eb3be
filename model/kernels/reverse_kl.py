"""Exact reverse KL over the whole vocabulary, from two hidden states and two prediction heads.

    z = h_s W_sᵀ,  p = softmax(z),   q = softmax(h_t W_tᵀ),   K = Σ_v p_v (log p_v − log q_v)
    loss = Σ_t ω_t K_t,              ∂K/∂z_v = p_v (log p_v − log q_v − K)

Logits of one token chunk at a time are built, used and overwritten: the gradients of the student's hidden
states and head are finished inside forward, so nothing of size [n, V] is kept and nothing is computed
twice. The teacher's side never enters the graph (post-training notes 6.1 and 7.5, kernel notes 4).
`reverse_kl_dense` is the definition to read; `reverse_kl` is the one to run, and `reverse_kl_by_teacher`
the same for tokens of several teachers. What happens to a row of logits is `kl_rows.py`, on a GPU
`triton_kl_rows.py`.

Shapes: n loss tokens, V vocabulary (of this rank), D student width, Dt teacher width (they may differ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model.kernels import kl_rows
from consilience.model.kernels.choice import uses_triton
from consilience.model.kernels.head_products import (
    GRADIENT_TOKENS,
    HeadGradient,
    compute_dtype,
    default_chunk,
    filled,
    hidden_gradient,
    padded_rows,
    project,
)
from consilience.model.kernels.linear_logprob import check_pair, check_targets
from consilience.model.kernels.vocabulary_parallel import Vocabulary


class ReverseKL(NamedTuple):
    """What `reverse_kl` returns; only `loss` carries a gradient. fp32, or fp64 if the student is.

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


class TeacherRows(NamedTuple):
    """One teacher's share: hidden [m, Dt] of m consecutive tokens and its head [V, Dt]."""

    hidden: Tensor
    head: Tensor


def reverse_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    chunk_tokens: int | None = None,
    *,
    target_ids: Tensor | None = None,
    head_grad: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> ReverseKL:
    """Weighted sum of exact reverse KLs, differentiable in the student's hidden states and head.

    student_hidden [n, D], student_head [V, D], teacher_hidden [n, Dt], teacher_head [V, Dt] any float
    types; weight [n] (mask · teacher weight / denominator, constant; 0 leaves a token out of loss and
    gradient, its kl is still reported); target_ids [n] the sampled tokens. n = 0 gives loss 0 and zero
    gradients. Peak extra memory is three [chunk_tokens, V] buffers (the third of half the bytes for
    half-precision inputs on a GPU) and one gradient of each input; chunk_tokens is 256 on a CPU, 2,048 on
    a GPU if not given.

    head_grad [V, D] fp32: the head's gradient is added to it in place during this call and none is
    returned, as an optimiser with fp32 master gradients wants it. It is that of the loss itself: put any
    scale into `weight`, and call backward on the plain sum of losses.
    vocabulary: the heads are one rank's rows of the vocabulary; all ranks call together with equal hidden
    states and get equal results. ValueError on shapes that do not fit together.
    """
    check_pair(teacher_hidden, teacher_head, chunk_tokens, "teacher hidden")
    teachers = [TeacherRows(teacher_hidden, teacher_head)]
    return reverse_kl_by_teacher(
        student_hidden,
        student_head,
        teachers,
        weight,
        chunk_tokens,
        target_ids=target_ids,
        head_grad=head_grad,
        vocabulary=vocabulary,
    )


def reverse_kl_by_teacher(
    student_hidden: Tensor,
    student_head: Tensor,
    teachers: Iterable[TeacherRows],
    weight: Tensor,
    chunk_tokens: int | None = None,
    *,
    target_ids: Tensor | None = None,
    head_grad: Tensor | None = None,
    vocabulary: Vocabulary | None = None,
) -> ReverseKL:
    """`reverse_kl` of tokens sorted by teacher: the first len(hidden) rows belong to the first, and so on.

    `teachers` is walked once and each item is let go before the next is asked for, so a generator holds
    one head at a time. Chunks do not cross from one teacher to the next; a teacher may have no row.
    ValueError if their rows do not add up to n, else as `reverse_kl`.
    """
    check_pair(student_hidden, student_head, chunk_tokens, "student hidden")
    n = student_hidden.shape[0]
    if tuple(weight.shape) != (n,):
        raise ValueError(f"{n} student rows, weight {list(weight.shape)}; weight needs one entry a token")
    vocabulary = Vocabulary.whole(student_head.shape[0]) if vocabulary is None else vocabulary
    vocabulary.check(student_head)
    if target_ids is not None:
        check_targets(target_ids, n, vocabulary.size)
    if head_grad is not None and (head_grad.shape != student_head.shape or head_grad.dtype.itemsize < 4):
        found = f"head_grad is {list(head_grad.shape)} {head_grad.dtype}"
        raise ValueError(f"{found}; it must be fp32 and have the head's shape {list(student_head.shape)}")
    on = torch.is_grad_enabled()
    plan = _Plan(
        chunk_tokens or default_chunk(student_hidden),
        on and student_hidden.requires_grad,
        on and (student_head.requires_grad or head_grad is not None),
        vocabulary,
    )
    loss, kl, entropy, logprob, top1 = _ReverseKL.apply(  # pyright: ignore[reportGeneralTypeIssues]
        student_hidden, student_head, teachers, weight.detach(), target_ids, head_grad, plan
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


class _Plan(NamedTuple):
    chunk_tokens: int
    wants_hidden: bool
    wants_head: bool
    vocabulary: Vocabulary

    @property
    def wants_gradient(self) -> bool:
        return self.wants_hidden or self.wants_head


class _ReverseKL(torch.autograd.Function):
    """Computes values and gradients in one pass; backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teachers: Iterable[TeacherRows],
        weight: Tensor,
        target_ids: Tensor | None,
        head_grad: Tensor | None,
        plan: _Plan,
    ) -> tuple[Tensor, ...]:
        work = _Work(student_hidden, student_head, weight, target_ids, head_grad, plan)
        row = 0
        for row, teacher in _rows_of(teachers, student_hidden, student_head, plan.chunk_tokens):
            height = work.chunk_rows(teacher.hidden.shape[0])
            for start in range(0, teacher.hidden.shape[0], max(height, 1)):
                part = teacher.hidden[start : start + height]
                work.chunk(row + start, part, teacher.head, height)
            row += teacher.hidden.shape[0]
        if row != student_hidden.shape[0]:
            raise ValueError(
                f"{student_hidden.shape[0]} student rows, {row} teacher rows; "
                "the teachers' rows must add up to the student's"
            )
        work.finish()
        kl, entropy, logprob, top1 = kl_rows.summary(work.statistics)
        loss = torch.dot(work.weight, kl)
        ctx.types = (student_hidden.dtype, student_head.dtype)
        dH = work.dH if work.dH is None else plan.vocabulary.summed(work.dH)
        dW = None if work.dW is None or head_grad is not None else work.dW.result()
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


class _Work:
    """The loop's buffers and what it fills: statistics [n, 8], dH [n, D], dW [V, D]."""

    def __init__(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        weight: Tensor,
        target_ids: Tensor | None,
        head_grad: Tensor | None,
        plan: _Plan,
    ):
        n, V = student_hidden.shape[0], student_head.shape[0]
        self.plan = plan
        self.is_fused = uses_triton(student_hidden, student_head, weight)
        self.dtype = compute_dtype(student_hidden, student_head)
        operand = torch.promote_types(student_hidden.dtype, student_head.dtype)
        self.operand = operand if self.is_fused else self.dtype
        self.hidden, self.head = student_hidden, student_head.to(self.operand)
        self.weight, self.target = weight.to(self.dtype), target_ids
        self.statistics = weight.new_zeros(n, kl_rows.NUM_STATISTICS, dtype=self.dtype)
        rows = min(plan.chunk_tokens, -(-n // 128) * 128 if self.is_fused else n)
        self.logits = student_hidden.new_empty(2, rows, V, dtype=self.dtype)
        # Gradients of several chunks wait for one product into dW: each reads and writes all of it.
        span = min(GRADIENT_TOKENS, -(-n // max(rows, 1)) * rows)
        span = max(rows, span) if self.is_fused and plan.wants_head else rows
        needs_scratch = plan.wants_gradient or not self.is_fused
        self.g = student_hidden.new_empty(span if needs_scratch else 0, V, dtype=self.operand)
        self.waiting: list[tuple[slice, Tensor]] = []
        self.num_waiting = 0
        partial = self.dtype if plan.vocabulary.is_split else self.operand
        self.dH = torch.empty_like(student_hidden, dtype=partial) if plan.wants_hidden else None
        self.dW = HeadGradient(student_head, head_grad) if plan.wants_head else None

    def chunk_rows(self, n: int) -> int:
        """Rows of each chunk of n tokens; on a GPU the last one is filled up, so that all have one shape."""
        return padded_rows(n, self.plan.chunk_tokens) if self.is_fused else self.plan.chunk_tokens

    def chunk(self, start: int, teacher_hidden: Tensor, teacher_head: Tensor, height: int) -> None:
        """One chunk of tokens of one teacher, from row `start` on."""
        size = teacher_hidden.shape[0]
        height = height if self.is_fused else size
        rows = slice(start, start + size)
        hidden = filled(self.hidden[rows].to(self.operand), height)
        weight = filled(self.weight[rows], height)
        target = None if self.target is None else self.plan.vocabulary.local(self.target[rows])
        target = None if target is None else filled(target, height)
        z_s, z_t = self.logits[:, :height]
        project(hidden, self.head, z_s)
        project(filled(teacher_hidden.detach(), height), teacher_head.detach(), z_t)
        if self.num_waiting + height > len(self.g):
            self.finish()
        g = self.g[self.num_waiting : self.num_waiting + height]
        statistics = self._row_pass(z_s, z_t, target, weight, g)
        self.statistics[rows] = statistics[:size]
        if self.dH is not None:
            self.dH[rows] = hidden_gradient(g, self.head, self.dH.dtype)[:size]
        if self.dW is not None:
            self.waiting.append((rows, hidden))
            self.num_waiting += height

    def finish(self) -> None:
        """Adds what waits to dW."""
        if self.waiting and self.dW is not None:
            rows = slice(self.waiting[0][0].start, self.waiting[-1][0].stop)
            # The rows of one stretch without gaps need no copy.
            is_whole = rows.stop - rows.start == self.num_waiting and self.hidden.dtype == self.operand
            hidden = self.hidden[rows] if is_whole else torch.cat([h for _, h in self.waiting])
            is_only = rows.stop - rows.start == len(self.hidden)
            self.dW.add(self.g[: self.num_waiting], hidden, is_only=is_only)
        self.waiting, self.num_waiting = [], 0

    def _row_pass(self, z_s: Tensor, z_t: Tensor, target: Tensor | None, weight: Tensor, g: Tensor) -> Tensor:
        """Statistics of each row; where a gradient is wanted, g becomes ∂loss/∂z_s."""
        rows: Any = kl_rows
        if self.is_fused:
            from consilience.model.kernels import triton_kl_rows as rows
        merge: Callable[[Tensor], Tensor] | None = None
        if self.plan.vocabulary.is_split:
            merge = lambda s: kl_rows.merged(self.plan.vocabulary.gathered(s))
        return rows.row_pass(z_s, z_t, target, weight, g, self.plan.wants_gradient, merge)


def _rows_of(
    teachers: Iterable[TeacherRows], student_hidden: Tensor, student_head: Tensor, chunk_tokens: int
) -> Iterator[tuple[int, TeacherRows]]:
    """(first row, teacher) one after the other, checked against the student's shapes."""
    row, (n, V) = 0, (student_hidden.shape[0], student_head.shape[0])
    for teacher in teachers:
        check_pair(*teacher, chunk_tokens, "teacher hidden")
        if teacher.head.shape[0] != V:
            found = f"student head has {V} rows, teacher head {teacher.head.shape[0]}"
            raise ValueError(f"{found}; both need one a token")
        if row + len(teacher.hidden) > n:
            found = f"{n} student rows, {row + len(teacher.hidden)} teacher rows"
            raise ValueError(f"{found}; the teachers' rows must add up to the student's")
        yield row, teacher
        row += len(teacher.hidden)
