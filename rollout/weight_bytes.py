"""Weights as one run of bytes, and back: what a shared segment holds and what a broadcast sends.

Tensors stand in the publication's order, each at a multiple of 64 bytes. Both sides compute the places from
the publication, so no bytes but the tensors' own travel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import WeightsRefused
from consilience.rollout.publishing import Publication

ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element's size


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor's bytes lie: `first` is a multiple of `ALIGNMENT`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    num_bytes: int


def places(publication: Publication) -> tuple[list[Place], int]:
    """Every tensor's place, and the bytes of them all. WeightsRefused on a type torch does not have."""
    found: list[Place] = []
    at = 0
    for name, record in publication.tensors.items():
        dtype = getattr(torch, record.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise WeightsRefused(f"tensor {name}: {record.dtype} is no type of torch")
        num_bytes = math.prod(record.shape) * dtype.itemsize
        found.append(Place(name, dtype, record.shape, at, num_bytes))
        at += -(-num_bytes // ALIGNMENT) * ALIGNMENT
    return found, at


def flat_bytes(tensor: Tensor) -> Tensor:
    """[num_bytes] uint8 where the tensor lies, sharing memory if it is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensors_in(data: Tensor, those: list[Place], first: int = 0) -> dict[str, Tensor]:
    """Views of `data` [n] uint8 by name; byte `first` of the whole run lies at data[0]."""
    found = {}
    for place in those:
        own = data[place.first - first : place.first - first + place.num_bytes]
        found[place.name] = own.view(place.dtype).reshape(place.shape)
    return found


def check_fits(weights: Mapping[str, Tensor], those: list[Place]) -> None:
    """WeightsRefused, before any byte travels, at a tensor that has not its announced type and shape."""
    for place in those:
        tensor = weights.get(place.name)
        if tensor is None or tensor.dtype != place.dtype or tuple(tensor.shape) != place.shape:
            found = "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise WeightsRefused(
                f"tensor {place.name}: found {found}, announced {place.dtype} {list(place.shape)}; announce "
                "and publish the same weights"
            )


def buckets(those: list[Place], limit: int) -> Iterator[list[Place]]:
    """Neighbours together, up to `limit` bytes; a larger tensor is alone."""
    group: list[Place] = []
    for place in those:
        if group and place.first + place.num_bytes - group[0].first > limit:
            yield group
            group = []
        group.append(place)
    if group:
        yield group
