"""mHC: manifold-constrained hyper-connections (report 2.2, equations 1-8; specification 3).

R tokens (flattened), N streams, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from consilience.model import exact
from consilience.model.config import ModelConfig
from consilience.model.kernels import gpu_hyper_connections as gpu
from consilience.model.kernels import hyper_connections as fused
from consilience.model.kernels.gpu_hyper_connections import Reader, Written
from consilience.model.recompute import named

BLOCK = (
    2048  # tokens a Sinkhorn block holds: its matrices stay in a core's cache (measured: 512 is 2x slower)
)


def _rounds(logits: Tensor, rounds: int, eps: float, trail: list[Tensor] | None) -> Tensor:
    """Normalise [N, N, r]; `trail` collects every matrix and, between them, every divisor."""
    x = torch.softmax(logits, dim=1).add_(eps)
    for step in range(2 * rounds - 1):
        total = x.sum(dim=step % 2, keepdim=True).add_(eps)
        if trail is None:
            x.div_(total)
        else:
            trail += (x, total)
            x = x / total
    return x


def _balance(logits: Tensor, rounds: int, eps: float) -> Tensor:
    out = torch.empty_like(logits)
    for target, block in zip(out.split(BLOCK, dim=2), logits.split(BLOCK, dim=2)):
        target.copy_(_rounds(block, rounds, eps, None))
    return out


class _Sinkhorn(torch.autograd.Function):
    """Alternate row and column normalisation; the backward recomputes block by block."""

    @staticmethod
    def forward(ctx, logits: Tensor, rounds: int, eps: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.rounds, ctx.eps = rounds, eps
        return named("layer_input", _balance, logits, rounds, eps)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        (logits,) = ctx.saved_tensors
        out = torch.empty_like(logits)
        for target, block, upstream in zip(
            out.split(BLOCK, dim=2), logits.split(BLOCK, dim=2), grad.split(BLOCK, dim=2)
        ):
            trail: list[Tensor] = []
            result = _rounds(block, ctx.rounds, ctx.eps, trail)
            d = upstream.clone(memory_format=torch.contiguous_format)
            for step in reversed(range(len(trail) // 2)):
                # y = x / (sum x + eps): dx = (dy - sum(dy * y)) / (sum x + eps)
                d.sub_((d * result).sum(dim=step % 2, keepdim=True)).div_(trail[2 * step + 1])
                result = trail[2 * step]
            soft = result - ctx.eps
            torch.mul(soft, d - (d * soft).sum(dim=1, keepdim=True), out=target)
        return out, None, None


def sinkhorn(logits: Tensor, rounds: int, eps: float) -> Tensor:
    """Doubly stochastic matrices from logits, ending on column sums.

    logits [N, N, R] (source stream, destination stream, token; tokens last, so that every step is
    one long vector operation) -> [N, N, R]. Softmax over destinations is the first of `rounds` row
    normalisations.
    """
    return _Sinkhorn.apply(logits, rounds, eps)  # type: ignore[return-value]


class _Read(torch.autograd.Function):
    """y_r = Σ_j weights[r, j] X[r, j]; explicit, as small batched GEMMs with other strides crawl on CPU."""

    @staticmethod
    def forward(ctx, streams: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(streams, weights)
        return named("layer_input", lambda: (weights[:, :, None] * streams).sum(1).to(dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, weights = ctx.saved_tensors
        grad = grad.to(weights.dtype)
        return weights[:, :, None] * grad[:, None], torch.bmm(streams, grad[:, :, None])[:, :, 0], None


class _Write(torch.autograd.Function):
    """X'_k = post_k · o + Σ_j comb[j, k] X_j."""

    @staticmethod
    def forward(
        ctx, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(streams, output, post, comb)

        def mixed() -> Tensor:
            wide = torch.bmm(comb.transpose(1, 2), streams)
            return wide.addcmul_(post[:, :, None], output[:, None]).to(dtype)

        return named("streams", mixed)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        streams, output, post, comb = ctx.saved_tensors
        grad = grad.to(comb.dtype).contiguous()
        d_streams = torch.bmm(comb, grad)
        d_output = (post[:, :, None] * grad).sum(1)
        d_post = torch.bmm(grad, output[:, :, None])[:, :, 0]
        d_comb = torch.bmm(streams, grad.transpose(1, 2))
        return d_streams, d_output, d_post, d_comb, None


def _read(streams: Tensor, weights: Tensor) -> Tensor:
    """streams [R, N, D], weights [N, R] -> [R, D] in the streams' dtype, summed in the weights'."""
    wide = streams.to(weights.dtype).contiguous()
    return _Read.apply(wide, weights.t().contiguous(), streams.dtype)  # type: ignore[return-value]


class HyperConnection(nn.Module):
    """Reads a layer input from the streams and writes its output back.

    fn [(2+N)N, ND], base [(2+N)N], scale [3], all fp32, rows = [pre N | post N | comb N·N].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.hc_mult
        self.num_streams = n
        self.rounds = config.hc_sinkhorn_iters
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * config.hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros((2 + n) * n, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float32))

    def read(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams [R, N, D] -> layer input [R, D], post [R, N], comb [R, N, N] (both fp32)."""
        if fused.is_available(streams, self.fn):
            return fused.receive(streams, *self._reader())[1:]
        if gpu.is_available(streams, None, self.fn):
            return gpu.read(streams, self._reader())
        return exact.by_tiles(self.read_plainly, streams)

    def read_plainly(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The definition of `read`, operation by operation."""
        n = self.num_streams
        flat = streams.flatten(1).to(self.fn.dtype)
        inverse_rms = torch.rsqrt(flat.square().mean(-1) + self.norm_eps)
        mixes = named("layer_input", exact.linear, flat, self.fn).t() * inverse_rms
        base = self.base[:, None]
        pre = torch.sigmoid(self.scale[0] * mixes[:n] + base[:n]) + self.eps
        post = 2 * torch.sigmoid(self.scale[1] * mixes[n : 2 * n] + base[n : 2 * n])
        logits = (self.scale[2] * mixes[2 * n :] + base[2 * n :]).view(n, n, -1)
        comb = sinkhorn(logits, self.rounds, self.eps)
        layer_input = _read(streams, pre)
        return layer_input, post.t().contiguous(), comb.permute(2, 0, 1).contiguous()

    def write(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        """X'_k = post_k · o + Σ_j comb[j, k] X_j: [R, N, D]. The sum runs over the first index."""
        if fused.is_available(streams, output, comb):
            return fused.write(streams, output, post, comb)
        if gpu.is_available(streams, output, post, comb):
            return gpu.write(streams, output, post, comb)
        wide = streams.to(comb.dtype).contiguous()
        output = output.to(comb.dtype).contiguous()
        return exact.by_tiles(lambda *rows: _Write.apply(*rows, streams.dtype), wide, output, post, comb)

    def pass_on(self, streams: Tensor, output: Tensor, post: Tensor, comb: Tensor) -> Tensor | Written:
        """`write`; on a GPU unwritten as yet, as the next `receive` writes and reads in one operation."""
        if gpu.is_available(streams, output, post, comb):
            return Written(streams, output, post, comb)
        return self.write(streams, output, post, comb)

    def receive(self, streams: Tensor | Written) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Streams [R, N, D] as the last sub-layer left them, and what `read` finds in them."""
        if isinstance(streams, Written):
            return gpu.write_read(streams, self._reader())
        if fused.is_available(streams, self.fn):
            return fused.receive(streams, *self._reader())
        return streams, *self.read(streams)

    def _reader(self) -> Reader:
        return Reader(self.fn, self.base, self.scale, self.rounds, self.eps, self.norm_eps)


def settle(streams: Tensor | Written) -> Tensor:
    """Streams [R, N, D], written if they were passed on unwritten."""
    return gpu.write(*streams) if isinstance(streams, Written) else streams


class HeadCollapse(nn.Module):
    """The last read: a = sigmoid(scale · m + base) + eps; h = Σ a_j X_j. No post, no comb."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n = config.hc_mult
        self.eps = config.hc_eps
        self.norm_eps = config.rms_norm_eps
        self.fn = nn.Parameter(torch.empty(n, n * config.hidden_size, dtype=torch.float32))
        self.base = nn.Parameter(torch.zeros(n, dtype=torch.float32))
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def forward(self, streams: Tensor) -> Tensor:
        """[R, N, D] -> [R, D]."""
        if fused.is_available(streams, self.fn):
            return fused.collapse(
                streams, self.fn, self.base, self.scale, eps=self.eps, norm_eps=self.norm_eps
            )
        if gpu.is_available(streams, None, self.fn):
            return gpu.read(streams, Reader(self.fn, self.base, self.scale, 0, self.eps, self.norm_eps))[0]
        return exact.by_tiles(self._collapse, streams)

    def _collapse(self, streams: Tensor) -> Tensor:
        flat = streams.flatten(1).to(self.fn.dtype)
        inverse_rms = torch.rsqrt(flat.square().mean(-1) + self.norm_eps)
        mixes = exact.linear(flat, self.fn).t() * inverse_rms
        weights = torch.sigmoid(self.scale * mixes + self.base[:, None]) + self.eps
        return _read(streams, weights)
