"""Projections that the release stores in FP8: plain products, or FP8 ones where that is switched on."""

from __future__ import annotations

from torch import Tensor

from consilience.model.exact import Linear
from consilience.model.kernels.fp8_linear import fp8_linears
from consilience.model.quantization import OFF


class StoredLinear(Linear):
    """A projection without bias, in FP8 with `quantization.linears`."""

    quantization = OFF

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return project(x, self)[0] if self.quantization.linears else super().forward(x)


def project(x: Tensor, *linears: StoredLinear) -> tuple[Tensor, ...]:
    """What each projection makes of x [..., in]; in FP8 its rows are rounded once for all of them."""
    if linears[0].quantization.linears:
        return fp8_linears(x, *(linear.weight for linear in linears))
    return tuple(linear(x) for linear in linears)
