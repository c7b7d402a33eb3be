"""dQ, and beside it the rows of the picked entries' gradients, in one pass over the weights (Triton).

`_d_query` waits for keys and multiplies, `_rows` (triton_attention_keys.py) waits for memory to take its
rows: one program does both, so that one's products run while the other's rows leave.

B rows, T queries, H heads (padded to P), C head width, S window keys, M entries, K picks of a query,
W window, n queries of a range, weights [B, n, W, 2, P] of window keys and [B, n, K, 2, P] of entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import Problem
from consilience.model.kernels.triton_attention_keys import KeyTile, padded_heads

# By bytes an element and by whether a row of keys has more than 128 channels.
TILES = {(2, True): KeyTile(64, 256, 0, 8, 3), (2, False): KeyTile(64, 128, 0, 4, 2)}
SMALL = KeyTile(32, 32, 0, 4, 1)  # fp32
NUMBERS = [
    "num_queries",
    "num_window",
    "num_entries",
    "num_picks",
    "num_heads",
    "offset",
    "size",
    "begin",
    "end",
]


@triton.jit(do_not_specialize=NUMBERS)
def _query_and_rows(
    query, window, entries, picks, oldest, first, stop, grad, near, far, d_query, rows,
    num_queries, num_window, num_entries, num_picks, num_heads, offset, size, begin, end,
    PADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    num_parts: tl.constexpr = WIDTH // BLOCK_C
    part, row = tl.program_id(0) % num_parts, tl.program_id(1)
    token = end - 1 - tl.program_id(0) // num_parts
    h, r, n = tl.arange(0, PADDED), tl.arange(0, 2 * PADDED), tl.arange(0, BLOCK_N)
    c = part * BLOCK_C + tl.arange(0, BLOCK_C)
    at = (row * num_queries + token).to(tl.int64)
    place = (row * (end - begin) + token - begin).to(tl.int64)
    acc = tl.zeros([PADDED, BLOCK_C], tl.float32)
    low, high = tl.load(oldest + at).to(tl.int32), token + (offset + 1)
    own_near = near + (place * size - (high - size)) * (2 * PADDED) + PADDED
    own_window = window + row.to(tl.int64) * num_window * WIDTH
    for start in range(low, high, BLOCK_N):
        position = start + n
        kept = position < high
        d_s = tl.load(
            own_near + (position[None, :] * (2 * PADDED) + h[:, None]), mask=kept[None, :], other=0.0
        )
        k = tl.load(own_window + (position[:, None] * WIDTH + c[None, :]), mask=kept[:, None], other=0.0)
        acc = tl.dot(d_s, k, acc, input_precision=PRECISION)

    count = tl.minimum((tl.load(stop + at) - tl.load(first + at)).to(tl.int32), num_picks)
    other = tl.where(r >= PADDED, query, grad) + (at * num_heads + r % PADDED) * WIDTH
    values = tl.load(other[:, None] + c[None, :], mask=(r % PADDED < num_heads)[:, None], other=0.0)
    own_far, own_rows = far + place * num_picks * (2 * PADDED), rows + place * num_picks * WIDTH
    own_entries = entries + row.to(tl.int64) * num_entries * WIDTH
    for start in range(0, count, BLOCK_N):
        slot = start + n
        kept = slot < count
        pick = tl.load(picks + at * num_picks + slot, mask=kept, other=0).to(tl.int32)
        # Where a place has no pick its weights are zeros.
        k = tl.load(own_entries + (tl.maximum(pick, 0)[:, None] * WIDTH + c[None, :]))
        factors = tl.load(
            own_far + (slot[:, None] * (2 * PADDED) + r[None, :]), mask=kept[:, None], other=0.0
        )
        d_s = tl.load(
            own_far + (slot[None, :] * (2 * PADDED) + PADDED + h[:, None]), mask=kept[None, :], other=0.0
        )
        made = tl.dot(factors, values, input_precision=PRECISION).to(rows.dtype.element_ty)
        tl.store(own_rows + (slot[:, None] * WIDTH + c[None, :]), made, mask=kept[:, None])
        acc = tl.dot(d_s, k, acc, input_precision=PRECISION)
    target = d_query + (at * num_heads + h)[:, None] * WIDTH + c[None, :]
    tl.store(target, acc.to(d_query.dtype.element_ty), mask=(h < num_heads)[:, None])


def is_available(problem: Problem) -> bool:
    """Picks are gathered, and a program takes all heads."""
    return problem.mode == attention_problem.GATHER and padded_heads(problem) <= 64


def query_and_rows(
    problem: Problem, weights: tuple[Tensor, Tensor], grad: Tensor, d_query: Tensor, begin: int, end: int
) -> Tensor:
    """Writes dQ of the queries begin … end - 1; their picks' gradient rows [B · n · K, C]."""
    batch, _, _, width = problem.query.shape
    tile = TILES.get((grad.element_size(), width > 128), SMALL)
    channels = min(tile.channels, width)
    rows = grad.new_empty(batch * (end - begin) * problem.lengths[3], width)
    _query_and_rows[(end - begin) * (width // channels), batch](
        *problem.tensors[:7], grad, *weights, d_query, rows, *problem.lengths, problem.size, begin, end,
        PADDED=weights[1].shape[4], WIDTH=width, BLOCK_N=tile.keys, BLOCK_C=channels,
        PRECISION="tf32x3" if grad.element_size() == 4 else "ieee",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return rows
