"""Routing replay (R3; post-training notes 2.3, "Keep Routing"): a trainer visits the sampler's experts.

The choices alone are taken over: gate weights come from the trainer's own scores at these experts, so the
routers keep their gradient. The reference chooses for itself, hash layers need nothing, prediction blocks
route freely, and so does every token without a record. A backward that runs a block again follows the same.

B rows, T tokens, L layers with a learned router, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from consilience.conf.errors import EngineError
from consilience.model.routing import Routing
from consilience.rollout.records import RolloutRecord
from consilience.rollout.token_routing import MISSING
from consilience.training.packing import PackedRows


class RoutingReplay:
    """The recorded routing of S samples, in the order in which they were packed.

    config: the trained model's. EngineError: a record of other layers or of another number of experts.
    """

    def __init__(self, records: Sequence[RolloutRecord], config: Any) -> None:
        self._layers = tuple(range(config.num_hash_layers, config.num_hidden_layers))
        first = config.num_hidden_layers
        self._ahead = range(first, first + config.num_nextn_predict_layers)
        self._topk = config.num_experts_per_tok
        lengths = [len(r.prompt_ids) + len(r.token_ids) for r in records]
        self._starts = np.cumsum([0, *lengths[:-1]])
        parts = [self._experts(r, n) for r, n in zip(records, lengths)]
        self._flat = (
            np.concatenate(parts) if parts else np.empty((0, len(self._layers), self._topk), np.int16)
        )

    def of(self, micro: PackedRows) -> Routing:
        """What a forward over some rows of the packing follows; it also notes where it would differ."""
        sample, place = micro.sample_index.reshape(-1), micro.position_ids.reshape(-1)
        is_token = sample >= 0
        shape = (sample.size, len(self._layers), self._topk)
        experts = np.full(shape, MISSING, np.int16)
        experts[is_token] = self._flat[self._starts[sample[is_token]] + place[is_token]]
        whole = torch.from_numpy(experts)
        free = torch.full((1, 1), MISSING, dtype=torch.int16).expand(sample.size, self._topk)
        given = {layer: whole[:, i] for i, layer in enumerate(self._layers)}
        return Routing.fixed(given | dict.fromkeys(self._ahead, free), compares=True)

    def sums(self, routing: Routing, micro: PackedRows) -> dict[str, float]:
        """What `mismatch_report` reads, after the forward that followed `routing`."""
        differing, compared = routing.num_differing()
        pairs = micro.num_tokens * len(self._layers)
        return {
            "routing_differing": float(differing),
            "routing_compared": float(compared),
            "routing_pairs": float(pairs),
        }

    def _experts(self, record: RolloutRecord, num_tokens: int) -> np.ndarray:
        routing = record.routing
        if routing is None:
            return np.full((num_tokens, len(self._layers), self._topk), MISSING, np.int16)
        if (routing.layers, routing.topk) != (self._layers, self._topk):
            raise EngineError(
                f"{record.uid}: routing of layers {routing.layers} with {routing.topk} experts each, the "
                f"trained model has {self._layers} with {self._topk}; sample with the model that is trained"
            )
        return routing.experts()
