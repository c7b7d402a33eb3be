"""mHC's reads and writes on a GPU; a write followed by the next read is one operation.

The twin, and the definition, is model/hyper_connections.py: `HyperConnection.read_plainly` and `write`.
What the operations compute does not depend on which of them are fused: new streams are rounded to their
type before they are read. Coefficients are fp32 throughout, as DeepSeek's are; streams and layer inputs are
fp32 sums, rounded once.

R tokens, N streams, D model width, K rows of `fn`: N (2 + N) of a connection, N of a collapse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from consilience.model.kernels.choice import uses_triton
from consilience.model.recompute import named

STREAMS = (2, 4)  # numbers of streams whose coefficients fit in registers
TYPES = (torch.bfloat16, torch.float32)


class Written(NamedTuple):
    """A write that is still to be done: what `HyperConnection.write` takes."""

    streams: Tensor
    output: Tensor
    post: Tensor
    comb: Tensor


class Reader(NamedTuple):
    """What a connection or, with rounds = 0, a collapse reads by: fn [K, N D], base [K], scale, all fp32."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    rounds: int
    eps: float
    norm_eps: float


def is_available(streams: Tensor, output: Tensor | None, *coefficients: Tensor) -> bool:
    """Whether the kernels serve these: on a capable GPU, streams [R, N, D] and output of one type of TYPES,
    N in STREAMS, coefficients fp32."""
    return uses_triton(streams, output, *coefficients) and _fits(streams, output, *coefficients)


def _fits(streams: Tensor, output: Tensor | None, *coefficients: Tensor) -> bool:
    return (
        streams.shape[0] > 0
        and streams.shape[1] in STREAMS
        and streams.dtype in TYPES
        and (output is None or output.dtype == streams.dtype)
        and all(t.dtype == torch.float32 for t in coefficients)
    )


def _forward(written: Written, reader: Reader | None) -> tuple[Tensor, ...]:
    """Of a write new streams; of a read layer input, post, comb, then pre, mixes and inverse norms."""
    from consilience.model.kernels import triton_hyper_connections as kernels

    fn = None if reader is None else reader.fn
    streams, partial, squares = kernels.write_project(*written, fn)
    made = () if written.output is None else (streams,)
    if reader is None:
        return made
    assert partial is not None and squares is not None  # of a read they are made
    pre, post, comb, mixes, inverse = kernels.coefficients(partial, squares, streams.shape[2], *reader[1:])
    return *made, kernels.apply(streams, pre), post, comb, pre, mixes, inverse


class _Connection(torch.autograd.Function):
    """A write, a read, or a write and a read of what was written.

    streams [R, N, D], output [R, D], post [R, N], comb [R, N, N] (these three None: a read only), then what a
    Reader holds (None each: a write only) -> new streams [R, N, D] if written; of a read layer input [R, D],
    post [R, N], comb [R, N, N].
    """

    @staticmethod
    def forward(ctx, *arguments):
        written = Written(*arguments[:4])
        reader = None if arguments[4] is None else Reader(*arguments[4:])
        name = "layer_input" if written.output is None else "streams"
        found = named(name, _forward, written, reader)
        made = found if isinstance(found, tuple) else (found,)
        num_writes = int(written.output is not None)
        # A write alone does not need its own result again.
        num_kept = 0 if reader is None else num_writes
        ctx.save_for_backward(*arguments[:7], *made[:num_kept], *made[num_writes + 3 :])
        ctx.settings = arguments[7:]
        return made[: num_writes + 3]

    @staticmethod
    def backward(ctx, *gradients):  # type: ignore[override]
        from consilience.model.kernels import triton_hyper_connections_backward as backward
        from consilience.model.kernels.triton_hyper_connections_logits import d_logits
        from consilience.model.kernels.triton_hyper_connections_parameters import Read, d_parameters

        streams, output, post, comb, fn, base, scale, *made = ctx.saved_tensors
        gradients = [g.contiguous() for g in gradients]
        write = read = None
        of_parameters = (None,) * 3
        new_streams = streams
        if output is not None:
            write = (output, post, comb, gradients.pop(0))
        if fn is not None:
            if output is not None:
                new_streams = made.pop(0)
            pre, mixes, inverse = made
            rounds, eps, _ = ctx.settings
            d_input, d_post, d_comb = gradients
            found = d_logits(new_streams, d_input, mixes, base, scale, d_post, d_comb, rounds, eps)
            read = Read(d_input, pre, fn, found, mixes, inverse, scale)
            of_parameters = d_parameters(new_streams, read)
        return *backward.d_streams(streams, write, read), *of_parameters, None, None, None


def write(streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams [R, N, D]; `HyperConnection.write`."""
    return _run(Written(streams, output, post, comb), None)[0]


def read(streams: Tensor, reader: Reader) -> tuple[Tensor, Tensor, Tensor]:
    """Layer input [R, D], post [R, N], comb [R, N, N] (these two empty if rounds is 0)."""
    return _run(Written(streams, None, None, None), reader)  # type: ignore[arg-type, return-value]


def write_read(written: Written, reader: Reader) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """New streams [R, N, D], and what `read` finds in them."""
    return _run(written, reader)  # type: ignore[return-value]


def _run(written: Written, reader: Reader | None) -> tuple[Tensor, ...]:
    whole = (None if t is None else t.contiguous() for t in written)
    return _Connection.apply(*whole, *(reader or (None,) * 6))  # type: ignore[return-value]
