"""The index loss on a GPU behind autograd (triton_index_loss.py); twin: `indexer.index_loss`.

Block by block of queries, whose [n, S] slots fit a buffer of bounded size. With picks, dI of every slot is
kept for the backward (4 K bytes a query); without, it is computed again there.

B rows, T queries, H heads, C channels, M keys, K picks of a query, S slots: picks or columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.kernels import gpu_attention
from consilience.model.kernels.attention_problem import problem_of
from consilience.model.kernels.choice import uses_triton

if TYPE_CHECKING:
    from collections.abc import Iterator

    from consilience.model.kernels.attention_keys import Keys
    from consilience.model.kernels.triton_index_loss import Candidates

BUFFER_BYTES = 1 << 26  # slots held at once, in fp32
MIN_QUERIES = 64


@dataclass(frozen=True)
class Teacher:
    """What the target is made of: query [B, T, H, C], entries [B, M, C], log2 of the denominators [B, T, H]
    and the scale of the logits; is_valid [B, T]."""

    query: Tensor
    entries: Tensor
    denominator: Tensor
    scale: float
    is_valid: Tensor


def is_available(index: tuple[Tensor, Tensor, Tensor], query: Tensor, keys: Keys, sink: Tensor) -> bool:
    """Whether the kernels serve this call: on a GPU, index queries and keys of one type, fp32 weights."""
    index_query, weight, index_keys = index
    if keys.entries is None or not gpu_attention.is_available(query, keys, sink) or not uses_triton(*index):
        return False
    is_small = index_query.shape[-1] <= 128 and max(index_query.shape[2], query.shape[2]) <= 128
    return is_small and index_query.dtype == index_keys.dtype and weight.dtype == torch.float32


def denominators(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """log2 of attention's denominators [B, T, H] fp32: its forward, for a caller that has not kept them."""
    from consilience.model.kernels import triton_attention

    with torch.no_grad():
        return triton_attention.forward(problem_of(query, keys, sink, scale))[1]


