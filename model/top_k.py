"""Top-k with a rule for ties: of equal scores the lowest index wins, on every device.

`torch.topk` leaves open which of equal values it takes, and ReLU and padding make equal scores common.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = (1 << 31) - 1


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices [..., k] of the k highest scores [..., N] in descending order. No score may be NaN.

    fp32 scores become integers of the same order, with the index below them as the smaller part of one
    64-bit key: all keys differ, so there are no ties left. Other types are sorted stably.
    """
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # -0.0 and 0.0 are equal scores with different bits.
    bits = (scores + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ _LOW, bits)
    size = scores.shape[-1]
    backwards = torch.arange(size - 1, -1, -1, device=scores.device)
    return size - 1 - ((ordered << 32) + backwards).topk(k, dim=-1).values.bitwise_and((1 << 32) - 1)
