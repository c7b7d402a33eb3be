"""Tokens to the ranks that hold their experts and back, in waves (report 3; specification 9).

Each rank routes its own tokens, and holds some experts of the layer. A pair of token and expert goes to the
expert's rank with its weight, and its output comes home, where a token's outputs are added. Experts come in
waves, the same part of each rank's: while one is computed, rows of the next arrive and outputs of the one
before leave. The backward is the mirrored exchange; the gradients of an expert are whole on its rank.

Order is fixed everywhere: pairs of one expert stand by source rank, then token, then choice, and a token's
outputs are added in the order of its choices, whatever arrives when. That is also the order of one process
with the tokens of all ranks in one batch: its outputs, and its gradients of tokens, weights and experts, are
met to the bit in fp32 and fp64 on a CPU. The number of waves changes nothing.

Sizes are read on the host once a forward: tokens of every rank for every expert.

R ranks, W waves, T tokens of this rank, K experts a token, N = T·K pairs, D model width, I expert width,
E experts of the layer; n pairs that came to this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from consilience.model import expert_wave
from consilience.model.kernels import gpu_expert_wave
from consilience.model.ranks import ALONE, Ranks
from consilience.model.recompute import named, unnamed
from consilience.model.released_loading import Rank

Masters = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Shard:
    """The experts of a layer over `ranks`, in `num_waves`; this rank holds those of `own`.

    copies  the ranks that hold the same experts, each for other tokens: they sum the gradients of these
    """

    ranks: Ranks
    num_experts: int
    num_waves: int
    copies: Ranks = ALONE

    @property
    def own(self) -> range:
        """Numbers of this rank's experts."""
        return Rank(self.ranks.rank, self.ranks.size).experts(self.num_experts)

    def wave(self, number: int) -> slice:
        """This rank's experts of a wave, counted from its first."""
        return _wave(len(self.own), number, self.num_waves)

    def run(
        self,
        hidden: Tensor,
        weights: Tensor,
        experts: Tensor,
        masters: Masters,
        limit: float,
        base: Tensor | None = None,
    ) -> Tensor:
        """Σ_k weight_k · expert_k(hidden), plus base: [T, D] in fp32 or wider, bf16 on a GPU.

        hidden, base [T, D]; weights [T, K] fp32 or wider, experts [T, K] int64 in [0, E); masters w1, w2, w3
        of this rank's experts, `main_grad` as in kernels/gpu_moe.py. All ranks call it together, also those
        without a token, and all or none of them run the backward.
        """
        totals = tuple(getattr(w, "main_grad", None) for w in masters)
        return _Exchanged.apply(self, limit, totals, hidden, weights, experts, base, *masters)  # type: ignore[return-value]


def _wave(count: int, number: int, num_waves: int) -> slice:
    return slice(count * number // num_waves, count * (number + 1) // num_waves)


@functools.cache
def _order(num_experts: int, size: int, num_waves: int) -> tuple[list[int], list[list[int]]]:
    """Key of each expert when they stand by wave, rank and number [E]; first key of each wave's rank and the
    one behind its last [W][R + 1]."""
    shares = [Rank(rank, size).experts(num_experts) for rank in range(size)]
    parts = [[share[_wave(len(share), w, num_waves)] for share in shares] for w in range(num_waves)]
    order = [expert for wave in parts for part in wave for expert in part]
    edges = [0, *accumulate(len(part) for wave in parts for part in wave)]
    keys = sorted(range(num_experts), key=order.__getitem__)
    return keys, [edges[w * size : (w + 1) * size + 1] for w in range(num_waves)]


@functools.cache
def _keys(num_experts: int, size: int, num_waves: int, device: torch.device) -> Tensor:
    return torch.tensor(_order(num_experts, size, num_waves)[0], device=device)


@dataclass(frozen=True)
class _Plan:
    """What travels: pairs of wave w to each rank, and from each to this one [W][R]."""

    given: list[list[int]]
    found: list[list[int]]
    edges: list[list[int]]

    @classmethod
    def of(cls, shard: Shard, counts: Tensor) -> _Plan:
        """counts [R, E] on the host: pairs of each rank by key."""
        rank, size = shard.ranks.rank, shard.ranks.size
        edges = _order(shard.num_experts, size, shard.num_waves)[1]
        before = torch.nn.functional.pad(counts.to(torch.int64).cumsum(1), (1, 0))
        given = before[rank][torch.tensor(edges)].diff(dim=1)
        own = torch.tensor([wave[rank : rank + 2] for wave in edges])
        found = before[:, own].diff(dim=2)[:, :, 0].t()
        return cls(given.tolist(), found.tolist(), edges)

    def numbers(self, every: Tensor, wave: int, rank: int) -> Tensor:
        """Experts, counted from the wave's first on this rank, of the rows that come: [n] int64.

        every [R, E] is where the rows are; nothing waits for it.
        """
        counts = every[:, slice(*self.edges[wave][rank : rank + 2])]
        local = torch.arange(counts.shape[1], device=every.device).repeat(len(counts))
        return torch.repeat_interleave(local, counts.flatten(), output_size=sum(self.found[wave]))


def _slices(sizes: list[list[int]]) -> list[slice]:
    """Where each wave's rows stand, one wave behind the other."""
    ends = list(accumulate(sum(wave) for wave in sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends)]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        shard: Shard,
        limit: float,
        totals: Sequence[Tensor | None],
        hidden: Tensor,
        weights: Tensor,
        experts: Tensor,
        base: Tensor | None,
        *masters: Tensor,
    ) -> Tensor:
        ctx.shard, ctx.limit, ctx.totals, ctx.dtype = shard, limit, totals, hidden.dtype
        on_gpu = gpu_expert_wave.is_available(hidden, masters[0], shard.num_experts, experts.shape[1])
        ctx.way = gpu_expert_wave if on_gpu else expert_wave
        ctx.settings = unnamed()  # exact mode among them; the backward may run outside of it
        work = (ctx.settings.copy().run, _forward, ctx.way, shard, limit)
        output, *kept = named("expert_activations", *work, hidden, weights, experts, base, masters)
        ctx.save_for_backward(experts, *masters, *kept)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_hidden, needs_weights, _, needs_base, *wanted = ctx.needs_input_grad[3:]
        d_hidden, d_weights, *d_masters = ctx.settings.copy().run(_backward, ctx, grad, wanted)
        return (
            *(None, None, None),
            d_hidden if needs_hidden else None,
            d_weights if needs_weights else None,
            None,
            grad if needs_base else None,
            *d_masters,
        )