def divergence(mass: Tensor, scores: Tensor, is_candidate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Σ KL(mass / Σ mass ‖ softmax(scores)) over queries with candidates, their number, and dI.

    mass, scores, is_candidate, dI [n, S]; dI is the sum's gradient by the scores. As `indexer.divergence`.
    """
    target = mass.masked_fill_(~is_candidate, 0.0)
    sums = target.sum(-1, keepdim=True)
    is_used = sums > 0
    target.div_(sums.clamp(min=1e-20))
    log_index = torch.log_softmax(scores.masked_fill_(~is_candidate, -1e30), dim=-1)
    kl = torch.special.xlogy(target, target) - target * log_index.clamp(min=-1e4)
    reached = target.masked_fill(log_index < -1e4, 0.0)
    d_scores = log_index.exp_().mul_(reached.sum(-1, keepdim=True)).sub_(reached)
    d_scores.masked_fill_(~(is_candidate & is_used), 0.0)
    return (kl.sum(-1, keepdim=True) * is_used).sum(), is_used.sum(), d_scores


class _Problem:
    """One call's tensors, row by row and block by block."""

    def __init__(
        self,
        index: tuple[Tensor, Tensor, Tensor],
        teacher: Teacher,
        picks: Tensor | None,
        bounds: tuple[Tensor, Tensor],
        is_cut: bool,
    ) -> None:
        self.index, self.teacher, self.is_cut = index, teacher, is_cut
        self.picks, self.bounds = picks, bounds
        self.num_rows, self.num_queries = index[0].shape[:2]
        self.num_keys = index[2].shape[1]
        self.num_slots = self.num_keys if picks is None else picks.shape[2]
        self.block = max(MIN_QUERIES, BUFFER_BYTES // (4 * max(self.num_keys, 1)))

    def of(self, row: int) -> tuple[tuple[Tensor, Tensor, Tensor], Candidates]:
        """Index tensors and candidates of a row."""
        from consilience.model.kernels.triton_index_loss import Candidates

        query, weight, keys = (x[row] for x in self.index)
        first, stop = (x[row] for x in self.bounds)
        picks = None if self.picks is None else self.picks[row]
        return (query, weight, keys), Candidates(picks, first, stop, self.num_slots)

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """Row, first query and the one behind the last of each block."""
        for row in range(self.num_rows):
            for begin in range(0, self.num_queries, self.block):
                yield row, begin, min(begin + self.block, self.num_queries)

    def candidates(self, row: int, begin: int, end: int) -> Tensor:
        """bool [n, S]"""
        valid = self.teacher.is_valid[row, begin:end, None]
        if self.picks is not None:
            return (self.picks[row, begin:end] >= 0) & valid
        column = torch.arange(self.num_slots, device=valid.device)
        first, stop = (x[row, begin:end, None] for x in self.bounds)
        return (column >= first) & (column < stop) & valid

    def divergence(self, row: int, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """As the function of this name, of one block."""
        from consilience.model.kernels import triton_index_loss

        teacher, (index, slots) = self.teacher, self.of(row)
        mass, scores = (
            torch.empty(end - begin, self.num_slots, dtype=torch.float32, device=index[0].device)
            for _ in range(2)
        )
        given = (teacher.query[row], teacher.denominator[row], teacher.entries[row])
        triton_index_loss.match(*given, slots, begin, mass, teacher.scale)
        triton_index_loss.match(*index, slots, begin, scores, None, self.is_cut)
        return divergence(mass, scores, self.candidates(row, begin, end))


def _dense(d_scores: Tensor, picks: Tensor | None, num_keys: int) -> Tensor:
    """d_scores [n, K] of picks [n, K] as [n, M or more] of all columns."""
    if picks is None:
        return d_scores
    # Column M takes the places without a pick.
    every = d_scores.new_zeros(d_scores.shape[0], num_keys + 1)
    return every.scatter_(1, torch.where(picks < 0, num_keys, picks), d_scores)


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, weight, keys, teacher, picks, bounds, is_cut):  # type: ignore[override]
        problem = _Problem((query, weight, keys), teacher, picks, bounds, is_cut)
        total, count = torch.zeros(2, device=query.device).unbind()
        kept = None
        if picks is not None and any(ctx.needs_input_grad):
            kept = torch.empty(picks.shape, device=query.device)
        for row, begin, end in problem.blocks():
            kl, used, d_scores = problem.divergence(row, begin, end)
            total, count = total + kl, count + used
            if kept is not None:
                kept[row, begin:end] = d_scores
        ctx.save_for_backward(query, weight, keys, kept, count)
        ctx.rest = (teacher, picks, bounds, is_cut)
        ctx.mark_non_differentiable(count)
        return total / count.clamp(min=1), count

    @staticmethod
    def backward(ctx, grad: Tensor, _):  # type: ignore[override]
        from consilience.model.kernels import triton_index_loss

        query, weight, keys, kept, count = ctx.saved_tensors
        problem = _Problem((query, weight, keys), *ctx.rest)
        unit = grad.float() / count.clamp(min=1)
        d_query, d_weight, d_keys = (torch.empty_like(x) for x in (query, weight, keys))
        sums = None
        for row, begin, end in problem.blocks():
            index, slots = problem.of(row)
            d_scores = problem.divergence(row, begin, end)[2] if kept is None else kept[row, begin:end]
            given = (index, slots, begin, d_scores, unit, d_query[row], d_weight[row])
            triton_index_loss.query_gradient(*given)
            if begin == 0:
                sums = triton_index_loss.key_sums(index[0], problem.num_keys)
            assert sums is not None
            dense = _dense(
                d_scores, None if slots.picks is None else slots.picks[begin:end], problem.num_keys
            )
            triton_index_loss.add_key_gradient(index, slots, begin, dense, sums)
            if end == problem.num_queries:
                d_keys[row] = sums.sum(0) * unit
        return d_query, d_weight, d_keys, None, None, None, None


def index_loss(
    index: tuple[Tensor, Tensor, Tensor],
    teacher: Teacher,
    picks: Tensor | None,
    bounds: tuple[Tensor, Tensor],
    is_cut: bool = False,
) -> tuple[Tensor, Tensor]:
    """`indexer.index_loss`: the mean divergence and the number of queries that have one.

    index = (query [B, T, Hi, Ci], weight [B, T, Hi] fp32, keys [B, M, Ci]); picks [B, T, K] int64 or None for
    all visible columns; bounds = (first, stop) [B, T]. Gradients reach `index` alone. Deterministic.
    """
    index, bounds = tuple(x.contiguous() for x in index), tuple(x.contiguous() for x in bounds)  # type: ignore[assignment]
    teacher = replace(
        teacher,
        query=teacher.query.detach().contiguous(),
        entries=teacher.entries.detach().contiguous(),
        denominator=teacher.denominator.contiguous(),
    )
    picks = None if picks is None else picks.contiguous()
    return _IndexLoss.apply(*index, teacher, picks, bounds, is_cut)  # type: ignore[return-value]
