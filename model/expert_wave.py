"""What a rank computes of the tokens that came to its experts, in PyTorch; kernels/gpu_expert_wave.py is its
twin in bf16 on a GPU, with functions of the same names.

Nothing is kept for the backward, which runs the experts again.

T tokens of this rank, K experts a token, N = T·K pairs, D model width, I expert width, E experts; n rows that
came to e experts of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels import experts as by_pieces
from consilience.model.moe import routed
from consilience.model.row_sums import add_rows_, take_rows

Masters = tuple[Tensor, Tensor, Tensor]  # w1, w3 [e, I, D] and w2 [e, D, I], in the order w1, w2, w3


def sort(keys: Tensor, num_keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """keys [T, K] int64 -> order [N] of the pairs by key, stable; places [T, K] in it; pairs a key [E]."""
    flat = keys.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return order, places.view_as(keys), torch.bincount(flat, minlength=num_keys)


def spread(source: Tensor, order: Tensor, places: Tensor) -> Tensor:
    """source [T, D] -> [N, D]: every pair's row at its place."""
    return take_rows(source, order // places.shape[1])


def sums(rows: Tensor, places: Tensor, base: Tensor | None) -> Tensor:
    """rows [N, D] -> [T, D] fp32 or wider: each token's in the order of its choices, plus base [T, D]."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if by_pieces.is_available(rows):
        total = by_pieces.sums(rows, places)
    else:
        total = exact.by_tiles(lambda x: x.sum(1, dtype=wide), rows[places])
    return total if base is None else total + base


def gradient_sums(rows: Tensor, places: Tensor, experts: Tensor) -> Tensor:
    """d_rows [N, D] -> [T, D], added in the order in which one process adds them."""
    if by_pieces.is_available(rows):
        return by_pieces.sums(rows, places)
    order = experts.flatten().argsort(stable=True)
    total = rows.new_zeros(len(places), rows.shape[1])
    return add_rows_(total, order // places.shape[1], rows[places.flatten()[order]])


def forward(
    rows: Tensor, shares: Tensor, numbers: Tensor, masters: Masters, limit: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """rows [n, D], shares [n], numbers [n] of experts of `masters` -> [n, D], and what is to be kept."""
    return _run(rows, shares, numbers, masters, limit).to(rows.dtype), ()


class Backward:
    """The gradients of a wave: d_rows [n, D] and d_shares [n] at once, those of the experts when asked."""

    def __init__(
        self,
        d_out: Tensor,
        given: tuple[Tensor, Tensor, Tensor, Masters, float],
        _kept: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> None:
        rows, shares, numbers, masters, limit = given
        rows, shares = rows.detach().requires_grad_(), shares.detach().requires_grad_()
        own = [w.detach().requires_grad_(wants) for w, wants in zip(masters, wanted)]
        with torch.enable_grad():
            out = _run(rows, shares, numbers, (own[0], own[1], own[2]), limit)
        leaves = [rows, shares, *(w for w in own if w.requires_grad)]
        self.d_rows, self.d_shares, *found = torch.autograd.grad(out, leaves, d_out.to(out.dtype))
        self._of_masters = iter(found)

    def of_masters(self, wanted: Sequence[bool], _totals: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of w1, w2, w3 as far as they are wanted."""
        return [next(self._of_masters) if wants else None for wants in wanted]


def _run(rows: Tensor, shares: Tensor, numbers: Tensor, masters: Masters, limit: float) -> Tensor:
    return routed(rows, shares[:, None], numbers[:, None], masters, limit)[0]
