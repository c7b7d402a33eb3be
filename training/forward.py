"""From packed rows to the hidden states that a loss needs.

B rows, T tokens in a row, D model width, n loss positions (row by row, time ascending).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.training.packing import PackedRows


@dataclass(frozen=True)
class LossPositions:
    """What a token loss sees of one micro-batch.

    hidden [n, D]; target_ids [n] the token each position predicts; weight [n] fp32 loss weight;
    sample_index [n] sample of the whole packing; arrays name -> [n] fp32 per-target values.
    """

    hidden: Tensor
    target_ids: Tensor
    weight: Tensor
    sample_index: Tensor
    arrays: dict[str, Tensor]


def hidden_at_loss(model: Any, packed: PackedRows, trace: Any = None, routing: Any = None) -> LossPositions:
    """Run `model.hidden` over packed rows and keep the positions with a loss weight above 0."""
    device = next(model.parameters()).device
    rows = packed.to_torch(device)
    hidden = model.hidden(
        rows["token_ids"], rows["segment_ids"], rows["position_ids"], trace=trace, routing=routing
    )
    where = (rows["loss_mask"].flatten() > 0).nonzero()[:, 0]

    def at(value: Tensor) -> Tensor:
        return value.flatten()[where]

    return LossPositions(
        hidden=hidden.flatten(0, 1).index_select(0, where),
        target_ids=at(rows["target_ids"]),
        weight=at(rows["loss_mask"]),
        sample_index=at(rows["sample_index"]).long(),
        arrays={name: at(rows[name]) for name in packed.arrays},
    )


def sample_order(positions: LossPositions) -> list[int]:
    """Samples in the order their loss positions appear (each sample's positions are contiguous)."""
    return torch.unique_consecutive(positions.sample_index).tolist()
