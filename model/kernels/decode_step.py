"""One block of the model for one token a row on a CPU, in one call (decode_step.c).

The twin is `Block.forward` in PyTorch. At the demo's size its operations and the calls of smaller kernels are
three quarters of a step's time, and a matrix library is slow where a matrix meets some tens of rows.

R rows, N streams, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from consilience.model.config import CSA_RATIO
from consilience.model.kernels import decode_attention
from consilience.model.kernels.compiled import address, call, library
from consilience.model.quantization import OFF

if TYPE_CHECKING:
    from consilience.model.layout import Layout
    from consilience.model.state import CompressorState, LayerState

MOST_ROWS = 512  # 256 rows take half the time of PyTorch's operations at width 64, two thirds at 384
COMPRESSOR = ("wkv.weight", "wgate.weight", "ape", "norm.weight")
WEIGHTS = (  # in the order of weights_t
    *("hc_attn.fn", "hc_attn.base", "hc_attn.scale", "attn_norm.weight"),
    *("attn.wq_a.weight", "attn.q_norm.weight", "attn.wq_b.weight", "attn.wkv.weight", "attn.kv_norm.weight"),
    *("attn.wo_a.weight", "attn.wo_b.weight", "attn.attn_sink"),
    *(f"attn.compressor.{name}" for name in COMPRESSOR),
    *("attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"),
    *(f"attn.indexer.compressor.{name}" for name in COMPRESSOR),
    *("hc_ffn.fn", "hc_ffn.base", "hc_ffn.scale", "ffn_norm.weight"),
    *("ffn.gate.weight", "ffn.gate.bias", "ffn.gate.tid2eid"),
    *(f"ffn.experts.{name}" for name in ("w1", "w2", "w3")),
    *(f"ffn.shared_experts.{name}.weight" for name in ("w1", "w2", "w3")),
)
_places: WeakKeyDictionary[Any, list[tuple[dict[str, Tensor | None], str] | None]] = WeakKeyDictionary()


def is_available(block: Any, streams: Tensor, layout: Layout) -> bool:
    """Whether a `Block` can go through the kernel: a step in fp32 on the CPU, nothing traced, prescribed or
    rounded; experts may be recorded, and are all here."""
    routing = layout.routing
    is_plain = routing is None or routing.into is not None
    if not is_plain or not decode_attention.is_available(layout, streams):
        return False
    attention, experts = block.attn, block.ffn.experts
    fits = streams.shape[0] <= MOST_ROWS and attention.quantization == OFF == experts.quantization
    return fits and experts.shard is None and not isinstance(library("decode_step"), str)


def step(block: Any, streams: Tensor, token_ids: Tensor, layout: Layout, state: LayerState) -> Tensor:
    """Streams [R, N, D] after the block from those before it; advances the layer's state.

    token_ids [R]. ValueError: a weight of the block is not contiguous fp32 on the CPU.
    """
    assert layout.state is not None
    attention = block.attn
    picks = _has_choice(attention.indexer, layout)
    sizes = _sizes(block, streams, layout, state)
    is_sliding = attention.compressor is None
    rotation = layout.sliding_rotation if is_sliding else layout.compressed_rotation
    given = (layout.position, layout.state.tables, rotation, layout.frequencies[not is_sliding], state.window)
    kept = (*_series(state.compressor), *_series(state.indexer))
    streams, out = streams.contiguous(), torch.empty_like(streams, memory_format=torch.contiguous_format)
    settings = (torch.tensor(sizes), torch.tensor(_numbers(block), dtype=torch.float32))
    places = (_addresses(_weights(block)), _addresses((*given, *kept)))
    work = streams.new_empty(_work(sizes))
    chosen = torch.empty(streams.shape[0], block.ffn.gate.topk, dtype=torch.int64)
    given = (picks, streams, token_ids.contiguous())
    call("decode_step", "block_step", *settings, *places, *given, out, chosen, work)
    if layout.routing is not None and not block.ffn.gate.is_hash:
        layout.routing.take_down(block.ffn.layer, chosen)
    return out


def _addresses(tensors: Iterable[Tensor | None]) -> Tensor:
    return torch.tensor([0 if t is None else address(t) for t in tensors])


def _has_choice(indexer: Any, layout: Layout) -> int:
    """1 where the layer's indexer leaves visible entries out, else 0."""
    if indexer is None or indexer.sees_all:
        return 0
    return int(layout.windows[CSA_RATIO].num_columns > indexer.topk)


def _series(state: CompressorState | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if state is None else (state.entries, state.values, state.gates)


@cache
def _work(sizes: tuple[int, ...]) -> int:
    """Floats of working space."""
    count = torch.zeros(1, dtype=torch.int64)
    call("decode_step", "block_work", torch.tensor(sizes), count)
    return int(count)


def _weights(block: Any) -> list[Tensor | None]:
    """The block's WEIGHTS as they are now, None where it has no such part."""
    places = _places.get(block)
    if places is None:
        places = _places[block] = [_place(block, name) for name in WEIGHTS]
    found = [None if place is None else place[0][place[1]] for place in places]
    for name, w in zip(WEIGHTS, found):
        if w is not None and not (w.is_contiguous() and w.dtype in (torch.float32, torch.int64) and w.is_cpu):
            raise ValueError(
                f"{name} is {w.dtype} on {w.device}; a decoding step takes contiguous fp32 (CPU)"
            )
    return found


def _place(block: Any, name: str) -> tuple[dict[str, Tensor | None], str] | None:
    """The table of its module that a weight lies in: looking there is far faster than walking to it."""
    *path, leaf = name.split(".")
    module = block
    for part in path:
        module = getattr(module, part, None)
    for table in () if module is None else (module._parameters, module._buffers):
        if leaf in table:
            return table, leaf
    return None


def _sizes(block: Any, streams: Tensor, layout: Layout, state: LayerState) -> tuple[int, ...]:
    """In the order of sizes_t."""
    attention, indexer, experts, gate = block.attn, block.attn.indexer, block.ffn.experts, block.ffn.gate
    num_experts, inner, _ = experts.w1.shape
    heads = (attention.num_heads, attention.width, attention.num_rope // 2, attention.wq_a.weight.shape[0])
    index = (0, 0, 0) if indexer is None else (indexer.num_heads, indexer.width, indexer.topk)
    per = 1 if state.compressor is None else state.compressor.entries.shape[1]
    assert layout.state is not None
    return (
        *streams.shape,
        block.hc_attn.rounds,
        *heads,
        attention.groups,
        attention.rank,
        attention.window,
        attention.ratio,
        *index,
        num_experts,
        gate.topk,
        inner,
        block.ffn.shared_experts.w1.weight.shape[0],
        state.window.shape[1],
        0 if state.compressor is None else state.compressor.values.shape[1],
        0 if state.indexer is None else state.indexer.values.shape[1],
        per,
        layout.state.tables.shape[1],
    )


def _numbers(block: Any) -> tuple[float, ...]:
    """In the order of numbers_t."""
    attention, indexer = block.attn, block.attn.indexer
    scale = 0.0 if indexer is None else indexer.num_heads**-0.5 * indexer.width**-0.5
    limits = (block.ffn.experts.limit, block.ffn.gate.scaling)
    return (attention.eps, block.hc_attn.eps, *limits, attention.width**-0.5, scale)
