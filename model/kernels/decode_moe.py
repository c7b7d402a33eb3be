"""The mixture of experts of a decoding step on a CPU (decode_moe.c); the twin is model/moe.py in PyTorch.

So few rows are a matter of reading every weight once, and of the number of operations: composed, a layer
takes about 70 of them, two thirds of a step's time at the demo's size.

R rows, D model width, E experts, K experts a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library

if TYPE_CHECKING:
    from consilience.model.routing import Routing

MOST_ROWS = 128  # beyond, a matrix library catches up
SIDE, MOST_OUTS = 32, 256  # as in row_lanes.h


def is_available(hidden: Tensor, weight: Tensor) -> bool:
    """Whether few rows [R, D] can go through the compiled kernel: fp32 on the CPU, no gradients wanted."""
    fits = hidden.shape[0] <= MOST_ROWS and not torch.is_grad_enabled() and not exact.is_on()
    fits = fits and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in (hidden, weight))
    return fits and not isinstance(library("decode_moe"), str)


def decode_moe(moe: Any, hidden: Tensor, token_ids: Tensor, routing: Routing | None = None) -> Tensor:
    """What a `MoE` gives for hidden [R, D], token_ids [R]: routed and shared experts, [R, D].

    routing takes the choices down.
    """
    gate, experts, shared = moe.gate, moe.experts, moe.shared_experts
    num_rows, width = hidden.shape
    num_experts, inner, _ = experts.w1.shape
    own, topk = shared.w1.weight.shape[0], gate.topk
    hidden = hidden.contiguous()
    chosen = torch.empty(num_rows, topk, dtype=torch.int64)
    shares = hidden.new_empty(num_rows, topk)
    choosing = (num_rows + 1) * num_experts + SIDE * (width + MOST_OUTS)
    pairs = num_rows * topk
    mixing = max(pairs * (2 * inner + width + 1) + 2 * num_experts, 2 * SIDE * (width + own))
    work = hidden.new_empty(max(choosing, mixing))
    table, bias, ids = (
        (gate.tid2eid, None, token_ids.contiguous()) if gate.is_hash else (None, gate.bias, None)
    )
    sizes = (num_rows, width, num_experts, topk)
    router = (hidden, gate.weight, bias, table, ids)
    call("decode_moe", "moe_route", *sizes, gate.scaling, *router, chosen, shares, work)
    out, places = torch.empty_like(hidden), torch.empty(4 * pairs, dtype=torch.int64)
    w1, w2, w3 = experts.weights()
    weights = (w1, w2, w3, shared.w1.weight, shared.w2.weight, shared.w3.weight)
    sizes = (*sizes, inner, own, experts.limit)
    call("decode_moe", "moe_forward", *sizes, hidden, chosen, shares, *weights, out, work, places)
    if routing is not None:
        routing.take_down(moe.layer, chosen)
    return out
