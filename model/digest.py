"""The weights digest: one sha256 that a publisher announces and every receiver recomputes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of `tensor` in row-major order, little-endian, without a copy where one is not needed."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy()
    if sys.byteorder == "big":
        raw = raw.reshape(-1, flat.element_size())[:, ::-1].copy().reshape(-1)
    return raw.data


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over names in sorted order, each with dtype, shape and little-endian bytes.

    Names and headers are length-prefixed, so no two different sets of tensors give the same input.
    Where the tensors live and how they are strided does not matter. Never raises for a valid tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        header = f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}".encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