def _forward(
    way: ModuleType,
    shard: Shard,
    limit: float,
    hidden: Tensor,
    weights: Tensor,
    experts: Tensor,
    base: Tensor | None,
    masters: Masters,
) -> tuple[Tensor, ...]:
    """The output [T, D], and what `_backward` reads; W times what the way keeps comes last."""
    ranks = shard.ranks
    keys = _keys(shard.num_experts, ranks.size, shard.num_waves, experts.device)
    order, places, counts = way.sort(keys[experts], shard.num_experts)
    every = ranks.stack(counts)
    host = every.to("cpu", copy=True)  # the one time that sizes are read
    rows = way.spread(hidden, order, places)
    shares = weights.flatten().index_select(0, order)
    plan = _Plan.of(shard, host)
    given, found = _slices(plan.given), _slices(plan.found)
    came, came_shares = rows.new_empty(found[-1].stop, rows.shape[1]), shares.new_empty(found[-1].stop)
    arrivals = []
    for wave, (here, there) in enumerate(zip(given, found)):
        sizes = plan.found[wave], plan.given[wave]
        arrivals += [
            ranks.start_exchange(came[there], rows[here], *sizes),
            ranks.start_exchange(came_shares[there], shares[here], *sizes),
        ]
    departures: list[tuple[Callable[[], object], Tensor]] = []  # a tensor must live until it is away
    kept: list[Tensor] = []
    for wave, (here, there) in enumerate(zip(given, found)):
        for arrived in arrivals[2 * wave : 2 * wave + 2]:
            arrived()
        own = (w[shard.wave(wave)] for w in masters)
        numbers = plan.numbers(every, wave, ranks.rank)
        out, own_kept = way.forward(came[there], came_shares[there], numbers, tuple(own), limit)
        kept += own_kept
        # Rows that have arrived where they went leave their place to what comes back.
        sizes = plan.given[wave], plan.found[wave]
        departures.append((ranks.start_exchange(rows[here], out, *sizes), out))
    for returned, _ in departures:
        returned()
    return way.sums(rows, places, base), host, every, order, places, came, came_shares, *kept


def _backward(ctx: Any, grad: Tensor, wanted: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of hidden [T, D], weights [T, K] and the masters."""
    shard: Shard = ctx.shard
    way, ranks = ctx.way, shard.ranks
    experts, w1, w2, w3, host, every, order, places, came, came_shares, *kept = ctx.saved_tensors
    plan = _Plan.of(shard, host)
    given, found = _slices(plan.given), _slices(plan.found)
    rows = way.spread(grad.to(ctx.dtype), order, places)
    d_out, d_shares = torch.empty_like(came), came_shares.new_empty(len(rows))
    arrivals = [
        ranks.start_exchange(d_out[there], rows[here], plan.found[wave], plan.given[wave])
        for wave, (here, there) in enumerate(zip(given, found))
    ]
    departures: list[tuple[Callable[[], object], Tensor]] = []
    d_masters = [
        torch.empty_like(w) if wants and total is None else None
        for w, wants, total in zip((w1, w2, w3), wanted, ctx.totals)
    ]
    each = len(kept) // shard.num_waves
    for wave, (here, there) in enumerate(zip(given, found)):
        arrivals[wave]()
        mine = shard.wave(wave)
        own = (w1[mine], w2[mine], w3[mine])
        inputs = (came[there], came_shares[there], plan.numbers(every, wave, ranks.rank), own, ctx.limit)
        back = way.Backward(d_out[there], inputs, kept[wave * each : (wave + 1) * each], wanted)
        for target, source in ((rows, back.d_rows), (d_shares, back.d_shares)):
            sizes = plan.given[wave], plan.found[wave]
            departures.append((ranks.start_exchange(target[here], source, *sizes), source))
        # The experts' own gradients are made while those of the rows travel.
        totals = [None if total is None else total[mine] for total in ctx.totals]
        for target, part in zip(d_masters, back.of_masters(wanted, totals)):
            if target is not None and part is not None:
                target[mine] = part
    for returned, _ in departures:
        returned()
    return way.gradient_sums(rows, places, experts), d_shares[places], *d_masters
