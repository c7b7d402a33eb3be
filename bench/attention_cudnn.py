"""cudnn-frontend's sparse-attention backward (CuTe DSL, Hopper): an arm of attention_gpu.py.

Its keys are one list, so window keys and entries are joined, and every query names its own: those of its
window first, its picks behind. The list is made before the clock starts, as is the log-sum without the sink,
which ours includes. It adds gradients of keys by atomics: no order, no equal bits.

T queries, H heads, C head width, S window keys, M entries, K picks, W window.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from consilience.model.kernels.attention_problem import Problem


def cudnn_backward(given: Problem, out: Tensor, lse: Tensor, grad: Tensor) -> Callable[[], dict[str, Tensor]]:
    """A function that computes dQ [T, H, C], d window [S, C], d entries [M, C], d sink [H].

    One row, gathered picks. ImportError where cudnn-frontend or CuTe is not installed; ValueError for other
    calls.
    """
    from cudnn.deepseek_sparse_attention.sparse_attention_backward.api import (  # type: ignore[import-not-found]
        sparse_attention_backward_wrapper,
    )

    if given.query.shape[0] != 1 or given.chosen is None or given.chosen.dtype == torch.uint8:
        raise ValueError("cuDNN's arm takes one row with picks by list")
    assert given.entries is not None
    keys, counts = _key_lists(given)
    natural = lse[0].double() * math.log(2)
    without_sink = natural + torch.log1p(-torch.exp(given.sink.double() - natural))
    arguments = {
        "q": given.query[0],
        "kv": torch.cat([given.window[0], given.entries[0]]).contiguous(),
        "out": out[0],
        "dout": grad[0].contiguous(),
        "lse": without_sink.float().contiguous(),
        "attn_sink": given.sink.float(),
        "topk_idxs": keys,
        "topk_length": counts,
        "softmax_scale": given.scale,
    }

    def run() -> dict[str, Tensor]:
        found = sparse_attention_backward_wrapper(**arguments)
        num_window = given.window.shape[1]
        return {
            "dQ": found["dq"],
            "d window": found["dkv"][:num_window],
            "d entries": found["dkv"][num_window:],
            "d sink": found["d_sink"],
        }

    return run


def _key_lists(given: Problem) -> tuple[Tensor, Tensor]:
    """[T, W + K] int32 keys of each query, its own first; [T] int32 how many."""
    assert given.chosen is not None
    num_queries, num_window = given.query.shape[1], given.window.shape[1]
    token = torch.arange(num_queries, device=given.query.device)[:, None]
    slot = token + given.offset + 1 - given.size + torch.arange(given.size, device=token.device)
    near = torch.where(slot >= given.oldest[0][:, None], slot, -1)
    far = torch.where(given.chosen[0] >= 0, given.chosen[0] + num_window, -1)
    keys = torch.cat([near, far], 1)
    order = (keys < 0).to(torch.int8).argsort(dim=1, stable=True)
    return keys.gather(1, order).int().contiguous(), (keys >= 0).sum(1).int().contiguous()
