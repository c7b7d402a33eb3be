"""Objectives of distillation by name: the exact reverse KL, and what others train with in its place.

Of one token, p the student's distribution, q the teacher's, y the token that the student sampled, S the k
likeliest tokens of one of them, p̄ = 1 − Σ_S p (and q̄) the mass outside:

    reverse_kl      Σ_v p (log p − log q)                           exact; `model/kernels/reverse_kl.py`
    forward_kl      Σ_v q (log q − log p)
    jsd             β KL(q ‖ m) + (1 − β) KL(p ‖ m),                m = β q + (1 − β) p
    top_k_tail      Σ_S p (log p − log q) + p̄ (log p̄ − log q̄)      a lower bound of the exact one
    generalised_kl  Σ_S p (log p − log q) − p + q                   what is outside S is left to itself
    sampled_token   log p_y − log q_y                               learnt as sg[log p_y − log q_y] log p_y

All but the first are there to be compared with it (post-training notes 6.2 and 6.4): plain functions of two
rows of logits whose gradient autograd takes, a chunk of tokens at a time. A reverse KL cut to S without its
tail has no name here: it is least where the student has drained its mass out of S.

Shapes: n loss tokens, c tokens of a chunk, V vocabulary, D student width, Dt teacher width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.conf.errors import ConfigError
from consilience.model.kernels.head_products import HeadGradient, compute_dtype, default_chunk, project
from consilience.model.kernels.linear_logprob import check_pair, check_targets
from consilience.model.kernels.reverse_kl import reverse_kl

Divergence = Callable[["Objective", Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""log p, log q [c, V], target [c] -> value to report [c], surrogate [c] whose gradient is taken."""


@dataclass(frozen=True)
class Objective:
    """An objective and its settings. ConfigError on an unknown name or a setting out of range.

    top_k    size of S, for top_k_tail and generalised_kl; the whole vocabulary where that is smaller
    support  whose likeliest tokens S holds: "student", or "teacher" as a server of log-probs gives them
    beta     share of the teacher in jsd's mixture, within (0, 1)
    """

    name: str = "reverse_kl"
    top_k: int = 64
    support: str = "student"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ConfigError(
                f"distill.objective is '{self.name}'; it must be one of {', '.join(OBJECTIVES)}"
            )
        if self.top_k < 1:
            raise ConfigError(f"distill.top_k is {self.top_k}; it must be at least 1")
        if self.support not in ("student", "teacher"):
            raise ConfigError(f"distill.support is '{self.support}'; it must be 'student' or 'teacher'")
        if not 0 < self.beta < 1:
            raise ConfigError(
                f"distill.beta is {self.beta}; it must lie within (0, 1): at its ends jsd vanishes, "
                "and what is meant there is forward_kl or reverse_kl"
            )

    @property
    def needs_targets(self) -> bool:
        return self.name == "sampled_token"


class ObjectiveLoss(NamedTuple):
    """Only `loss` carries a gradient. fp32, or fp64 if the student is.

    loss             scalar, Σ weight · value (sampled_token: its value is what it estimates, not its loss)
    value            [n] the objective of each token, nats
    kl               [n] exact reverse KL, whatever the objective
    student_entropy  [n] nats
    top1_agreement   [n] 1 where both find the same token likeliest
    """

    loss: Tensor
    value: Tensor
    kl: Tensor
    student_entropy: Tensor
    top1_agreement: Tensor


def objective_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    weight: Tensor,
    chunk_tokens: int | None = None,
    *,
    target_ids: Tensor | None = None,
) -> ObjectiveLoss:
    """Weighted sum of an objective, differentiable in the student's hidden states and head.

    student_hidden [n, D], student_head [V, D], teacher_hidden [n, Dt], teacher_head [V, Dt]; weight [n]
    constant; target_ids [n] the sampled tokens, which sampled_token needs. No [n, V] tensor outlives a
    chunk of `chunk_tokens`. ValueError on shapes that do not fit, targets missing or outside [0, V).
    """
    hidden, head = (student_hidden, student_head), (teacher_hidden, teacher_head)
    if objective.name == "reverse_kl":
        out = reverse_kl(*hidden, *head, weight, chunk_tokens)
        return ObjectiveLoss(out.loss, out.kl, out.kl, out.student_entropy, out.top1_agreement)
    check_pair(*hidden, chunk_tokens, "student hidden")
    check_pair(*head, chunk_tokens, "teacher hidden")
    n, V = len(student_hidden), len(student_head)
    if len(teacher_hidden) != n or len(teacher_head) != V or tuple(weight.shape) != (n,):
        raise ValueError(
            f"student {n} tokens of {V}, teacher {len(teacher_hidden)} of {len(teacher_head)}, weight "
            f"{list(weight.shape)}; all need one entry a token, both heads one row a token of the vocabulary"
        )
    if objective.needs_targets:
        if target_ids is None:
            raise ValueError(f"{objective.name} needs target_ids, the tokens that the student sampled")
        check_targets(target_ids, n, V)
    chunk = chunk_tokens or default_chunk(student_hidden)
    return ObjectiveLoss(*_Chunked.apply(*hidden, *head, weight.detach(), target_ids, objective, chunk))


