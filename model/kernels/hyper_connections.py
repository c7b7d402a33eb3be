"""mHC's reads and writes on a CPU in one pass over the tokens (hyper_connections.c).

The twin, and the definition, is model/hyper_connections.py in PyTorch: there a read is about 150 small
operations forward, most of them Sinkhorn's, and at the demo's size the number of operations is the time.

R tokens, N streams, D model width, K rows of `fn`: N (2 + N) of a connection, N of a collapse.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, fixed_parts, library
from consilience.model.recompute import named

MOST_STREAMS = 8
LANES = 16  # tokens side by side, as in the C file


def is_available(*tensors: Tensor) -> bool:
    """Whether these can go through the compiled kernel: fp32 on the CPU, and a compiler was found."""
    fits = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    return fits and not isinstance(library("hyper_connections"), str)


def _call(name: str, *arguments: Tensor | int | float | None) -> None:
    call("hyper_connections", name, *arguments)


def _read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, norm_eps: float
) -> tuple[Tensor, ...]:
    """layer input, post, comb, and what the backward needs: mixes, pre, inverse."""
    num_tokens, n, width = streams.shape
    is_whole = rounds > 0
    new, given = streams.new_empty, fn
    mixes = new(num_tokens, len(fn))
    if exact.is_on():
        mixes, given = exact.linear(streams.view(num_tokens, -1), fn).contiguous(), None
    layer_input, pre, inverse = new(num_tokens, width), new(num_tokens, n), new(num_tokens)
    post, comb = (new(num_tokens, n), new(num_tokens, n, n)) if is_whole else (new(0), new(0))
    _call(
        "hc_read_forward", num_tokens, n, width, int(is_whole), rounds, eps, norm_eps,
        streams, given, base, scale, mixes, layer_input, pre, post, comb, inverse,
    )  # fmt: skip
    return layer_input, post, comb, mixes, pre, inverse


class _Read(torch.autograd.Function):
    """streams [R, N, D] -> the same, layer input [R, D], post [R, N], comb [R, N, N] (empty for a collapse).

    Who reads the streams that come back hands their gradient here, where it is added in the same pass.
    """

    @staticmethod
    def forward(
        ctx,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        rounds: int,
        eps: float,
        norm_eps: float,
    ):
        found = named("layer_input", _read, streams, fn, base, scale, rounds, eps, norm_eps)
        ctx.save_for_backward(streams, fn, base, scale, *found[3:])
        ctx.settings = (rounds, eps)
        ctx.shapes = [x.shape for x in found[:3]]
        ctx.set_materialize_grads(False)
        return streams, *found[:3]

    @staticmethod
    def backward(ctx, passed: Tensor | None, *grads: Tensor | None):  # type: ignore[override]
        streams, fn, base, scale, mixes, pre, inverse = ctx.saved_tensors
        rounds, eps = ctx.settings
        num_tokens, n, width = streams.shape
        d_streams, d_mixes = torch.empty_like(streams), torch.empty_like(mixes)
        pairs = zip(grads, ctx.shapes, strict=True)
        given = [streams.new_zeros(shape) if g is None else g.contiguous() for g, shape in pairs]
        parts = fixed_parts(num_tokens)
        d_base, d_scale = (torch.zeros(parts, *t.shape, dtype=torch.float64) for t in (base, scale))
        work = streams.new_empty(parts * max(2 * rounds - 1, 0) * n * (n + 1) * LANES)
        _call(
            "hc_read_backward", num_tokens, n, width, int(rounds > 0), rounds, eps,
            streams, fn, base, scale, mixes, pre, inverse,
            *given, None if passed is None else passed.contiguous(),
            d_streams, d_mixes, d_base, d_scale, work,
        )  # fmt: skip
        flat = streams.view(num_tokens, -1)
        return (
            d_streams,
            torch.mm(d_mixes.t(), flat),
            d_base.sum(0).to(base.dtype),
            d_scale.sum(0).to(scale.dtype),
            None,
            None,
            None,
        )


def _write(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    written = torch.empty_like(streams)
    _call("hc_write_forward", *streams.shape, streams, output, post, comb, written)
    return written


class _Write(torch.autograd.Function):
    """X'_k = post_k · o + Σ_j comb[j, k] X_j."""

    @staticmethod
    def forward(ctx, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        written = named("streams", _write, streams, output, post, comb)
        ctx.save_for_backward(streams, output, post, comb)
        return written

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        num_tokens, n, width = saved[0].shape
        grads = [torch.empty_like(t) for t in saved]
        _call("hc_write_backward", num_tokens, n, width, *saved, grad.contiguous(), *grads)
        return tuple(grads)


def receive(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams [R, N, D] themselves, and what `read` finds in them; `HyperConnection.receive`."""
    arguments = (streams.contiguous(), fn, base, scale, rounds, eps, norm_eps)
    if torch.is_grad_enabled():
        return _Read.apply(*arguments)  # type: ignore[return-value]
    return arguments[0], *_read(*arguments)[:3]  # type: ignore[return-value]


def read(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rounds: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Layer input [R, D], post [R, N], comb [R, N, N] from streams [R, N, D]; `HyperConnection.read`."""
    return receive(streams, fn, base, scale, rounds, eps, norm_eps)[1:]


def collapse(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """[R, N, D] -> [R, D]; `HeadCollapse`."""
    return read(streams, fn, base, scale, rounds=0, eps=eps, norm_eps=norm_eps)[0]


def write(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """[R, N, D] from streams and the layer's output [R, D]; `HyperConnection.write`."""
    arguments = (streams.contiguous(), output.contiguous(), post, comb)
    return _Write.apply(*arguments) if torch.is_grad_enabled() else _write(*arguments)  # type: ignore[return-value]
