"""V4 attention: sliding window, CSA and HCA layers in one module (report 2.3; specification 4).

B rows, T tokens, D model width, H query heads, C head width, R rope channels, W window,
M compressed entries.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.compressor import Compressor
from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.exact import Linear
from consilience.model.indexer import Indexer, index_loss
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.gpu_decode import step_kernels
from consilience.model.kernels.grouped_projection import grouped_projection
from consilience.model.kernels.sink_attention import sink_attention
from consilience.model.layout import Layout
from consilience.model.norm import RMSNorm, rms
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
        self.wq_a = Linear(d, config.q_lora_rank, dtype)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, dtype)
        self.wq_b = Linear(config.q_lora_rank, heads * width, dtype)
        self.wkv = Linear(d, width, dtype)
        self.kv_norm = RMSNorm(width, self.eps, dtype)
        self.wo_a = Linear(heads * width // self.groups, self.groups * config.o_lora_rank, dtype)
        self.wo_b = Linear(self.groups * config.o_lora_rank, d, dtype)
        self.attn_sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.compressor = None if ratio == SLIDING else Compressor(config, width, ratio, dtype)
        self.indexer = Indexer(config, dtype) if ratio == CSA_RATIO else None

    def forward(self, hidden: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """hidden [B, T, D] (normed) -> [B, T, D]. Advances the layer's state when one is given."""
        num_rows, num_tokens, _ = hidden.shape
        rotation = layout.sliding_rotation if self.ratio == SLIDING else layout.compressed_rotation
        for_heads = rotation[:, :, None]
        latent = self.q_norm(named("attention_inner", self.wq_a, hidden))
        query = named("attention_inner", self.wq_b, latent).unflatten(-1, (self.num_heads, self.width))
        query = rms(query, self.eps, for_heads)
        kv = self.kv_norm(named("attention_inner", self.wkv, hidden), rotation)
        if self.quantization.kv:
            kv = kv_values(kv, self.num_rope)

        kernels = None if state is None else step_kernels(layout, query)
        if state is not None and kernels is not None:
            output = self._step(hidden, latent, query, kv, layout, state, kernels)
        else:
            output = self._attend(hidden, latent, query, kv, layout, state)
        output = rotate(output, for_heads, is_inverse=True)
        low = self._grouped(output.reshape(num_rows * num_tokens, self.groups, -1))
        return named("attention_output", self.wo_b, low.view(num_rows, num_tokens, -1))

    def _attend(
        self,
        hidden: Tensor,
        latent: Tensor,
        query: Tensor,
        kv: Tensor,
        layout: Layout,
        state: LayerState | None,
    ) -> Tensor:
        """query [B, T, H, C] on the keys kv [B, T, C], those before them and compressed entries."""
        keys = Keys(layout, self.window, self._window_keys(kv, layout, state))
        if self.compressor is not None:
            entries = self.compressor(hidden, layout, state.compressor if state else None)
            keys = replace(keys, entries=entries, windows=layout.windows[self.ratio])
        if self.indexer is not None:
            keys = self._picked(hidden, latent, query, keys, state)
        output = sink_attention(query, keys, self.attn_sink, self.width**-0.5)
        if self.compressor is not None and layout.trace is not None:
            layout.trace.add_visible(layout.windows[self.ratio], layout.is_valid, keys.picks)
        return output

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
        """Every group of heads through its own rows of wo_a: [R, groups, in] -> [R, groups · rank]."""
        weight = self.wo_a.weight.view(self.groups, self.rank, -1)
        if exact.is_on():
            return torch.cat([exact.linear(x, w) for x, w in zip(output.unbind(1), weight)], dim=-1)
        if output.is_cuda:
            return grouped_projection(output, weight).flatten(1)
        low = named("attention_inner", torch.bmm, output.transpose(0, 1), weight.transpose(1, 2))
        return low.transpose(0, 1).flatten(1)

    def _window_keys(self, kv: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """Window keys [B, offset + T, C] of the layout; for one-token steps the ring [B, ring, C]."""
        if state is None:
            return kv
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
        self, hidden: Tensor, latent: Tensor, query: Tensor, keys: Keys, state: LayerState | None
    ) -> Keys:
        """`keys` with the indexer's picks; its loss goes into the trace where one is wanted."""
        layout, indexer = keys.layout, self.indexer
        assert indexer is not None
        wants_loss = layout.trace is not None and layout.trace.wants_losses
        has_choice = not indexer.sees_all and layout.windows[CSA_RATIO].num_columns > indexer.topk
        if state is None and not wants_loss:
            if not has_choice:
                return keys
            with torch.no_grad():
                return replace(keys, picks=named("picks", indexer.choose, hidden, latent, layout))
        # The indexer learns from its own loss only, and the rest from the language-model loss only.
        hidden, latent = hidden.detach(), latent.detach()
        with torch.set_grad_enabled(wants_loss and torch.is_grad_enabled()):
            index_keys = indexer.keys(hidden, layout, state.indexer if state else None)
            if not has_choice and not wants_loss:
                return keys
            index = indexer.queries(hidden, latent, index_keys, layout)
            keys = replace(keys, picks=indexer.pick(index, layout))
            if wants_loss and layout.windows[CSA_RATIO].num_columns:
                detached = replace(keys, window=keys.window.detach(), entries=keys.entries.detach())  # type: ignore[union-attr]
                attention = (query.detach(), detached, self.attn_sink.detach(), self.width**-0.5)
                loss, num_queries = index_loss(index, attention, layout.is_valid)
                layout.trace.add_indexer_loss(loss, num_queries)  # type: ignore[union-attr]
        return keys
