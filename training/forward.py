"""From packed rows to the hidden states that a loss needs.

B rows, T tokens in a row, D model width, n loss positions (row by row, time ascending).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from consilience.model.context_parallel import own_tokens
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.training.packing import PackedRows


@dataclass(frozen=True)
class BlockPositions:
    """What one prediction block's loss sees: hidden [n, D], target_ids [n], weight [n] fp32."""

    hidden: Tensor
    target_ids: Tensor
    weight: Tensor


@dataclass(frozen=True)
class LossPositions:
    """What a token loss sees of one micro-batch.

    hidden [n, D]; target_ids [n] the token each position predicts; weight [n] fp32 loss weight;
    sample_index [n] sample of the whole packing; arrays name -> [n] fp32 per-target values;
    ahead  the same of each prediction block, where they were asked for and the model has any.
    """

    hidden: Tensor
    target_ids: Tensor
    weight: Tensor
    sample_index: Tensor
    arrays: dict[str, Tensor]
    ahead: tuple[BlockPositions, ...] = ()


def hidden_at_loss(
    model: Any,
    packed: PackedRows,
    trace: Any = None,
    routing: Any = None,
    *,
    wants_mtp: bool = False,
    is_detached: bool = False,
) -> LossPositions:
    """Run the model over packed rows and keep the positions with a loss weight above 0.

    wants_mtp    run the prediction blocks too, on the trunk's streams of this forward
    is_detached  gradients of what they find stop before the trunk and the embedding

    Inside of `context_parallel` the positions are those of this rank's piece of the rows.
    """
    device = next(model.parameters()).device
    rows = packed.to_torch(device)
    streams, layout = model.streams(
        rows["token_ids"], rows["segment_ids"], rows["position_ids"], trace=trace, routing=routing
    )
    here = own_tokens(packed.token_ids.shape[1])
    where = (rows["loss_mask"][:, here].flatten() > 0).nonzero()[:, 0]
    ahead = ()
    if wants_mtp:
        found = model.mtp_hidden(streams, rows["target_ids"], layout, is_detached=is_detached)
        ahead = tuple(_ahead(rows, hidden, depth, here) for depth, hidden in enumerate(found, 1))

    def at(value: Tensor) -> Tensor:
        return value[:, here].flatten()[where]

    return LossPositions(
        hidden=model.norm(model.hc_head(streams)).index_select(0, where),
        target_ids=at(rows["target_ids"]),
        weight=at(rows["loss_mask"]),
        sample_index=at(rows["sample_index"]).long(),
        arrays={name: at(rows[name]) for name in packed.arrays},
        ahead=ahead,
    )


def own_piece(packed: PackedRows) -> PackedRows:
    """What this rank has of rows: the [B, T] arrays cut to [B, n] tokens, as `hidden_at_loss` sees them.

    Sample numbers, positions and the inverse map stay those of the whole rows, which outside of
    `context_parallel` are returned. Models take whole rows, not pieces.
    """
    here = own_tokens(packed.token_ids.shape[1])
    names = ("token_ids", "segment_ids", "position_ids", "target_ids", "loss_mask", "sample_index")
    cut = {name: getattr(packed, name)[:, here] for name in names}
    return replace(packed, **cut, arrays={name: value[:, here] for name, value in packed.arrays.items()})


def _ahead(rows: dict[str, Tensor], hidden: Tensor, depth: int, here: slice) -> BlockPositions:
    """Where block `depth` (from 1) has a loss: `depth` places before the trunk's, in the same sample.

    hidden [B, n, D] of the block, over the tokens `here` of the rows. Position t predicts what the trunk
    predicts at t + depth.
    """
    segment, target, weight = (
        rows[name].roll(-depth, 1) for name in ("segment_ids", "target_ids", "loss_mask")
    )
    is_followed = segment == rows["segment_ids"]
    is_followed[:, -depth:] = False
    row, token = ((weight > 0) & is_followed)[:, here].nonzero(as_tuple=True)
    return BlockPositions(hidden[row, token], target[:, here][row, token], weight[:, here][row, token])


def mtp_loss(at: LossPositions, head: Tensor, temperature: float = 1.0) -> Tensor:
    """Sum form of the prediction blocks' loss: weighted −log p of their targets, mean over the blocks.

    Its denominator is that of the trunk's own loss, as in V3's report, equations 24 and 25. head [V, D],
    detached where only the blocks shall learn. 0 without blocks.
    """
    losses = [
        -(linear_logprob(b.hidden, head, b.target_ids, temperature=temperature).logprob * b.weight).sum()
        for b in at.ahead
    ]
    return sum(losses, torch.zeros((), device=head.device)) / max(len(losses), 1)


def sample_order(positions: LossPositions) -> list[int]:
    """Samples in the order their loss positions appear (each sample's positions are contiguous)."""
    return torch.unique_consecutive(positions.sample_index).tolist()
