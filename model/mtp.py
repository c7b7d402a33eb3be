"""Multi-token prediction: a block that predicts the token after the next (specification 10; V3 report 2.2).

R tokens (flattened), N streams, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.config import ModelConfig
from consilience.model.hyper_connections import HeadCollapse, settle
from consilience.model.layout import Layout
from consilience.model.linear import StoredLinear
from consilience.model.norm import RMSNorm
from consilience.model.state import LayerState
from consilience.model.transformer import Block


class MTPBlock(Block):
    """`mtp.i`: a whole block over the trunk's streams X_t joined with the embedding of token t + 1.

    Y_j = h_proj · rms_w(X_j, hnorm) + e_proj · rms_w(embed[t+1], enorm) for every stream j, then the
    block, a head collapse and a norm of its own. Embedding and prediction head are the trunk's.
    """

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype | None) -> None:
        super().__init__(config, layer, dtype)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj = StoredLinear(width, width, dtype)
        self.h_proj = StoredLinear(width, width, dtype)
        self.enorm = RMSNorm(width, eps, dtype)
        self.hnorm = RMSNorm(width, eps, dtype)
        self.hc_head = HeadCollapse(config)
        self.norm = RMSNorm(width, eps, dtype)

    def predict(
        self, streams: Tensor, embedding: Tensor, next_ids: Tensor, layout: Layout, state: LayerState | None
    ) -> tuple[Tensor, Tensor]:
        """streams [R, N, D] of token t, embedding [R, D] and id [R] of token t + 1.

        Returns the hidden state [R, D] from which the head predicts token t + 2, and the block's streams
        [R, N, D], from which a next draft step goes on.
        """
        own = self.h_proj(self.hnorm(streams)) + self.e_proj(self.enorm(embedding))[:, None]
        streams = settle(self(own, next_ids, layout, state))
        return self.norm(self.hc_head(streams)), streams
