"""V4 attention: sliding window, CSA and HCA layers in one module (report 2.3; specification 4).

B rows, T tokens, D model width, H query heads, C head width, R rope channels, W window,
Q queries in a block, M compressed entries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.model.compressor import Compressor
from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.indexer import Indexer, index_loss
from consilience.model.kernels.sink_attention import sink_attention
from consilience.model.layout import Layout, as_bias
from consilience.model.norm import RMSNorm, rms
from consilience.model.rope import rotate
from consilience.model.state import LayerState


class Attention(nn.Module):
    """Shared-KV attention over the window and the compressed entries, with a sink per head."""

    def __init__(self, config: ModelConfig, ratio: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        d, heads, width = config.hidden_size, config.num_attention_heads, config.head_dim
        self.config = config
        self.ratio = ratio
        self.num_heads, self.width, self.groups = heads, width, config.o_groups
        self.eps = config.rms_norm_eps
        self.wq_a = nn.Linear(d, config.q_lora_rank, bias=False, dtype=dtype)
        self.q_norm = RMSNorm(config.q_lora_rank, self.eps, dtype)
        self.wq_b = nn.Linear(config.q_lora_rank, heads * width, bias=False, dtype=dtype)
        self.wkv = nn.Linear(d, width, bias=False, dtype=dtype)
        self.kv_norm = RMSNorm(width, self.eps, dtype)
        self.wo_a = nn.Linear(
            heads * width // self.groups, self.groups * config.o_lora_rank, bias=False, dtype=dtype
        )
        self.wo_b = nn.Linear(self.groups * config.o_lora_rank, d, bias=False, dtype=dtype)
        self.attn_sink = nn.Parameter(torch.zeros(heads, dtype=torch.float32))
        self.compressor = None if ratio == SLIDING else Compressor(config, width, ratio, dtype)
        self.indexer = Indexer(config, dtype) if ratio == CSA_RATIO else None

    def forward(self, hidden: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """hidden [B, T, D] (normed) -> [B, T, D]. Advances the layer's state when one is given."""
        num_rows, num_tokens, _ = hidden.shape
        rotation = layout.sliding_rotation if self.ratio == SLIDING else layout.compressed_rotation
        latent = self.q_norm(self.wq_a(hidden))
        query = self.wq_b(latent).view(num_rows, num_tokens, self.num_heads, self.width)
        query = rotate(rms(query, self.eps), rotation[:, :, None])
        kv = rotate(self.kv_norm(self.wkv(hidden)), rotation)

        parts = [(self._window_keys(kv, layout, state), layout.window_bias)]
        if self.compressor is not None:
            entries = self.compressor(hidden, layout, state.compressor if state else None)
            bias, scores = self._visible_entries(hidden, latent, layout, state)
            if entries.shape[1]:
                parts.append((entries[:, None], bias))
        output, probabilities = sink_attention(query, parts, self.attn_sink, self.width**-0.5)
        if self.compressor is not None and len(parts) > 1 and layout.trace is not None:
            self._trace(layout, bias, scores, probabilities[1])

        output = rotate(output, rotation.conj()[:, :, None])
        grouped = output.reshape(num_rows * num_tokens, self.groups, -1).transpose(0, 1)
        weight = self.wo_a.weight.view(self.groups, self.config.o_lora_rank, -1)
        low = torch.bmm(grouped, weight.transpose(1, 2)).transpose(0, 1)
        return self.wo_b(low.reshape(num_rows, num_tokens, -1))

    def _window_keys(self, kv: Tensor, layout: Layout, state: LayerState | None) -> Tensor:
        """Window entries by query block: [B, T/Q, W + Q, C]; for one-token steps the ring [B, 1, W, C]."""
        window = self.config.sliding_window
        if state is None:
            blocks = kv.unflatten(1, (-1, layout.block))
            if layout.block < window:
                return nn.functional.pad(blocks, (0, 0, window, 0))
            earlier = nn.functional.pad(blocks[:, :-1], (0, 0, 0, 0, 1, 0))
            return torch.cat((earlier, blocks), dim=2)
        position = layout.position
        rows = torch.arange(position.shape[0], device=position.device)
        if position.shape[1] == 1 and layout.lengths is None:
            state.window[rows, position[:, 0] % window] = kv[:, 0]
            return state.window[:, None]
        steps = torch.arange(-window, 0, device=position.device)
        earlier = state.window[rows[:, None], (position[:, :1] + steps) % window]
        keys = torch.cat((earlier, kv), dim=1).unfold(1, window + layout.block, layout.block).transpose(2, 3)
        length = layout.is_valid.sum(1, keepdim=True)
        keep = layout.is_valid & (torch.arange(position.shape[1], device=position.device) >= length - window)
        row, token = keep.nonzero(as_tuple=True)
        state.window[row, position[row, token] % window] = kv[row, token]
        return keys

    def _visible_entries(
        self, hidden: Tensor, latent: Tensor, layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, Tensor | None]:
        """Additive bias [B, T, M] over compressed entries and, where the indexer ran, its scores."""
        windows = layout.windows[self.ratio]
        if self.indexer is None:
            return windows.bias, None
        wants_loss = layout.trace is not None and layout.trace.wants_losses
        is_dense = windows.num_columns <= self.indexer.topk
        if is_dense and not wants_loss and state is None:
            return windows.bias, None
        # The indexer learns from its own loss only, and the rest from the language-model loss only.
        hidden, latent = hidden.detach(), latent.detach()
        keys = self.indexer.keys(hidden, layout, state.indexer if state else None)
        if is_dense and not wants_loss:
            return windows.bias, None
        with torch.set_grad_enabled(wants_loss and torch.is_grad_enabled()):
            scores = self.indexer.scores(hidden, latent, keys, layout)
        return as_bias(self.indexer.select(scores.detach())), scores

    def _trace(self, layout: Layout, bias: Tensor, scores: Tensor | None, probabilities: Tensor) -> None:
        trace = layout.trace
        assert trace is not None
        is_valid = layout.is_valid[:, :, None]
        visible = int(((layout.windows[self.ratio].bias == 0) & is_valid).sum())
        if self.indexer is None:
            trace.hca_attended += visible
            return
        trace.csa_visible += visible
        trace.csa_dropped += visible - int(((bias == 0) & is_valid).sum())
        if trace.wants_losses and scores is not None:
            trace.indexer_loss.append(index_loss(probabilities, scores, bias == 0, layout.is_valid))
