"""Exact mode: a token's numbers do not depend on the tokens it is computed with.

Sampling feeds one token a row, training whole packed rows. The mathematics is the same, yet matrix and
vector libraries choose their order of summation by shape, so log-probabilities of the two usually differ
in the last bits. In exact mode every product runs on tiles of a fixed number of rows (bf16 on a GPU: in a
kernel whose sums have one order however many the rows), norms and log-softmax on a GPU in kernels that give a
row to one program, attention walks its keys in logical order tile by tile, and elementwise functions see
whole tiles: the same operations on the same numbers, whoever computes them. What remains assumed of the
library is that a row's result does not depend on its place in a tile; the tests hold it to that. Same machine
and build; costs several times the fast mode.
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


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether the product whose sums have one order for any number of rows serves these."""
    if not (x.is_cuda and x.dtype == weight.dtype == torch.bfloat16):
        return False
    from consilience.model.kernels.choice import can_use_triton

    return can_use_triton(x, weight)


class _TiledLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _has_kernel(x, weight):
            from consilience.model.kernels import triton_invariant

            return triton_invariant.linear(x, weight, out_dtype)
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
        wide = grad.dtype
        return (grad @ weight.to(wide)).to(x.dtype), (grad.t() @ x.to(wide)).to(weight.dtype), None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out]."""
    if not is_on():
        return nn.functional.linear(x, weight)
    return _tiled(x, weight, x.dtype)


def logits(x: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """`linear` of half-precision numbers summed in fp32 and left there: [..., out] fp32.

    out [n, out] fp32: in exact mode the result of x [n, in] goes there, without a gradient.
    """
    has_kernel = is_on() and _has_kernel(x, weight)
    if out is not None and has_kernel:
        from consilience.model.kernels import triton_invariant

        return triton_invariant.linear(x, weight, out=out)
    found = _tiled(x, weight, torch.float32) if has_kernel else linear(x.float(), weight.float())
    return found if out is None else out.copy_(found)


def _tiled(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    rows = _TiledLinear.apply(x.reshape(-1, x.shape[-1]), weight, out_dtype)
    return rows.unflatten(0, x.shape[:-1])  # type: ignore[union-attr]


class Linear(nn.Linear):
    """A projection without bias, as all of V4's are."""

    def __init__(self, num_inputs: int, num_outputs: int, dtype: torch.dtype | None) -> None:
        super().__init__(num_inputs, num_outputs, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return linear(x, self.weight)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last axis of [n, V]; sampler and trainer read their log-probabilities here."""
    if is_on() and logits.is_cuda and logits.dtype == torch.float32:
        from consilience.model.kernels.choice import can_use_triton

        if can_use_triton(logits):
            return _RowLogSoftmax.apply(logits)  # type: ignore[return-value]
    missing = -logits.shape[-1] % (ALIGNMENT // logits.element_size()) if is_on() else 0
    # A GPU sums a row by vectors from where it is aligned on, so every row must begin alike.
    whole = nn.functional.pad(logits, (0, missing), value=float("-inf")) if missing else logits
    return by_tiles(_log_softmax, whole)[:, : logits.shape[-1]]


class _RowLogSoftmax(torch.autograd.Function):
    """One program a row: what `linear_logprob` finds of a target's log-probability, to the last bit."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        from consilience.model.kernels import triton_logprob_rows

        logits = logits.contiguous()
        found = triton_logprob_rows.log_softmax(logits.clone() if logits.data_ptr() % ALIGNMENT else logits)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (found,) = ctx.saved_tensors
        return grad - found.exp() * grad.sum(-1, keepdim=True)


def _log_softmax(logits: Tensor) -> Tensor:
    centred = logits - logits.amax(-1, keepdim=True)
    return centred - centred.exp().sum(-1, keepdim=True).log()
