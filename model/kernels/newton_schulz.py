"""The hybrid Newton–Schulz iteration of Muon (V4 report, Algorithm 1 and section 2.4).

It maps a matrix UΣVᵀ to (nearly) its orthogonal factor UVᵀ: eight steps of a fast quintic that throws every
singular value near 1, then two steps of one that has its fixed point there. A step is

    Y ← (aI + bA + cA²)Y,   A = YYᵀ

`newton_schulz_plainly` is the definition, in the type of its input; `newton_schulz` the one to run. On a GPU
fp32 and 16-bit matrices are iterated in bf16 with fp32 sums, in which the report found it stable, and A and
aI + bA + cA² come from `triton_symmetric.py`, which computes half of each.

FLOP of a step, n ≤ m: 4n²m + 2n³, of which symmetry leaves 3n²m + n³ (0.67 at n = m, 0.70 at 2n = m).

Shapes: K matrices, n rows, m columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.kernels.choice import can_use_triton

FAST, POLISH = (3.4445, -4.7750, 2.0315), (2.0, -1.5, 0.5)
COEFFICIENTS = (FAST,) * 8 + (POLISH,) * 2
FEWEST_ROWS = 128
"""Below it half a product is no less work than all of it: tiles have 128 rows."""
FEWEST_TILES = 528
"""Four tiles of the upper triangles for each SM of an H100: with fewer, whole products were faster
(`bench/newton_schulz_gpu.py`: 136, 129 and 288 lose 19, 23 and 3 %, 528 and more win 5 to 25 %)."""
SAFE_NORMS = (2.0**-40, 2.0**60)
"""Norms of fp32 matrices to which squares that underflow add nothing, and in which none overflows."""
MOST_ENTRIES = 2**29
"""Entries that go through at once: four buffers take up to 4 GiB, and few tiles would leave the chip idle."""


@torch.no_grad()
def newton_schulz(matrices: Tensor) -> Tensor:
    """Orthogonal factors of K matrices [K, n, m], same shape and dtype; a zero matrix stays zero."""
    short, long = sorted(matrices.shape[1:])
    is_aligned = short >= FEWEST_ROWS and short % 16 == 0 and long % 16 == 0
    if not (is_aligned and can_use_triton(matrices)):
        return newton_schulz_plainly(matrices)
    is_wide = matrices.shape[1] <= matrices.shape[2]
    wide = matrices if is_wide else matrices.mT
    found = torch.empty_like(wide, memory_format=torch.contiguous_format)
    tiles_a_side = -(-short // FEWEST_ROWS)
    num_tiles = len(wide) * tiles_a_side * (tiles_a_side + 1) // 2
    iterate = iterate_halves if num_tiles >= FEWEST_TILES else _iterate_wholes
    num_parts = min(len(wide), -(-wide.numel() // MOST_ENTRIES))
    for part, target in zip(wide.tensor_split(num_parts), found.tensor_split(num_parts)):
        target.copy_(iterate(part))
    return found if is_wide else found.mT


def _norms(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Frobenius norms [K, 1, 1] to divide by, in `dtype`; never 0.

    Squares of entries beyond 2^±63 leave fp32, and their sum is 0 or infinite: outside of `SAFE_NORMS` they
    are summed in fp64.
    """
    norm = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True, dtype=dtype)
    least, most = SAFE_NORMS
    is_safe = (norm >= least) & (norm <= most)
    exact = torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True, dtype=torch.float64)
    return torch.where(is_safe, norm, exact.to(dtype)).clamp_min(torch.finfo(dtype).tiny)


def _iterate_wholes(wide: Tensor) -> Tensor:
    return newton_schulz_plainly(wide.to(torch.bfloat16))


def iterate_halves(wide: Tensor) -> Tensor:
    """The iteration on [K, n, m], n ≤ m, in bf16 by Triton's symmetric products: [K, n, m] bf16."""
    from consilience.model.kernels.triton_symmetric import product

    k, n, m = wide.shape
    y = torch.empty(k, n, m, dtype=torch.bfloat16, device=wide.device)
    torch.div(wide, _norms(wide, torch.float32), out=y)
    next_y = torch.empty_like(y)
    gram, polynomial = (y.new_empty(k, n, n) for _ in range(2))
    for a, b, c in COEFFICIENTS:
        product(y, gram)
        product(gram, polynomial, gram, scale=c, addend_scale=b, diagonal=a)
        torch.bmm(polynomial, y, out=next_y)
        y, next_y = next_y, y
    return y


@torch.no_grad()
def newton_schulz_plainly(matrices: Tensor) -> Tensor:
    """The same from three plain products a step, in the type of `matrices`.

    The shorter side comes first. The products write into buffers used again by every step; a fresh result
    each time costs a third more.
    """
    k, n, m = matrices.shape
    wide = matrices if n <= m else matrices.mT
    y = torch.empty(wide.shape, dtype=wide.dtype, device=wide.device)
    torch.div(wide, _norms(wide, wide.dtype), out=y)
    next_y = torch.empty_like(y)
    gram, polynomial = (y.new_empty(k, min(n, m), min(n, m)) for _ in range(2))
    diagonal = polynomial.diagonal(dim1=1, dim2=2)
    for a, b, c in COEFFICIENTS:
        torch.bmm(y, y.mT, out=gram)
        torch.bmm(gram, gram, out=polynomial)
        polynomial.mul_(c).add_(gram, alpha=b)
        diagonal.add_(a)
        torch.bmm(polynomial, y, out=next_y)
        y, next_y = next_y, y
    return y if n <= m else y.mT
