"""Weights on their way from a trainer to rollout workers, with a digest that both sides recompute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import WeightsRefused
from consilience.model.digest import weights_digest


def verify(weights: Mapping[str, Tensor], digest: str) -> None:
    """WeightsRefused unless `digest` is that of `weights`; a single flipped bit is enough."""
    found = weights_digest(weights)
    if found != digest:
        raise WeightsRefused(
            f"weights have digest {found[:12]}…, announced was {digest[:12]}…: damaged on the way, or the "
            "wrong ones; the old weights stay in place, publish again"
        )


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One tensor as plain bytes [num_bytes] uint8, which travel between processes without a copy."""

    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray


def pack(weights: Mapping[str, Tensor]) -> dict[str, PackedTensor]:
    """Plain arrays of `weights`; contiguous CPU tensors share their memory."""
    packed = {}
    for name, tensor in weights.items():
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        packed[name] = PackedTensor(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), flat)
    return packed


def unpack(packed: Mapping[str, PackedTensor]) -> dict[str, Tensor]:
    """Inverse of `pack`. Arrays that arrive read-only are copied, so the tensors may be written to.

    WeightsRefused on bytes that do not fill the announced shape.
    """
    weights = {}
    for name, item in packed.items():
        data = item.data if item.data.flags.writeable else item.data.copy()
        try:
            dtype = getattr(torch, item.dtype)
            flat = torch.from_numpy(data).view(dtype) if data.size else torch.empty(0, dtype=dtype)
            weights[name] = flat.reshape(item.shape)
        except (RuntimeError, AttributeError):
            raise WeightsRefused(f"{name}: {data.size} bytes are no {item.dtype} {item.shape}") from None
    return weights
