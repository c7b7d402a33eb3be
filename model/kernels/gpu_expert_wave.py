"""What a rank computes of the tokens that came to its experts, on a GPU in bf16: the kernels of gpu_moe.py
with one expert a row. model/expert_wave.py is its twin, with functions of the same names.

Kept for the backward, beside the rows: gate and up projections [n, I], and places. The gradient of a row is
rounded to bf16 before it travels home; one process rounds the sum of a token's. The same bits in every run.

T tokens of this rank, K experts a token, N = T·K pairs, D model width, I expert width, E experts; n rows that
came to e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.model.kernels import gpu_moe
from consilience.model.kernels.choice import uses_triton

Masters = tuple[Tensor, Tensor, Tensor]


def is_available(hidden: Tensor, w1: Tensor, num_experts: int, topk: int) -> bool:
    """Whether experts w1 [E, I, D] can go through here; the same on all ranks, tokens or none."""
    is_bf16 = hidden.dtype == w1.dtype == torch.bfloat16
    is_aligned = all(size % 8 == 0 for size in w1.shape[1:])
    fits = num_experts <= gpu_moe.MOST_EXPERTS and topk <= gpu_moe.MOST_CHOSEN
    return is_bf16 and is_aligned and fits and uses_triton(hidden, w1)


def sort(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """keys [T, K] int64 -> order [N] of the pairs by key, stable; places [T, K] in it; pairs a key [E]."""
    from consilience.model.kernels.triton_route import sort_pairs

    order, places, ends = sort_pairs(keys.contiguous(), num_keys)
    return order, places, ends.diff(prepend=ends.new_zeros(1))


def spread(source: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """source [T, D] -> [N, D]: every pair's row at its place."""
    from consilience.model.kernels.triton_moe import expand

    return expand(source.contiguous(), places)


def sums(rows: Tensor, places: Tensor, base: Tensor | None) -> Tensor:
    """rows [N, D] -> [T, D] bf16: each token's in the order of its choices, plus base, rounded once."""
    from consilience.model.kernels.triton_moe import combine

    return combine(rows, places, base=None if base is None else base.contiguous())


def gradient_sums(rows: Tensor, places: Tensor, experts: Tensor) -> Tensor:
    """d_rows [N, D] -> [T, D]."""
    return sums(rows, places, None)


def forward(
    rows: Tensor, shares: Tensor, numbers: Tensor, masters: Masters, limit: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """rows [n, D], shares [n], numbers [n] of experts of `masters` -> [n, D], and what is to be kept."""
    from consilience.model.kernels.triton_moe import combine, expand, swiglu_forward
    from consilience.model.kernels.triton_route import sort_pairs

    w1, w2, w3 = masters
    order, inverse, ends = sort_pairs(numbers[:, None].contiguous(), len(w1))
    if not len(rows):
        none = rows.new_empty(0, w1.shape[1])
        return torch.empty_like(rows), (order, inverse, ends, none, torch.empty_like(none))
    own = expand(rows, inverse)
    gate, up = gpu_moe.forward_mm(own, w1, ends), gpu_moe.forward_mm(own, w3, ends)
    del own
    down = gpu_moe.forward_mm(swiglu_forward(gate, up, limit, shares, order), w2, ends)
    return combine(down, inverse), (order, inverse, ends, gate, up)


class Backward:
    """The gradients of a wave: d_rows [n, D] and d_shares [n] at once, those of the experts when asked, so
    that the first can travel meanwhile."""

    def __init__(
        self,
        d_out: Tensor,
        given: tuple[Tensor, Tensor, Tensor, Masters, float],
        kept: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> None:
        from consilience.model.kernels.triton_moe import combine, expand, swiglu_backward

        self._rows, shares, _, self._masters, limit = given
        w1, w2, w3 = self._masters
        order, self._inverse, self._ends, gate, up = kept
        self._kept: tuple[Tensor, ...] = ()
        self.d_rows, self.d_shares = torch.empty_like(d_out), torch.empty_like(shares)
        if not len(d_out):
            return
        d_down = expand(d_out, self._inverse)
        d_active = gpu_moe.backward_mm(d_down, w2, self._ends)
        d_gate, d_up, active, d_shares = swiglu_backward(d_active, gate, up, limit, shares, order)
        assert active is not None and d_shares is not None
        second = gpu_moe.backward_mm(d_up, w3, self._ends)
        self.d_rows = combine(gpu_moe.backward_mm(d_gate, w1, self._ends), self._inverse, second=second)
        self.d_shares = d_shares
        self._kept = (d_gate, d_up, d_down, active)

    def of_masters(self, wanted: Sequence[bool], totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of w1, w2, w3 as far as they are wanted; None also where one went into its total."""
        if not self._kept:
            zeros = zip(self._masters, wanted, totals)
            return [torch.zeros_like(w) if wants and t is None else None for w, wants, t in zeros]
        from consilience.model.kernels.triton_moe import expand

        d_gate, d_up, d_down, active = self._kept
        rows = expand(self._rows, self._inverse)
        pairs = ((d_gate, rows), (d_down, active), (d_up, rows))
        return [
            gpu_moe.weight_gradient(d_out, x, self._ends, w, total) if wants else None
            for (d_out, x), w, wants, total in zip(pairs, self._masters, wanted, totals)
        ]
