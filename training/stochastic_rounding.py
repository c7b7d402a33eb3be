"""Rounding to bf16 up or down by chance, so that the mean of many roundings is the number itself.

A number between two neighbours of bf16 goes to the farther from zero with the probability of its distance
from the nearer. Gradients of many ranks summed after such a rounding have errors that cancel, where rounding
to nearest loses whatever lies below half a step every time. The chance is a function of a key and of the
number's position, so that a run repeats, on any device and however numbers are put into buffers.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def rounding_key(seed: int, step: int, rank: int, name: str) -> int:
    """A 64-bit key, signed, for one tensor of one rank in one step."""
    text = f"{seed}/{step}/{rank}/{name}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


@torch.no_grad()
def round_to_bf16(values: Tensor, key: int, offset: int = 0) -> Tensor:
    """bf16 of the same shape, each an upper or lower neighbour of its fp32 value; exact values stay.

    offset  position of the first value in its tensor; positions count on from it, row by row.
    Values beyond the largest bf16 become infinite, non-finite values stay what they are.
    """
    position = torch.arange(offset, offset + values.numel(), device=values.device)
    chance = _mixed(position, key) & 0xFFFF
    bits = values.float().contiguous().view(torch.int32).view(-1)
    rounded = ((bits + chance.to(torch.int32)) & -0x10000).view(torch.float32).view(values.shape)
    return torch.where(torch.isfinite(values), rounded, values.float()).to(torch.bfloat16)


def _mixed(position: Tensor, key: int) -> Tensor:
    """splitmix64 of key + position, [n] int64; products wrap."""
    z = position * -0x61C8864680B583EB + key
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return z ^ ((z >> 31) & 0x1FFFFFFFF)
