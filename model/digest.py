"""Digests of weights, of all and of each tensor: a publisher announces, every receiver recomputes them."""

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


def tensor_digest(tensor: Tensor) -> str:
    """sha256 (64 hex digits) over dtype, shape and little-endian bytes of one tensor, whatever its name."""
    digest = hashlib.sha256(f"{dtype_name(tensor)}\0{tuple(tensor.shape)}\0".encode())
    digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def dtype_name(tensor: Tensor) -> str:
    """ "float32", "bfloat16", …"""
    return str(tensor.dtype).removeprefix("torch.")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over names in sorted order, each with dtype, shape and little-endian bytes.

    Names and headers are length-prefixed, so no two different sets of tensors give the same input.
    Where the tensors live and how they are strided does not matter. Never raises for a valid tensor.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name]
        header = f"{name}\0{dtype_name(tensor)}\0{tuple(tensor.shape)}".encode()
        digest.update(len(header).to_bytes(8, "little"))
        digest.update(header)
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
