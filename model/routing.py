"""Which experts the learned routers chose: taken down in one forward, prescribed in another.

Anticipatory routing (report 4.2.3; specification 12.3) trains on the choices of older weights. The
choices alone are prescribed; their weights come from the current scores. Hash layers are not touched.

R tokens (flattened, padding included), K experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from consilience.conf.errors import EngineError


@dataclass
class Routing:
    """Handed to a forward, which fills it in or, if `is_fixed`, follows it.

    experts   layer -> [R, K] int16 on the CPU, MTP layers numbered on after the trunk's; a token whose
              entries are -1 chooses for itself
    """

    experts: dict[int, Tensor] = field(default_factory=dict)
    is_fixed: bool = False

    @classmethod
    def fixed(cls, experts: Mapping[int, Tensor]) -> Routing:
        """A routing that the forward follows."""
        return cls(dict(experts), is_fixed=True)

    def take_down(self, layer: int, experts: Tensor) -> None:
        """Keep the [R, K] choices of a layer."""
        self.experts[layer] = experts.detach().to("cpu", torch.int16)

    def prescribed(self, layer: int, shape: tuple[int, int], device: torch.device) -> Tensor | None:
        """[R, K] int64 choices for a layer of `shape`; None while choices are being taken down.

        EngineError where the layer or the number of tokens is not that of the forward it was taken from.
        """
        if not self.is_fixed:
            return None
        experts = self.experts.get(layer)
        if experts is None or tuple(experts.shape) != shape:
            found = "no choices" if experts is None else f"choices {list(experts.shape)}"
            raise EngineError(
                f"routing: {found} for the learned router of layer {layer}, this forward needs "
                f"{list(shape)}; follow a routing with the model and the packed rows it was taken from"
            )
        return experts.to(device, torch.int64)
