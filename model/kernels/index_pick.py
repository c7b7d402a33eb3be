"""The indexer's choice on a CPU in one pass over its matches (index_pick.c); twin: `Indexer.pick`.

Composed, the ReLU, the weighted sum, the mask, the order of ties and the sort are fifteen passes over scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, even_parts, library


def is_available(query: Tensor) -> bool:
    """Whether it can go through the compiled kernel: fp32 on the CPU, not exact, a compiler found."""
    fits = query.device.type == "cpu" and query.dtype == torch.float32 and not exact.is_on()
    return fits and not isinstance(library("index_pick"), str)


def pick(match: Tensor, weight: Tensor, first: Tensor, stop: Tensor, topk: int) -> Tensor:
    """Columns [B, n, K] of the K highest visible scores, ascending, -1 where fewer are visible.

    match [B, n, H, M] products of queries and keys, weight [B, n, H]; first, stop [B, n] int64, within M.
    """
    rows, num_queries, heads, columns = match.shape
    picks = torch.empty(rows, num_queries, topk, dtype=torch.int64)
    given = (match, weight, first, stop)
    parts = even_parts(rows * num_queries, heads * columns)
    sizes, work = (rows * num_queries, heads, columns, topk, parts), torch.empty(parts, 3 * columns)
    call("index_pick", "index_pick", *sizes, *(t.contiguous() for t in given), picks, work)
    return picks
