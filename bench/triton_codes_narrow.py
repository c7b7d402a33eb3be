"""A candidate for `triton_quantize.encode_rows(x, has_codes=False)`: turned codes from tiles of 128 rows ×
32 or 64 columns.

A turned code's scale belongs to 128 rows of one column, so only the other side of the tile is bound to
128. With 64 columns and 8 warps a thread holds 32 values instead of 64, and three programs (72 registers,
nothing spilled) fit beside each other where two did (128, spilling): one's loads run beside another's
exchange through shared memory and its stores. The same bits; reads keep whole lines of 128 bytes with 64
columns, half lines with 32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from consilience.model.kernels.triton_quantize import (
    NUMBERS,
    SIDE,
    Codes,
    _inverse,
    _magnitude,
    _scale_bits,
    _turned_codes,
    room_for_codes,
)
from consilience.model.number_formats import E4M3

SETTINGS = (
    {"WIDE": 64, "num_warps": 8, "maxnreg": 80},
    {"WIDE": 64, "num_warps": 4, "maxnreg": 128},
    {"WIDE": 32, "num_warps": 4, "maxnreg": 80},
)


@triton.jit(do_not_specialize=["num_rows"])  # as in `triton_quantize._codes`
def _columns(
    x, turned, turned_scales, num_rows, num_columns, padded_rows,
    FORMAT: tl.constexpr, SIDE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(1).to(tl.int64) * SIDE + tl.arange(0, SIDE)
    c = tl.program_id(0).to(tl.int64) * WIDE + tl.arange(0, WIDE)
    v = tl.load(x + r[:, None] * num_columns + c[None, :], mask=(r < num_rows)[:, None], other=0.0).to(
        tl.float32
    )
    amax = tl.max(_magnitude(v), 0)
    bits = _scale_bits(amax, FORMAT)
    scale, inverse = _inverse(bits, amax)
    tl.store(
        turned + c[:, None] * padded_rows + r[None, :],
        _turned_codes(v, bits[None, :], inverse[None, :], FORMAT),
    )
    tl.store(turned_scales + tl.program_id(1) * num_columns + c, scale)


def encode_columns(x: Tensor, setting: int = 0) -> Codes:
    """As `encode_rows(x, has_codes=False)`."""
    num_rows, width = x.shape
    x, made = x.contiguous(), room_for_codes(x, has_codes=False)
    if num_rows:
        chosen = SETTINGS[setting]
        _columns[width // chosen["WIDE"], triton.cdiv(num_rows, SIDE)](
            x, *made[2:], num_rows, width, triton.cdiv(num_rows, SIDE) * SIDE,
            FORMAT=NUMBERS[E4M3], SIDE=SIDE, **chosen,
        )  # fmt: skip
    return made
