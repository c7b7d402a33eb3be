"""The V4 model: embedding, blocks, head collapse, prediction head (report 2; specification 2).

B rows, T tokens, V vocabulary, D model width, N streams, R = B·T flattened tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from consilience.conf.errors import ConfigError
from consilience.model.attention import Attention
from consilience.model.config import ModelConfig
from consilience.model.context_parallel import piece_of_rows
from consilience.model.forward_trace import Trace
from consilience.model.head import Head
from consilience.model.hyper_connections import HeadCollapse, HyperConnection, settle
from consilience.model.kernels import decode_step
from consilience.model.kernels.gpu_hyper_connections import Written
from consilience.model.layout import Layout, chunk_layout, packed_layout
from consilience.model.moe import MoE
from consilience.model.norm import RMSNorm
from consilience.model.quantization import Quantization
from consilience.model.recompute import Recompute, recomputable
from consilience.model.routing import Routing
from consilience.model.state import DecodeState, LayerState


class Block(nn.Module):
    """X = mHC(X, attention), then X = mHC(X, MoE). The mHC update is the only residual path."""

    recompute: Recompute | None = None

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.attn = Attention(config, config.ratio_of(layer), dtype)
        self.ffn = MoE(config, layer, dtype)
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.hc_attn = HyperConnection(config)
        self.hc_ffn = HyperConnection(config)

    @recomputable
    def forward(
        self, streams: Tensor | Written, token_ids: Tensor, layout: Layout, state: LayerState | None
    ) -> Tensor | Written:
        """streams [R, N, D], token_ids [R] -> [R, N, D]; either may be unwritten as yet (`settle`)."""
        if (
            state is not None
            and isinstance(streams, Tensor)
            and decode_step.is_available(self, streams, layout)
        ):
            return decode_step.step(self, streams, token_ids, layout, state)
        num_rows, num_tokens = layout.position.shape
        streams, x, post, comb = self.hc_attn.receive(streams)
        output = self.attn(self.attn_norm(x).view(num_rows, num_tokens, -1), layout, state)
        streams = self.hc_attn.pass_on(streams, output.flatten(0, 1), post, comb)
        streams, x, post, comb = self.hc_ffn.receive(streams)
        sample = None if layout.trace is None else layout.sample
        output = self.ffn(self.ffn_norm(x), token_ids, sample, layout.trace, layout.routing, layout.piece)
        if self.recompute is None:
            return self.hc_ffn.pass_on(streams, output, post, comb)
        return self.hc_ffn.write(streams, output, post, comb)  # a policy keeps streams, not what makes them


class Transformer(nn.Module):
    """The complete model; `mtp` holds `num_nextn_predict_layers` prediction blocks.

    `dtype` is the type of the weights that V4 keeps in bf16; hyper-connections, sinks, position
    biases and router biases are fp32 whatever it is.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, layer, dtype) for layer in range(config.num_hidden_layers))
        self.hc_head = HeadCollapse(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.head = Head(config.hidden_size, config.vocab_size, dtype)
        from consilience.model.mtp import MTPBlock  # it is a Block

        first, count = config.num_hidden_layers, config.num_nextn_predict_layers
        self.mtp = nn.ModuleList(MTPBlock(config, first + depth, dtype) for depth in range(count))

    def quantize(self, quantization: Quantization) -> None:
        """From now on every part computes with the values it would have as stored (specification 12.4).

        Parameters stay the unrounded masters and get gradients straight through. ConfigError if the
        indexer's width has no Hadamard transform.
        """
        width = self.config.index_head_dim
        if quantization.indexer and width & (width - 1):
            raise ConfigError(f"FP4 index keys need an index_head_dim that is a power of two, found {width}")
        for module in self.modules():
            if hasattr(module, "quantization"):
                module.quantization = quantization  # type: ignore[assignment]

    def hidden(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        state: DecodeState | None = None,
        lengths: Tensor | None = None,
        longest: int | None = None,
        trace: Trace | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Last-layer hidden states after head collapse and final norm: [B, T, D].

        token_ids [B, T]. Without a state: packed rows, `segment_ids` [B, T] (-1 = padding; default
        one sample a row) and `position_ids` [B, T] restarting at 0 in each segment. With a state:
        the chunk continues it, row b by lengths[b] tokens (default T), right-padded; the state
        advances in place. EngineError if the state is too short; unless the caller gives `longest`, tokens
        that no row will exceed, and vouches for the room: then no length is read from the device.
        `routing` takes the learned routers' choices down, or prescribes them.

        Inside of `context_parallel.context_parallel` every rank gives the whole packed rows and gets what is
        of its piece, T its tokens.
        """
        streams, layout = self.streams(
            token_ids,
            segment_ids,
            position_ids,
            state=state,
            lengths=lengths,
            longest=longest,
            trace=trace,
            routing=routing,
        )
        return self.norm(self.hc_head(streams)).view(*layout.position.shape, -1)

    def streams(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        state: DecodeState | None = None,
        lengths: Tensor | None = None,
        longest: int | None = None,
        trace: Trace | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Layout]:
        """Residual streams after the last block [B·T, N, D], and the layout; arguments as `hidden`."""
        layout = self._layout(token_ids, segment_ids, position_ids, state, lengths, longest, trace)
        layout = layout if routing is None else replace(layout, routing=routing)
        flat_ids = layout.cut(token_ids).flatten()
        streams = self.embed(flat_ids)[:, None].expand(-1, self.config.hc_mult, -1)
        for index, block in enumerate(self.layers):
            streams = block(streams, flat_ids, layout, state.layers[index] if state else None)
        streams = settle(streams)
        if state is not None:
            state.position += token_ids.shape[1] if lengths is None else lengths
        if trace is not None:
            trace.stream_spread = _spread(streams.detach(), layout.is_valid.flatten())
        return streams, layout

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, **kwargs) -> Tensor:
        """Logits [B, T, V], fp32 or wider; arguments as `hidden`."""
        return self.head(self.hidden(token_ids, segment_ids, **kwargs))

    def mtp_hidden(
        self, streams: Tensor, next_ids: Tensor, layout: Layout, *, is_detached: bool = False
    ) -> list[Tensor]:
        """Hidden states [B, T, D] of each prediction block over packed rows: block i predicts t + 2 + i.

        streams and layout as `streams` returned them; next_ids [B, T] = the token after each, anything for
        the last of a sample: no other token sees it; of whole rows, also where the layout is a piece of them.
        is_detached: gradients stop before the trunk and the embedding, only the prediction blocks learn.
        """
        hidden = []
        streams = streams.detach() if is_detached else streams
        for depth, block in enumerate(self.mtp):
            layout = layout.without_last()
            ids = layout.cut(nn.functional.pad(next_ids[:, depth:], (0, depth))).flatten()
            embedding = self.embed(ids)
            found, streams = block.predict(  # type: ignore[operator]
                streams, embedding.detach() if is_detached else embedding, ids, layout, None
            )
            hidden.append(found.view(*layout.position.shape, -1))
        return hidden

    def _layout(
        self,
        token_ids: Tensor,
        segment_ids: Tensor | None,
        position_ids: Tensor | None,
        state: DecodeState | None,
        lengths: Tensor | None,
        longest: int | None,
        trace: Trace | None,
    ) -> Layout:
        if state is not None:
            num_tokens = token_ids.shape[1]
            if longest is None:
                state.check_room(num_tokens if lengths is None else lengths)
            return chunk_layout(self.config, state, num_tokens, lengths, trace, longest)
        if segment_ids is None:
            segment_ids = torch.zeros_like(token_ids)
        if position_ids is None:
            position_ids = _positions(segment_ids)
        piece = piece_of_rows(position_ids, segment_ids >= 0)
        return packed_layout(self.config, segment_ids, position_ids, trace, piece)


def _positions(segment_ids: Tensor) -> Tensor:
    """Positions restarting at 0 where the segment changes: [B, T]."""
    steps = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    is_first = torch.ones_like(segment_ids, dtype=torch.bool)
    is_first[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return steps - torch.where(is_first, steps, 0).cummax(1).values


def _spread(streams: Tensor, is_valid: Tensor) -> float:
    """Mean distance of the streams from their mean, relative to the streams' norm."""
    chosen = streams[is_valid].float()
    if not chosen.numel():
        return 0.0
    distance = (chosen - chosen.mean(1, keepdim=True)).norm(dim=-1)
    return float((distance / chosen.norm(dim=-1).clamp(min=1e-20)).mean())
