"""Exact mode: a token's numbers do not depend on the tokens it is computed with.

Sampling feeds one token a row, training whole packed rows. The mathematics is the same, yet matrix and
vector libraries choose their order of summation by shape, so log-probabilities of the two usually differ
in the last bits. In exact mode every product runs on tiles of a fixed number of rows (bf16 on a GPU: in a
kernel whose sums have one order however many the rows), attention walks its
keys in logical order tile by tile, and elementwise functions see whole tiles: the same operations on the same
numbers, whoever computes them. What remains assumed of the library is that a row's result does not depend
on its place in a tile; the tests hold it to that. Same machine and build; costs several times the fast mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

TILE, GPU_TILE = 32, 256  # rows of every product; also a multiple of every vector width
KEY_TILE = 64  # keys that attention takes at once
ALIGNMENT = 64  # bytes

_is_on: ContextVar[bool] = ContextVar("exact_mode", default=False)


def is_on() -> bool:
    return _is_on.get()


@contextmanager
def exact_mode(on: bool = True) -> Iterator[None]:
    """Within it, what this package computes is exact in the sense above (`on` False: as outside)."""
    token = _is_on.set(on)
    try:
        yield
    finally:
        _is_on.reset(token)


def tile_of(x: Tensor) -> int:
    """Rows of a tile where x lies."""
    return GPU_TILE if x.is_cuda else TILE


def padded(x: Tensor) -> Tensor:
    """x [n, …] with rows of zeros up to whole tiles."""
    missing = -x.shape[0] % tile_of(x)
    return torch.cat((x, x.new_zeros(missing, *x.shape[1:]))) if missing else x


def by_tiles(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """A function of rows, on whole tiles in exact mode: [n, …] each -> [n, …], or a tuple of such.

    A GPU picks its kernels by the whole shape, so there every tile is computed by itself; on a CPU it is
    enough that no vector instruction meets the end of the data in the middle of a tile.
    """
    if not is_on():
        return function(*tensors)
    size = tensors[0].shape[0]
    whole = [padded(t) for t in tensors]
    if not whole[0].is_cuda:
        return _rows(function(*whole), size)
    parts = [function(*tile) for tile in zip(*(t.split(GPU_TILE) for t in whole))]
    if isinstance(parts[0], tuple):
        return _rows(tuple(torch.cat(each) for each in zip(*parts)), size)
    return torch.cat(parts)[:size]


def _rows(found: Any, size: int) -> Any:
    return tuple(x[:size] for x in found) if isinstance(found, tuple) else found[:size]


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and x.dtype == weight.dtype == torch.bfloat16:
            from consilience.model.kernels.choice import can_use_triton

            if can_use_triton(x, weight):
                from consilience.model.kernels import triton_invariant

                return triton_invariant.linear(x, weight)
        rows = padded(x).contiguous()
        if rows.data_ptr() % ALIGNMENT:
            rows = rows.clone()  # libraries choose other kernels for data that is not aligned
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        for tile, target in zip(rows.split(tile_of(x)), out.split(tile_of(x))):
            torch.mm(tile, weight.t(), out=target)
        return out[: x.shape[0]]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    if not is_on():
        return nn.functional.linear(x, weight)
    return _TiledLinear.apply(x.reshape(-1, x.shape[-1]), weight).unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


class Linear(nn.Linear):
    """A projection without bias, as all of V4's are."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype | None) -> None:
        super().__init__(num_inputs, num_outputs, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis of [n, V]; sampler and trainer read their log-probabilities here."""
    missing = -logits.shape[-1] % (ALIGNMENT // logits.element_size()) if is_on() else 0
    # A GPU sums a row by vectors from where it is aligned on, so every row must begin alike.
    whole = nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
    return by_tiles(_log_softmax, whole)[:, : logits.shape[-1]]


def _log_softmax(logits: Tensor) -> Tensor:
    centred = logits - logits.amax(-1, keepdim=True)
    return centred - centred.exp().sum(-1, keepdim=True).log()
