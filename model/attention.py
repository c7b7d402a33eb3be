"""V4 attention: sliding window, CSA and HCA layers in one module (report 2.3; specification 4).

B rows, T tokens, D model width, H query heads, C head width, R rope channels, W window,
M compressed entries.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.compressor import Compressor
from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.indexer import Indexer, IndexQueries, index_loss
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.fp8_linear import stored_tiles
from consilience.model.kernels.gpu_decode import step_kernels
from consilience.model.kernels.grouped_projection import grouped_projection
from consilience.model.kernels.sink_attention import sink_attention
from consilience.model.layout import Layout
from consilience.model.linear import StoredLinear, project
from consilience.model.norm import RMSNorm, rms
from consilience.model.pieces import Work, in_pieces, piece_of
from consilience.model.quantization import OFF, kv_values
from consilience.model.recompute import named
from consilience.model.rope import rotate
from consilience.model.state import LayerState


class Attention(nn.Module):
    """Shared-KV attention over the window and the compressed entries, with a sink per head."""

    quantization = OFF

    def __init__(self, config: ModelConfig, ratio: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        d, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.ratio, self.window = ratio, config.sliding_window
        self.num_heads, self.width, self.num_rope = heads, width, config.qk_rope_head_dim
        self.groups, self.rank = config.o_groups, config.o_lora_rank
        self.eps = config.rms_norm_eps
        self.wq_a = StoredLinear(d, config.q_lora_rank, dtype)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, dtype)
        self.wq_b = StoredLinear(config.q_lora_rank, heads * width, dtype)
        self.wkv = StoredLinear(d, width, dtype)
        self.kv_norm = RMSNorm(width, self.eps, dtype)
        self.wo_a = StoredLinear(heads * width // self.groups, self.groups * config.o_lora_rank, dtype)
        self.wo_b = StoredLinear(self.groups * config.o_lora_rank, d, dtype)
        self.attn_sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.compressor = None if ratio == SLIDING else Compressor(config, width, ratio, dtype)
        self.indexer = Indexer(config, dtype) if ratio == CSA_RATIO else None

    def forward(self, hidden: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """hidden [B, T, D] (normed) -> [B, T, D]. Advances the layer's state when one is given."""
        rotation = layout.sliding_rotation if self.ratio == SLIDING else layout.compressed_rotation
        latent, kv = named("attention_inner", project, hidden, self.wq_a, self.wkv)
        latent, kv = self.q_norm(latent), self.kv_norm(kv, rotation)
        if self.quantization.kv:
            kv = kv_values(kv, self.num_rope)

        kernels = None if state is None else step_kernels(layout, latent)
        if state is None or kernels is None:
            return self._attend(hidden, latent, kv, rotation, layout, state)
        query = self._query(latent, rotation)
        output = self._step(hidden, latent, query, kv, layout, state, kernels)
        return self._given_out(rotate(output, rotation[:, :, None], is_inverse=True))

    def _query(self, latent: Tensor, rotation: Tensor) -> Tensor:
        """latent [B, T, R] -> queries [B, T, H, C], normed and turned."""
        query = named("attention_inner", self.wq_b, latent).unflatten(-1, (self.num_heads, self.width))
        return rms(query, self.eps, rotation[:, :, None])

    def _given_out(self, output: Tensor) -> Tensor:
        """What attention sums over keys, turned back [B, T, H, C] -> [B, T, D]."""
        num_rows, num_tokens = output.shape[:2]
        low = self._grouped(output.reshape(num_rows * num_tokens, self.groups, -1))
        return named("attention_output", self.wo_b, low.view(num_rows, num_tokens, -1))

    def _attend(
        self,
        hidden: Tensor,
        latent: Tensor,
        kv: Tensor,
        rotation: Tensor,
        layout: Layout,
        state: LayerState | None,
    ) -> Tensor:
        """Queries of latent [B, T, R] on the keys kv [B, T, C], those before them and compressed entries.

        All that has H · C channels a token is made a piece of queries at a time, where it is much.
        """
        keys = Keys(layout, self.window, self._window_keys(kv, layout, state))
        if self.compressor is not None:
            entries = self.compressor(hidden, layout, state.compressor if state else None)
            keys = replace(keys, entries=entries, windows=layout.windows[self.ratio])
        index = None
        if self.indexer is not None:
            keys, index = self._picked(hidden, latent, keys, state)
        token_bytes = latent.shape[0] * self.num_heads * self.width * latent.element_size()
        piece = piece_of(latent.shape[1], token_bytes)
        parameters = (self.wq_b.weight, self.wo_a.weight, self.wo_b.weight, self.attn_sink)
        run = partial(self._inner, keys.without_tensors())
        work = Work(run, 1, piece, "attention_output", parameters)
        rows = (latent, rotation, keys.picks, index and index.query, index and index.weight)
        output, *loss = in_pieces(work, rows, (keys.window, keys.entries, index and index.keys))
        if layout.trace is not None:
            if loss and index is not None:
                # Every rank goes back through the gathered keys, also one whose queries see none.
                total = loss[0] if layout.piece is None else loss[0] + index.keys[:, :0].sum()
                layout.trace.add_indexer_loss(total / loss[1].clamp(min=1), loss[1])
            if self.compressor is not None:
                layout.trace.add_visible(layout.windows[self.ratio], layout.is_valid, keys.picks)
        return output

    def _inner(
        self,
        place: Keys,
        start: int,
        latent: Tensor,
        rotation: Tensor,
        picks: Tensor | None,
        index_query: Tensor | None,
        index_weight: Tensor | None,
        window: Tensor,
        entries: Tensor | None,
        index_keys: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Queries start … start + n - 1 from their latents to what they give out [B, n, D].

        With an index also the sum of its losses and the queries that it is over.
        """
        keys = place.of_queries(start, start + latent.shape[1], window, entries, picks)
        query = self._query(latent, rotation)
        loss: tuple[Tensor, ...] = ()
        if index_query is not None:
            assert index_weight is not None and index_keys is not None and self.indexer is not None
            is_cut = self.indexer.quantization.index_scores
            index = IndexQueries(index_query, index_weight, index_keys, is_cut)
            attention = (query.detach(), keys.detached(), self.attn_sink.detach(), self.width**-0.5)
            mean, count = index_loss(index, attention, keys.layout.is_valid)
            loss = (mean * count, count)
        output = sink_attention(query, keys, self.attn_sink, self.width**-0.5)
        del query  # where nothing is kept for a backward, it goes before more of its size comes
        output = rotate(output, rotation[:, :, None], is_inverse=True)
        return self._given_out(output), *loss

    def _step(
        self,
        hidden: Tensor,
        latent: Tensor,
        query: Tensor,
        kv: Tensor,
        layout: Layout,
        state: LayerState,
        kernels: Any,
    ) -> Tensor:
        """`_attend` for a step by kernels that read the state where it lies."""
        compressed = None
        if self.compressor is not None:
            assert state.compressor is not None
            self.compressor.advance(hidden, layout, state.compressor)
            picks = None
            if self.indexer is not None:
                assert state.indexer is not None
                picks = self.indexer.step(hidden, latent, layout, state.indexer)
            compressed = (self.ratio, state.compressor, picks)
        scale = self.width**-0.5
        return kernels.attend(query, kv, state.window, self.attn_sink, scale, layout, compressed)

    def _grouped(self, output: Tensor) -> Tensor:
        """Every group of heads through its own rows of wo_a: [R, groups, in] -> [R, groups · rank].

        Of FP8 it has the weight's values alone, as in the released model's code (specification 4).
        """
        weight = stored_tiles(self.wo_a.weight) if self.quantization.linears else self.wo_a.weight
        weight = weight.view(self.groups, self.rank, -1)
        if exact.is_on():
            return torch.cat([exact.linear(x, w) for x, w in zip(output.unbind(1), weight)], dim=-1)
        if output.is_cuda:
            return grouped_projection(output, weight).flatten(1)
        low = named("attention_inner", torch.bmm, output.transpose(0, 1), weight.transpose(1, 2))
        return low.transpose(0, 1).flatten(1)

    def _window_keys(self, kv: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """Window keys [B, offset + T, C] of the layout; for one-token steps the ring [B, ring, C]."""
        if state is None:
            return kv if layout.piece is None else layout.piece.with_tail(self.window - 1, kv)[0]
        position, ring = layout.position, state.window.shape[1]
        rows = torch.arange(position.shape[0], device=position.device)
        if layout.is_step:
            state.window[rows, position[:, 0] % ring] = kv[:, 0]
            return state.window
        steps = torch.arange(-self.window, 0, device=position.device)
        earlier = state.window[rows[:, None], (position[:, :1] + steps) % ring]
        length = layout.is_valid.sum(1, keepdim=True)
        keep = layout.is_valid & (torch.arange(position.shape[1], device=position.device) >= length - ring)
        row, token = keep.nonzero(as_tuple=True)
        state.window[row, position[row, token] % ring] = kv[row, token]
        return torch.cat((earlier, kv), dim=1)

    def _picked(
        self, hidden: Tensor, latent: Tensor, keys: Keys, state: LayerState | None
    ) -> tuple[Keys, IndexQueries | None]:
        """`keys` with the indexer's picks, and what its loss is made of where one is wanted."""
        layout, indexer = keys.layout, self.indexer
        assert indexer is not None
        wants_loss = layout.trace is not None and layout.trace.wants_losses
        num_columns = layout.windows[CSA_RATIO].num_columns
        has_choice = not indexer.sees_all and num_columns > indexer.topk
        if state is None and not wants_loss:
            if not has_choice:
                return keys, None
            with torch.no_grad():
                return replace(keys, picks=named("picks", indexer.choose, hidden, latent, layout)), None
        # The indexer learns from its own loss only, and the rest from the language-model loss only.
        hidden, latent = hidden.detach(), latent.detach()
        with torch.set_grad_enabled(wants_loss and torch.is_grad_enabled()):
            index_keys = indexer.keys(hidden, layout, state.indexer if state else None)
            if not has_choice and not wants_loss:
                return keys, None
            index = indexer.queries(hidden, latent, index_keys, layout)
            keys = replace(keys, picks=indexer.pick(index, layout))
        return keys, index if wants_loss and num_columns else None