def forward_kl(objective: Objective, logp: Tensor, logq: Tensor, target: Tensor | None) -> _Values:
    return _same(_kl(logq, logp))


def jsd(objective: Objective, logp: Tensor, logq: Tensor, target: Tensor | None) -> _Values:
    beta = objective.beta
    logm = torch.logaddexp(logq + math.log(beta), logp + math.log1p(-beta))
    return _same(beta * _kl(logq, logm) + (1 - beta) * _kl(logp, logm))


def top_k_tail(objective: Objective, logp: Tensor, logq: Tensor, target: Tensor | None) -> _Values:
    support = _support(objective, logp, logq)
    value = _kl(logp.gather(1, support), logq.gather(1, support))
    if support.shape[1] == logp.shape[1]:
        return _same(value)
    # The tail is summed from its own terms: 1 − Σ_S p would cancel where S holds nearly everything.
    tail_p, tail_q = (x.scatter(1, support, -math.inf).logsumexp(1, keepdim=True) for x in (logp, logq))
    return _same(value + _kl(tail_p, tail_q))


def generalised_kl(objective: Objective, logp: Tensor, logq: Tensor, target: Tensor | None) -> _Values:
    support = _support(objective, logp, logq)
    chosen_p, chosen_q = logp.gather(1, support), logq.gather(1, support)
    return _same(_kl(chosen_p, chosen_q) + (chosen_q.exp() - chosen_p.exp()).sum(1))


def sampled_token(objective: Objective, logp: Tensor, logq: Tensor, target: Tensor | None) -> _Values:
    assert target is not None  # checked by objective_loss
    chosen_p, chosen_q = (x.gather(1, target[:, None].long()).squeeze(1) for x in (logp, logq))
    value = (chosen_p - chosen_q).detach()
    return value, value * chosen_p


_Values = tuple[Tensor, Tensor]

OBJECTIVES: dict[str, Divergence | None] = {
    "reverse_kl": None,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "top_k_tail": top_k_tail,
    "generalised_kl": generalised_kl,
    "sampled_token": sampled_token,
}


def _same(value: Tensor) -> _Values:
    return value, value


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """[c] Σ a (log a − log b); 0 · log 0 is 0, as where rounding leaves a tail of nothing."""
    a = log_a.exp()
    return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(1)


def _support(objective: Objective, logp: Tensor, logq: Tensor) -> Tensor:
    """[c, k] ids of the k likeliest tokens."""
    of = logp if objective.support == "student" else logq
    return of.detach().topk(min(objective.top_k, of.shape[1]), dim=1).indices


class _Chunked(torch.autograd.Function):
    """Values and gradients a chunk of tokens at a time; backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        weight: Tensor,
        target_ids: Tensor | None,
        objective: Objective,
        chunk_tokens: int,
    ) -> tuple[Tensor, ...]:
        n, dtype = len(student_hidden), compute_dtype(student_hidden, student_head)
        head, weight = student_head.to(dtype), weight.to(dtype)
        dH, dW = torch.zeros_like(student_hidden, dtype=dtype), HeadGradient(student_head)
        reported = weight.new_zeros(4, n)
        loss = weight.new_zeros(())
        divergence = OBJECTIVES[objective.name]
        assert divergence is not None  # reverse_kl has its own kernel
        for start in range(0, n, chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden = student_hidden[rows].to(dtype)
            z = project(hidden, head, head.new_empty(len(hidden), len(head)))
            y = project(teacher_hidden[rows].to(dtype), teacher_head, torch.empty_like(z))
            with torch.enable_grad():
                z = z.requires_grad_()
                logp, logq = z.log_softmax(1), y.log_softmax(1)
                target = None if target_ids is None else target_ids[rows]
                value, surrogate = divergence(objective, logp, logq, target)
                (g,) = torch.autograd.grad(surrogate, z, weight[rows])
            logp = logp.detach()
            top = (logp == logp.amax(1, keepdim=True)) & (logq == logq.amax(1, keepdim=True))
            entropy = -torch.where(logp > -math.inf, logp.exp() * logp, 0.0).sum(1)
            found = (value.detach(), _kl(logp, logq), entropy, top.any(1).to(dtype))
            reported[:, rows] = torch.stack(found)
            loss = loss + torch.dot(weight[rows], surrogate.detach())
            dH[rows] = g @ head
            dW.add(g, hidden)
        ctx.types = (student_hidden.dtype, student_head.dtype)
        ctx.save_for_backward(dH, dW.result())  # no limit: it adds up
        reported = reported.unbind()
        ctx.mark_non_differentiable(*reported)
        return (loss, *reported)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dH, dW = ctx.saved_tensors
        return (dH * grads[0]).to(ctx.types[0]), (dW * grads[0]).to(ctx.types[1]), *[None] * 6
