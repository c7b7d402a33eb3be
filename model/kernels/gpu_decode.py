"""One to a few tokens a row on a GPU: the indexer's choice and attention, straight on the decode state.

What decode_attention.py is on a CPU. Nothing is copied out of rings and blocks, no length or count goes to
the host, and all launches keep their shapes while rows grow: a step can be captured in a CUDA graph.

B rows, T queries of a row, H heads, C head width, K picks.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels import decode_attention
from consilience.model.kernels.choice import uses_triton
from consilience.model.state import CompressorState, DecodeState

if TYPE_CHECKING:
    from consilience.model.layout import Layout

PROGRAMS = 132  # multiprocessors of an H100 or H200; a constant, so that bits do not depend on the card
MOST_SPLITS = 64
WIDEST = 512  # a head's channels: queries and two tiles of keys fill the shared memory


def step_kernels(layout: Layout, x: Tensor) -> Any:
    """The module whose `compress`, `pick` and `attend` serve a forward of x [B, T, …] on a decode state:
    decode_attention, this one, or None for PyTorch's."""
    if decode_attention.is_available(layout, x):
        return decode_attention
    return sys.modules[__name__] if is_available(layout, x) else None


def is_available(layout: Layout, x: Tensor) -> bool:
    """Whether a forward of x [B, T, …] can go through these kernels: every row gets all T tokens, no more
    than its ring can lose, half precision on a GPU, nothing traced and no gradients."""
    state, num_tokens = layout.state, layout.position.shape[1]
    fits = state is not None and layout.lengths is None and num_tokens <= state.lookahead + 1
    fits = fits and layout.trace is None and not torch.is_grad_enabled() and not exact.is_on()
    return fits and x.dtype != torch.float32 and uses_triton(x)


def runs_without_host(model: Any) -> bool:
    """Whether a step of a `Transformer` asks its host nothing, so that a CUDA graph can hold it: in bf16
    where grouped products take counts from the device (compute capability 9, 10), keys not quantized."""
    weight = model.head.weight
    if weight.dtype != torch.bfloat16 or not uses_triton(weight):
        return False
    if torch.cuda.get_device_capability(weight.device)[0] not in (9, 10):
        return False
    attentions = [block.attn for block in model.layers]
    return not any(a.quantization.kv or a.quantization.indexer for a in attentions)


def num_splits(state: DecodeState) -> int:
    """Stretches that a row's keys are cut into, from the rows that the state's blocks are for: the same for
    every view of it, so that a row's bits do not depend on how many rows run."""
    # The stride is the blocks that a row of the whole state may have: narrower views keep it.
    rows = (len(state.pool.holders) - 1) // state.tables.stride(0)
    return min(MOST_SPLITS, max(1, PROGRAMS // max(rows, 1)))


def compress(compressor: Any, values: Tensor, gates: Tensor, layout: Layout, state: CompressorState) -> None:
    """A `Compressor`'s values and gates [B, T, series] fp32, without the position bias, into its state."""
    from consilience.model.kernels import triton_decode_compress as kernels

    assert layout.state is not None
    norm, frequencies = compressor.norm, layout.frequencies[True]
    kept = (state.values, state.gates, state.entries)
    for token in range(values.shape[1]):  # a window of these tokens closes with one of them
        new = [x[:, token].contiguous() for x in (values, gates)]
        position = layout.position[:, token].contiguous()
        given = (compressor.ape, norm.weight, norm.eps, frequencies, position, layout.state.tables, kept)
        kernels.compress(new[0], new[1], *given)


def pick(
    query: Tensor,
    weight: Tensor,
    topk: int,
    layout: Layout,
    ratio: int,
    state: CompressorState,
    is_cut: bool = False,
) -> Tensor:
    """What `Indexer.pick` finds for query [B, T, H, C], weight [B, T, H], as rows of the pages [B, T, K]
    int32, which `attend` takes; -1 where fewer are visible. is_cut: scores are cut to bf16."""
    return columns_and_rows(query, weight, topk, layout, ratio, state, is_cut)[1]


def columns_and_rows(
    query: Tensor,
    weight: Tensor,
    topk: int,
    layout: Layout,
    ratio: int,
    state: CompressorState,
    is_cut: bool,
) -> tuple[Tensor, Tensor]:
    """`Indexer.pick`'s columns [B, T, K] int64, and the same as rows of the pages [B, T, K] int32."""
    from consilience.model.kernels.triton_decode_pick import index_scores, select

    assert layout.state is not None
    tables, position = layout.state.tables, layout.position
    given = (query.contiguous(), weight.float().contiguous(), position)
    scores = index_scores(*given, ratio, state.entries, tables, is_cut=is_cut)
    return select(scores, topk, position, ratio, state.entries.shape[1], tables)


def attend(
    query: Tensor,
    kv: Tensor,
    window: Tensor,
    sink: Tensor,
    scale: float,
    layout: Layout,
    compressed: tuple[int, CompressorState, Tensor | None] | None,
) -> Tensor:
    """Attention of query [B, T, H, C] on the ring [B, ring, C] and on compressed entries -> [B, T, H, C].

    kv [B, T, C] goes into the ring first.
    compressed = (ratio, state, rows [B, T, K] that `pick` found, or None for every visible entry).
    ValueError on heads wider than 512 channels.
    """
    from consilience.model.kernels import triton_decode_attention as kernels

    if query.shape[-1] > WIDEST:
        raise ValueError(
            f"heads of {query.shape[-1]} channels; the kernel holds {WIDEST} at most, use the twin"
        )
    decode = layout.state
    assert decode is not None
    kernels.remember(kv.contiguous(), window, layout.position)
    more: dict[str, Tensor | int | None] = {}
    if compressed is not None:
        ratio, state, rows = compressed
        more = {"ratio": ratio, "pages": state.entries, "tables": decode.tables, "rows": rows}
    given = (query.contiguous(), window, layout.position, sink, scale, layout.offset, num_splits(decode))
    return kernels.attend(*given, **more)  # type: ignore[arg-type]
