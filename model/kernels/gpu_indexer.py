"""The lightning indexer on a GPU: scores and top-k of one block of queries after the other.

Twin: model/indexer.py. No [T, M] matrix: a block's scores fit a buffer of bounded size.

B rows, T queries, H heads, C channels, M keys, K picks of a query.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from consilience.model.kernels.choice import uses_triton

BUFFER_BYTES = 1 << 26  # scores held at once: 2,048 queries of 8,192 columns
MIN_QUERIES = 64


def is_available(query: Tensor, weight: Tensor, keys: Tensor) -> bool:
    """Whether the kernels serve this call: on a GPU, queries and keys of one type, fp32 weights."""
    fits = query.dtype == keys.dtype and query.shape[-1] <= 256 and query.shape[2] <= 256
    return fits and weight.dtype == torch.float32 and uses_triton(query, weight, keys)


def pick(
    query: Tensor,
    weight: Tensor,
    keys: Tensor,
    first: Tensor,
    stop: Tensor,
    k: int,
    columns_before: Callable[[int], int],
    is_cut: bool = False,
) -> Tensor:
    """Columns [B, T, K] int64 of the K highest of a query's scores, ascending, then -1; ties the lowest.

    query [B, T, H, C], weight [B, T, H] fp32, keys [B, M, C]; query t of row b has the columns
    first[b, t] … stop[b, t] - 1, and no query before t a column at or beyond columns_before(t).
    """
    from consilience.model.kernels import triton_index_scores, triton_top_k

    num_rows, num_queries = query.shape[:2]
    num_keys = keys.shape[1]
    picks = torch.full((num_rows, num_queries, k), -1, dtype=torch.int64, device=query.device)
    block = max(MIN_QUERIES, BUFFER_BYTES // (4 * max(num_keys, 1)))
    buffer = torch.empty(min(block, num_queries), num_keys, dtype=torch.float32, device=query.device)
    query, weight, keys, first, stop = (x.contiguous() for x in (query, weight, keys, first, stop))
    for row in range(num_rows):
        given = (query[row], weight[row], keys[row], first[row], stop[row])
        for begin in range(0, num_queries, block):
            end = min(begin + block, num_queries)
            columns = columns_before(end)
            if columns == 0:
                continue
            scores = buffer[: end - begin, :columns]
            triton_index_scores.scores(*given, begin, scores, is_cut)
            bounds = (first[row, begin:end], stop[row, begin:end])
            triton_top_k.select(scores, k, *bounds, out=picks[row, begin:end])
    return picks
