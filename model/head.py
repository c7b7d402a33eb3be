"""The prediction head: logits in fp32 whatever the weights are kept in (specification 11.1).

D model width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.exact import Linear
from consilience.model.kernels import decode_head


class Head(Linear):
    """A projection to logits that are not rounded to the type of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] in the type of the weights [V, D] -> logits [..., V]: fp32; fp64 for fp64.

        In exact mode bit for bit what `linear_logprob` computes from the same hidden states.
        """
        weight = self.weight
        if decode_head.is_available(x, weight):
            return decode_head.logits(x, weight)
        if weight.dtype.itemsize >= 4:
            return super().forward(x)
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        if x.is_cuda and not exact.is_on() and not wants_grad:
            # The products of half-precision numbers are summed in fp32 and stay there: no wide copy.
            logits = torch.mm(x.reshape(-1, x.shape[-1]), weight.t(), out_dtype=torch.float32)
            return logits.view(*x.shape[:-1], -1)
        return exact.logits(x, weight)
