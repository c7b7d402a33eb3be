"""The matrix products of a prediction head: logits, and their gradient back to hidden states and head.

Half-precision operands are summed in fp32 and logits stay fp32: the KL of two close models is a difference
of nearly equal numbers, and logits cut to bf16 leave 4 to 23 % of error in its gradient (kernel notes 0.4).

Shapes: c tokens of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 2048
"""At 2,048 tokens reading the heads and the fp32 head gradient is a tenth of the products' own time."""

GRADIENT_TOKENS = 4096
"""On a GPU gradients of so many tokens wait for one product into the head gradient: it rewrites all of it."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 if any input is fp64, else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def default_chunk(hidden: Tensor) -> int:
    """Tokens of a chunk where the caller does not say."""
    return GPU_CHUNK_TOKENS if hidden.is_cuda else CPU_CHUNK_TOKENS


def padded_rows(n: int, chunk_tokens: int) -> int:
    """Rows of each chunk of n tokens on a GPU: as few and as equal chunks as chunk_tokens allows, in 128s."""
    num_chunks = -(-n // chunk_tokens)
    each = -(-n // max(num_chunks, 1))
    return min(chunk_tokens, -(-each // 128) * 128)


def filled(x: Tensor, height: int, value: float = 0.0) -> Tensor:
    """x [m, …] with rows of `value` appended up to `height`."""
    if x.shape[0] == height:
        return x
    return torch.cat([x, x.new_full((height - x.shape[0], *x.shape[1:]), value)])


def project(hidden: Tensor, head: Tensor, out: Tensor) -> Tensor:
    """`out` [c, V] = hidden [c, D] · head [V, D]ᵀ, fp32 or fp64 as `out` says.

    Operands of 16 bits on a GPU are multiplied as they are and summed in the type of `out`.
    """
    kind = torch.promote_types(hidden.dtype, head.dtype)
    if kind.itemsize < 4 and hidden.is_cuda:
        return torch.mm(hidden.to(kind), head.to(kind).t(), out_dtype=out.dtype, out=out)
    return torch.mm(hidden.to(out.dtype), head.to(out.dtype).t(), out=out)


def hidden_gradient(g: Tensor, head: Tensor, dtype: torch.dtype) -> Tensor:
    """[c, D] = g [c, V] · head [V, D] in `dtype`."""
    if g.dtype != dtype:
        return torch.mm(g, head, out_dtype=dtype)
    return torch.mm(g, head)


class HeadGradient:
    """dW [V, D] as a sum of products g [c, V]ᵀ · hidden [c, D], fp32 (fp64 for fp64), in the order of `add`.

    total   tensor to add to in place, as an optimiser's main gradient; None: one is made at the first product
    """

    def __init__(self, head: Tensor, total: Tensor | None = None):
        self.head, self.total = head, total

    def add(self, g: Tensor, hidden: Tensor, *, is_only: bool = False) -> None:
        """One product more. `is_only`: no other came or comes, so the sum may be rounded at once."""
        wide = compute_dtype(g)
        if g.dtype == wide:
            if self.total is None:
                self.total = torch.mm(g.t(), hidden.to(wide))
            else:
                self.total.addmm_(g.t(), hidden.to(wide))
        elif self.total is not None:
            torch.addmm(self.total, g.t(), hidden, out_dtype=wide, out=self.total)
        elif is_only and g.dtype == self.head.dtype:
            self.total = torch.mm(g.t(), hidden)
        else:
            self.total = torch.mm(g.t(), hidden, out_dtype=wide)

    def result(self) -> Tensor:
        """The sum [V, D], zeros where nothing was added."""
        if self.total is None:
            self.total = torch.zeros_like(self.head, dtype=compute_dtype(self.head))
        return self.total
