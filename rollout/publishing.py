"""Weights on their way from a trainer to rollout workers, proven tensor by tensor on the receiving side.

    announce ─► record (publication_log.py) ─► transport (weight_transport.py) ─► verify ─► load

A `Publication` says what the bytes of one version are. Whoever receives weights checks them against it before
anything is loaded, so a version in a token can be traced to bytes, and a damaged, incomplete or mistaken
delivery leaves the old weights in place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import WeightsRefused
from consilience.model.digest import dtype_name, tensor_digest, weights_digest


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What a tensor is: dtype ("float32"), shape, 64 hex digits of sha256 (`tensor_digest`)."""

    dtype: str
    shape: tuple[int, ...]
    digest: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorRecord:
        return cls(dtype_name(tensor), tuple(tensor.shape), tensor_digest(tensor))

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} sha256 {self.digest[:12]}…"


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of the weights.

    version       what tokens carry that are sampled with it
    digest        of all tensors together (`weights_digest`), which checkpoints carry too
    tensors       official name -> what it must be
    quantization  how the receiver computes with them: a preset of `model/quantization.py`
    time_s        seconds since 1970 when it was announced
    """

    version: int
    digest: str
    tensors: Mapping[str, TensorRecord]
    quantization: str = "off"
    time_s: float = 0.0


Announced = Publication | str
"""What a receiver checks against: a publication, or the digest of all tensors alone."""


def announce(weights: Mapping[str, Tensor], version: int, quantization: str = "off") -> Publication:
    """The publication of `weights` as they are now; later changes of them will be noticed."""
    # Hashing lets other threads run.
    with ThreadPoolExecutor(1) as beside:  # no limit: it computes, here, and waits for nobody
        digest = beside.submit(weights_digest, weights)
        tensors = tensor_records(weights)
        found = digest.result()  # no limit: it computes, as said
        return Publication(version, found, tensors, quantization, time.time())


def tensor_records(weights: Mapping[str, Tensor]) -> dict[str, TensorRecord]:
    """Name -> dtype, shape and digest of each tensor."""
    return {name: TensorRecord.of(tensor) for name, tensor in weights.items()}


def digest_of(announced: Announced) -> str:
    """The digest of all tensors together."""
    return announced.digest if isinstance(announced, Publication) else announced


def verify(weights: Mapping[str, Tensor], announced: Announced) -> None:
    """WeightsRefused unless `weights` are what was announced; a single flipped bit is enough.

    Against a publication the error names the tensor, what was found and what was expected.
    """
    if isinstance(announced, Publication):
        compare(tensor_records(weights), announced)
        return
    found = weights_digest(weights)
    if found != announced:
        raise WeightsRefused(
            f"weights have digest {found[:12]}…, announced was {announced[:12]}…: damaged on the way, or the "
            "wrong ones; the old weights stay in place, publish again"
        )


def compare(found: Mapping[str, TensorRecord], publication: Publication, where: str = "") -> None:
    """WeightsRefused at the first tensor that is not as published. `where`: who holds what was found."""
    prefix = f"{where}: " if where else ""
    version, expected = publication.version, publication.tensors
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        one = (
            f"tensor {missing[0]} is missing, expected {expected[missing[0]]}"
            if missing
            else f"found tensor {unexpected[0]}, {found[unexpected[0]]}, expected none of that name"
        )
        raise WeightsRefused(
            f"{prefix}version {version}: {one} ({len(missing)} of {len(expected)} missing, {len(unexpected)} "
            "unexpected); a part of the weights is never loaded, the old ones stay in place"
        )
    wrong = [name for name in sorted(expected) if found[name] != expected[name]]
    if wrong:
        name = wrong[0]
        raise WeightsRefused(
            f"{prefix}version {version}: tensor {name}: found {found[name]}, expected {expected[name]} "
            f"({len(wrong)} of {len(expected)} tensors differ); damaged on the way, or the wrong ones; the "
            "old weights stay in place, publish again"
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
        packed[name] = PackedTensor(dtype_name(tensor), tuple(tensor.shape), flat)
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
