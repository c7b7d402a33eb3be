"""Token compression of CSA and HCA (report 2.3.1-2.3.2; specification sections 5.1, 6, 7, 8).

B rows, T tokens, E entries closing in this forward, S pooled slots, C entry width, M entry columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.config import CSA_RATIO, ModelConfig
from consilience.model.exact import Linear
from consilience.model.kernels import gpu_compressor, window_pool
from consilience.model.kernels.gpu_decode import step_kernels
from consilience.model.layout import Closing, Layout, ring_size
from consilience.model.norm import RMSNorm
from consilience.model.quantization import OFF, index_values, kv_values
from consilience.model.recompute import named
from consilience.model.rope import rotations
from consilience.model.state import CompressorState


class Compressor(nn.Module):
    """Pools every window of m tokens into one entry, by a softmax per channel over the window's slots.

    CSA (m = 4) projects two series: the first half of the channels serves the *next* window's
    entry, the second half the token's own, so each entry pools 2m slots. HCA pools m. Everything up
    to the pooled value is fp32.
    """

    quantization = OFF

    def __init__(
        self,
        config: ModelConfig,
        width: int,
        ratio: int,
        dtype: torch.dtype | None,
        *,
        is_index: bool = False,
    ) -> None:
        super().__init__()
        self.is_index = is_index
        self.num_rope = config.qk_rope_head_dim
        self.ratio = ratio
        self.width = width
        self.is_overlapping = ratio == CSA_RATIO
        series = 2 * width if self.is_overlapping else width
        self.wkv = Linear(config.hidden_size, series, dtype)
        self.wgate = Linear(config.hidden_size, series, dtype)
        self.ape = nn.Parameter(torch.zeros(ratio, series, dtype=torch.float32))
        self.norm = RMSNorm(width, config.rms_norm_eps, dtype)

    def forward(self, hidden: Tensor, layout: Layout, state: CompressorState | None) -> Tensor:
        """hidden [B, T, D] -> entries [B, M, C]: all visible columns, those of the state or of other ranks
        included."""
        windows = layout.windows[self.ratio]
        if state is not None:
            assert layout.state is not None
            self.advance(hidden, layout, state)
            return state.read(layout.state.tables, windows.num_columns)
        closing = windows.closing
        weights = gpu_compressor.Weights(
            self.wkv.weight, self.wgate.weight, self.ape, self.norm.weight, self.norm.eps
        )
        piece = layout.piece
        if piece is None and gpu_compressor.is_available(hidden, weights, closing):
            turn = layout.compressed_rotation
            return self._cut(gpu_compressor.compress(hidden, weights, closing, turn, windows.num_columns))
        values, gates = self._projected(hidden)
        is_compiled = window_pool.is_available(values, self.ape)
        gates = gates if is_compiled else self._biased(gates, layout)
        if piece is not None:
            values, gates = piece.with_tail(ring_size(self.ratio) - 1, values, gates)
        if is_compiled:
            pooled = window_pool.pool(values, gates, self.ape, closing).to(hidden.dtype)
            entries = self._finished(pooled, closing, layout)
        else:
            entries = self._pool(values, gates, closing, layout, hidden.dtype)
        if piece is not None:
            return piece.gather(entries, windows)
        flat = closing.row * windows.num_columns + closing.column
        shape = (hidden.shape[0], windows.num_columns, self.width)
        return entries.new_zeros(shape).view(-1, self.width).index_copy(0, flat, entries).view(shape)

    def advance(self, hidden: Tensor, layout: Layout, state: CompressorState) -> None:
        """Take hidden [B, T, D] into the state: projections into its rings, entries into its blocks."""
        assert layout.state is not None
        values, gates = self._projected(hidden)
        is_plain = not (self.quantization.kv or self.quantization.indexer)
        kernels = step_kernels(layout, hidden) if is_plain else None
        if kernels is not None:
            kernels.compress(self, values, gates, layout, state)
            return
        gates = self._biased(gates, layout)
        closing = layout.windows[self.ratio].closing
        if closing.row.numel():
            joined_values = torch.cat((state.values, values), dim=1)
            joined_gates = torch.cat((state.gates, gates), dim=1)
            entries = self._pool(joined_values, joined_gates, closing, layout, hidden.dtype)
            state.write(layout.state.tables, closing.row, closing.column, entries)
        self._remember(state, values, gates, layout)

    def _projected(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gates [B, T, series] of the tokens, fp32 or wider."""
        if gpu_compressor.runs_without_gradient(hidden, self.wkv.weight):
            project = gpu_compressor.project
            return project(hidden, self.wkv.weight), project(hidden, self.wgate.weight)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        x = hidden.to(wide)
        weights = (self.wkv.weight.to(wide), self.wgate.weight.to(wide))
        values, gates = (named("attention_inner", exact.linear, x, weight) for weight in weights)
        return values, gates

    def _biased(self, gates: Tensor, layout: Layout) -> Tensor:
        return gates + self.ape[layout.position % self.ratio]

    def _pool(
        self, values: Tensor, gates: Tensor, closing: Closing, layout: Layout, dtype: torch.dtype
    ) -> Tensor:
        """Raw projections [B, ring + T, series] -> finished entries [E, C] in `dtype`."""
        if gpu_compressor.runs_without_gradient(values, self.norm.weight):
            turn = rotations(closing.position, layout.frequencies[True])
            norm = (self.norm.weight, self.norm.eps)
            given = (values, gates, norm, closing, self.ratio, turn, dtype)
            return self._cut(gpu_compressor.pool_biased(*given))
        flat_values, flat_gates = values.flatten(0, 1), gates.flatten(0, 1)
        if self.is_overlapping:
            older, newer = closing.source[:, : self.ratio], closing.source[:, self.ratio :]
            half = self.width
            slots = [flat_values[:, :half][older], flat_values[:, half:][newer]]
            logits = [flat_gates[:, :half][older], flat_gates[:, half:][newer]]
            pooled_values, pooled_gates = torch.cat(slots, dim=1), torch.cat(logits, dim=1)
            pooled_gates = pooled_gates.masked_fill(~closing.is_present[:, :, None], float("-inf"))
        else:
            pooled_values, pooled_gates = flat_values[closing.source], flat_gates[closing.source]
        return self._finished(exact.by_tiles(_pooled, pooled_gates, pooled_values).to(dtype), closing, layout)

    def _finished(self, entries: Tensor, closing: Closing, layout: Layout) -> Tensor:
        """What was pooled [E, C], normed and turned."""
        return self._cut(self.norm(entries, rotations(closing.position, layout.frequencies[True])))

    def _cut(self, entries: Tensor) -> Tensor:
        """Entries [..., C] as the quantized model reads them."""
        if self.is_index:
            return index_values(entries) if self.quantization.indexer else entries
        return kv_values(entries, self.num_rope) if self.quantization.kv else entries

    def _remember(self, state: CompressorState, values: Tensor, gates: Tensor, layout: Layout) -> None:
        """Write the newest raw projections into the ring."""
        ring = state.values.shape[1]
        position = layout.position
        if position.shape[1] == 1 and layout.lengths is None:
            rows = torch.arange(position.shape[0], device=position.device)
            slot = position[:, 0] % ring
            state.values[rows, slot] = values[:, 0]
            state.gates[rows, slot] = gates[:, 0]
            return
        length = layout.is_valid.sum(1, keepdim=True)
        steps = torch.arange(position.shape[1], device=position.device)
        keep = layout.is_valid & (steps >= length - ring)
        row, token = keep.nonzero(as_tuple=True)
        slot = position[row, token] % ring
        state.values[row, slot] = values[row, token]
        state.gates[row, slot] = gates[row, token]


def _pooled(gates: Tensor, values: Tensor) -> Tensor:
    """Weighted sum over the slots, a softmax a channel: [E, S, C] each -> [E, C]."""
    return (torch.softmax(gates, dim=1) * values).sum(1)
