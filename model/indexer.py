"""The lightning indexer: which compressed entries a CSA query attends to (report 2.3.1; specification 5.2).

B rows, T queries, M entries, H index heads, C index width, K picks of a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.compressor import Compressor
from consilience.model.config import CSA_RATIO, ModelConfig
from consilience.model.exact import Linear
from consilience.model.kernels import decode_attention, gpu_decode, gpu_index_loss, gpu_indexer, index_pick
from consilience.model.kernels.attention_keys import Keys, Stretch, stretches, visible_columns
from consilience.model.kernels.exact_attention import exact_scores
from consilience.model.kernels.sink_attention import entry_mass
from consilience.model.layout import Layout
from consilience.model.linear import StoredLinear
from consilience.model.quantization import OFF, fake_bf16, index_values
from consilience.model.rope import rotate
from consilience.model.row_sums import take_rows
from consilience.model.run_again import run_again
from consilience.model.state import CompressorState
from consilience.model.top_k import top_k

BUFFER = 1 << 20  # matches a block of queries may hold


@dataclass(frozen=True)
class IndexQueries:
    """query [B, T, H, C], turned; weight [B, T, H] fp32, scaled; keys [B, M, C]; are scores cut to bf16?"""

    query: Tensor
    weight: Tensor
    keys: Tensor
    is_cut: bool = False

    def scores(self, start: int, stop: int, columns: int) -> Tensor:
        """I[t, i] = Σ_h w_h · ReLU(q_h · K_i) of queries start … stop - 1: [B, n, columns], fp32 or wider."""
        match = self.matches(start, stop, columns).relu_()
        scores = (match * self.weight[:, start:stop, :, None].to(match.dtype)).sum(2)
        return fake_bf16(scores) if self.is_cut else scores

    def matches(self, start: int, stop: int, columns: int) -> Tensor:
        """q_h · K_i of queries start … stop - 1: [B, n, H, columns], fp32 or wider."""
        query, keys = self.query[:, start:stop], self.keys[:, :columns]
        wide = torch.promote_types(query.dtype, torch.float32)
        rows, num_queries, heads, _ = query.shape
        match = torch.bmm(query.to(wide).flatten(1, 2), keys.to(wide).transpose(1, 2))
        return match.view(rows, num_queries, heads, columns)

    def scores_of(self, start: int, stop: int, picks: Tensor) -> Tensor:
        """The same scores at picks [B, n, K] alone; those of -1 mean nothing."""
        query, width = self.query[:, start:stop], self.keys.shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        rows, num_queries, heads, _ = query.shape
        first = torch.arange(rows, device=picks.device)[:, None, None] * self.keys.shape[1]
        keys = take_rows(self.keys.reshape(-1, width), (picks.clamp(min=0) + first).flatten())
        keys = keys.view(rows * num_queries, -1, width).to(wide)
        match = torch.bmm(query.to(wide).flatten(0, 1), keys.transpose(1, 2)).relu_()
        weight = self.weight[:, start:stop, :, None].to(wide)
        scores = (match.view(rows, num_queries, heads, -1) * weight).sum(2)
        return fake_bf16(scores) if self.is_cut else scores


class Indexer(nn.Module):
    """Scores every visible entry and keeps the K highest.

    Queries come from the attention's normed latent without a norm of their own; weights may be
    negative. Gets no gradient from the language-model loss; `index_loss` trains it. With `sees_all`
    (the warm-up stage) nothing is left out.
    """

    quantization = OFF

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.num_heads = config.index_n_heads
        self.width = config.index_head_dim
        self.topk = config.index_topk
        self.sees_all = False
        self.wq_b = StoredLinear(config.q_lora_rank, self.num_heads * self.width, dtype)
        self.weights_proj = Linear(config.hidden_size, self.num_heads, dtype)
        self.compressor = Compressor(config, self.width, CSA_RATIO, dtype, is_index=True)

    def keys(self, hidden: Tensor, layout: Layout, state: CompressorState | None) -> Tensor:
        """Index keys [B, M, C]; advances the state."""
        return self.compressor(hidden, layout, state)

    def queries(self, hidden: Tensor, latent: Tensor, keys: Tensor, layout: Layout) -> IndexQueries:
        """hidden [B, T, D], latent [B, T, R] -> what scores are made of."""
        num_rows, num_tokens = hidden.shape[:2]
        query = self.wq_b(latent).view(num_rows, num_tokens, self.num_heads, self.width)
        query = rotate(query, layout.compressed_rotation[:, :, None])
        if self.quantization.indexer:
            query = index_values(query)
        weight = self.weights_proj(hidden)
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight = weight.to(wide) * (self.num_heads**-0.5 * self.width**-0.5)
        return IndexQueries(query, weight, keys, self.quantization.index_scores)

    def choose(self, hidden: Tensor, latent: Tensor, layout: Layout) -> Tensor | None:
        """`pick` from the hidden states [B, T, D] and latents [B, T, R] of packed rows."""
        return self.pick(self.queries(hidden, latent, self.keys(hidden, layout, None), layout), layout)

    def step(self, hidden: Tensor, latent: Tensor, layout: Layout, state: CompressorState) -> Tensor | None:
        """`pick` on a decode state after one token a row, where the compiled kernels are available."""
        self.compressor.advance(hidden, layout, state)
        windows = layout.windows[CSA_RATIO]
        if self.sees_all or windows.num_columns <= self.topk:
            return None
        assert layout.state is not None
        if gpu_decode.is_available(layout, hidden):
            index = self.queries(hidden, latent, state.entries, layout)
            given = (index.query, index.weight, self.topk, layout, CSA_RATIO, state)
            return gpu_decode.pick(*given, is_cut=index.is_cut)
        if self.quantization.indexer or self.quantization.index_scores:
            keys = state.read(layout.state.tables, windows.num_columns)
            return self.pick(self.queries(hidden, latent, keys, layout), layout)
        index = self.queries(hidden, latent, state.entries, layout)
        return decode_attention.pick(index.query, index.weight, self.topk, layout, CSA_RATIO, state)

    @torch.no_grad()
    def pick(self, index: IndexQueries, layout: Layout, buffer: int = BUFFER) -> Tensor | None:
        """Columns [B, T, K] of the K highest visible scores, ascending, -1 where fewer are visible.

        None where every visible entry is attended to. Ties take the lowest index. `buffer` bounds the
        matches held at once, but never below those of one query a row.
        """
        windows = layout.windows[CSA_RATIO]
        if self.sees_all or windows.num_columns <= self.topk:
            return None
        rows, num_tokens = layout.position.shape
        if exact.is_on():
            tiles = exact_scores(index.query, index.weight, index.keys, windows)
            best = [self._best(fake_bf16(scores) if index.is_cut else scores) for scores in tiles]
            return torch.cat(best)[: rows * num_tokens].view(rows, num_tokens, -1)
        if gpu_indexer.is_available(index.query, index.weight, index.keys):
            given = (index.query, index.weight, index.keys, windows.first, windows.stop)
            return gpu_indexer.pick(*given, self.topk, windows.columns_before, index.is_cut)
        block = max(1, buffer // (rows * self.num_heads * windows.num_columns))
        picks = torch.full((rows, num_tokens, self.topk), -1, device=layout.position.device)
        is_compiled = index_pick.is_available(index.query) and not index.is_cut
        for start in range(0, num_tokens, block):
            stop = min(start + block, num_tokens)
            columns = windows.columns_before(stop)
            if columns == 0:
                continue
            if is_compiled:
                match, here = index.matches(start, stop, columns), slice(start, stop)
                # Padding may see past what its block can.
                seen = (windows.first[:, here], windows.stop[:, here].clamp(max=columns))
                picks[:, here] = index_pick.pick(match, index.weight[:, here], *seen, self.topk)
                continue
            column = torch.arange(columns, device=picks.device)
            seen = column >= windows.first[:, start:stop, None]
            seen &= column < windows.stop[:, start:stop, None]
            scores = index.scores(start, stop, columns).masked_fill_(~seen, float("-inf"))
            best = self._best(scores)
            picks[:, start:stop, : best.shape[2]] = best
        return picks

    def _best(self, scores: Tensor) -> Tensor:
        """Columns of the K highest scores [..., M] above -inf, ascending, then -1."""
        columns = scores.shape[-1]
        best = top_k(scores, min(self.topk, columns))
        best = torch.where(scores.gather(-1, best) > float("-inf"), best, columns).sort(dim=-1).values
        return torch.where(best < columns, best, -1)


def index_loss(
    index: IndexQueries,
    attention: tuple[Tensor, Keys, Tensor, float],
    is_valid: Tensor,
    buffer: int = BUFFER,
) -> tuple[Tensor, Tensor]:
    """Mean KL(target ‖ softmax(scores)) over valid queries that see a candidate entry, and their number.

    The target is the main attention's probability on each candidate, window and sink in the denominator,
    summed over heads and L1-normalised (specification 5.3); candidates are the picks where the indexer
    chose, else all visible entries. attention = (query [B, T, H, C], keys, sink [H], scale), all
    detached. Computed stretch by stretch, again in the backward: memory is linear in T.
    """
    query, keys, sink, scale = attention
    parts = (index.query, index.weight, index.keys)
    if gpu_index_loss.is_available(parts, query, keys, sink):
        assert keys.entries is not None and keys.windows is not None
        denominator = gpu_index_loss.denominators(query, keys, sink, scale)
        teacher = gpu_index_loss.Teacher(query, keys.entries, denominator, scale, is_valid)
        bounds = (keys.windows.first, keys.windows.stop)
        return gpu_index_loss.index_loss(parts, teacher, keys.picks, bounds, index.is_cut)
    total, count = torch.zeros((), device=query.device), torch.zeros((), device=query.device)
    heads = max(query.shape[2], index.query.shape[2])
    for part in stretches(keys, query.shape[1], query.shape[0], heads, buffer):
        if part.columns:
            rest = (index.is_cut, query, keys, sink, scale, part, is_valid)
            kl, used = run_again(_stretch_loss, index.query, index.weight, index.keys, *rest)
            total, count = total + kl, count + used
    return total / count.clamp(min=1), count


def _stretch_loss(
    index_query: Tensor,
    weight: Tensor,
    index_keys: Tensor,
    is_cut: bool,
    query: Tensor,
    keys: Keys,
    sink: Tensor,
    scale: float,
    part: Stretch,
    is_valid: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sum of the stretch's divergences and the number of queries that have one."""
    index = IndexQueries(index_query, weight, index_keys, is_cut)
    here = slice(part.start, part.stop)
    with torch.no_grad():
        mass = entry_mass(query, keys, sink, scale, part)
    if keys.gathers:
        picks = keys.picks[:, here]  # type: ignore[index]
        seen, scores = picks >= 0, index.scores_of(part.start, part.stop, picks)
    else:
        seen, scores = visible_columns(keys, part), index.scores(part.start, part.stop, part.columns)
    return divergence(mass, scores, seen & is_valid[:, here, None])


