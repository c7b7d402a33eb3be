"""SwiGLU with V4's clamp in one pass on a CPU (gated.c); the twin is `gated` in model/moe.py."""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels.compiled import call, library


def is_available(gate: Tensor) -> bool:
    """Whether it can go through the compiled kernel: fp32 on the CPU, not in exact mode, a compiler found."""
    fits = gate.device.type == "cpu" and gate.dtype == torch.float32 and not exact.is_on()
    return fits and not isinstance(library("gated"), str)


class FusedGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        y = torch.empty_like(gate)
        call("gated", "gated_forward", gate.numel(), limit, gate, up, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        call("gated", "gated_backward", gate.numel(), ctx.limit, gate, up, grad.contiguous(), d_gate, d_up)
        return d_gate, d_up, None
