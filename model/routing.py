"""Which experts the learned routers chose: taken down in one forward, prescribed in another.

Anticipatory routing (report 4.2.3; specification 12.3) trains on the choices of older weights, routing replay
(post-training notes 2.3, "Keep Routing") on those of the sampler. The choices alone are prescribed; their
weights come from the current scores. Hash layers are not touched.

R tokens (flattened, padding included), K experts a token, L layers with a learned router.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.conf.errors import EngineError

if TYPE_CHECKING:
    from consilience.model.context_parallel import Piece


@dataclass
class Routing:
    """Handed to a forward, which fills it in or, if `is_fixed`, follows it.

    Choices are those of whole rows, also where every rank's forward is a piece of them.

    experts   layer -> [R, K] int16 on the CPU, MTP layers numbered on after the trunk's; a token whose
              entries are -1 chooses for itself
    into      [at least R, L, K] where the choices go instead, beside the model: nothing waits for the device
    layers    the layers of `into`; choices of others are not kept
    compares  also note where free routing would have differed
    differs   layer -> 2 int64 numbers beside the model: tokens whose free choice is another set of experts
              than the prescribed one, and tokens with a prescription
    """

    experts: dict[int, Tensor] = field(default_factory=dict)
    is_fixed: bool = False
    into: Tensor | None = None
    layers: tuple[int, ...] = ()
    compares: bool = False
    differs: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def fixed(cls, experts: Mapping[int, Tensor], *, compares: bool = False) -> Routing:
        """A routing that the forward follows."""
        return cls(dict(experts), is_fixed=True, compares=compares)

    @classmethod
    def recorded(cls, into: Tensor, layers: Sequence[int]) -> Routing:
        """A routing whose choices go to into[:R, i] for layer layers[i], in the type of `into`."""
        return cls(into=into, layers=tuple(layers))

    def take_down(self, layer: int, experts: Tensor, piece: Piece | None = None) -> None:
        """Keep the [R, K] choices of a layer, those of the other ranks' pieces among them."""
        if piece is not None:
            experts = piece.gather_tokens(experts)
        if self.into is None:
            self.experts[layer] = experts.detach().to("cpu", torch.int16)
        elif layer in self.layers:
            self.into[: len(experts), self.layers.index(layer)].copy_(experts)

    def prescribed(
        self, layer: int, shape: tuple[int, int], device: torch.device, piece: Piece | None = None
    ) -> Tensor | None:
        """[R, K] int64 choices for a layer of `shape`; None while choices are being taken down.

        With a piece, R are its tokens. EngineError where the layer or the number of tokens is not that of the
        forward it was taken from.
        """
        if not self.is_fixed:
            return None
        experts = self.experts.get(layer)
        if piece is not None:
            shape = (piece.position.numel(), shape[1])
        if experts is None or tuple(experts.shape) != shape:
            found = "no choices" if experts is None else f"choices {list(experts.shape)}"
            raise EngineError(
                f"routing: {found} for the learned router of layer {layer}, this forward needs "
                f"{list(shape)}; follow a routing with the model and the packed rows it was taken from"
            )
        return (experts if piece is None else piece.cut_tokens(experts)).to(device, torch.int64)

    def compare(self, layer: int, fresh: Tensor, fixed: Tensor) -> None:
        """Note how many tokens of fresh [R, K] choose another set than fixed [R, K], of those with one.

        A layer that runs again in the backward notes the same again.
        """
        is_fixed = (fixed >= 0).all(1)
        is_other = (fresh.sort(1).values != fixed.sort(1).values).any(1) & is_fixed
        self.differs[layer] = torch.stack((is_other.sum(), is_fixed.sum()))

    def num_differing(self) -> tuple[int, int]:
        """(token, layer) pairs whose free choice differs, and those compared; waits for the device."""
        if not self.differs:
            return 0, 0
        differing, total = torch.stack(list(self.differs.values())).sum(0).tolist()
        return differing, total