def divergence(mass: Tensor, scores: Tensor, is_candidate: Tensor) -> tuple[Tensor, Tensor]:
    """Σ KL(mass / Σ mass ‖ softmax(scores)) over queries with candidates, and their number.

    mass, scores, is_candidate [B, n, S].
    """
    target = mass.to(scores.dtype).masked_fill(~is_candidate, 0.0)
    sums = target.sum(-1, keepdim=True)
    is_used = sums[..., 0] > 0
    target = target / sums.clamp(min=1e-20)
    log_index = torch.log_softmax(scores.masked_fill(~is_candidate, -1e30), dim=-1)
    kl = torch.special.xlogy(target, target) - target * log_index.clamp(min=-1e4)
    return (kl.sum(-1) * is_used).sum(), is_used.sum()


@contextmanager
def warming_up(model: nn.Module) -> Iterator[None]:
    """The indexers' warm-up stage (V3.2 report, 2.1): attention sees every entry, only indexers learn."""
    indexers = [module for module in model.modules() if isinstance(module, Indexer)]
    learning = {parameter for indexer in indexers for parameter in indexer.parameters()}
    frozen = [p for p in model.parameters() if p.requires_grad and p not in learning]
    try:
        for indexer in indexers:
            indexer.sees_all = True
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
    finally:
        for indexer in indexers:
            indexer.sees_all = False
        for parameter in frozen:
            parameter.requires_grad_(True)
