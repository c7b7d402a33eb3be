"""Experts that vLLM handed out, as a record's routing: its layers in order, the learned ones, gaps marked.

vLLM (0.32, `enable_return_routed_experts`) gives a finished request one array [n, M, K] of uint8 or uint16:
row t belongs to the pass that read token t, so n is the stream's length less one, the last token being never
fed; M are all hidden layers from 0 on, K is in no order. A layer that captured nothing keeps what its buffer
began with, K equal numbers. vLLM itself is not imported.

n tokens fed, M layers, L layers with a learned router, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilience.conf.errors import ConfigError, EngineError
from consilience.model.config import ModelConfig
from consilience.rollout.token_routing import MISSING, TokenRouting, choice_dtype
from consilience.rollout.vllm_settings import V4

CAPTURE = {"enable_return_routed_experts": True, "enable_prefix_caching": True}  # the one needs the other


@dataclass(frozen=True, slots=True)
class CapturedRouting:
    """Which of vLLM's M = num_layers layers are recorded; topk K, num_experts E."""

    num_layers: int
    layers: tuple[int, ...]
    topk: int
    num_experts: int

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> CapturedRouting:
        """Of a checkpoint's config.json. ConfigError for a model whose experts no trainer here replays."""
        if row["architectures"][0] != V4:
            raise ConfigError(
                f"grpo.replay_routing replays the experts of V4, and this is {row['architectures'][0]}; set "
                "grpo.replay_routing=false"
            )
        config = ModelConfig.from_json_dict(row)
        return cls(
            config.num_hidden_layers,
            tuple(range(config.num_hash_layers, config.num_hidden_layers)),
            config.num_experts_per_tok,
            config.n_routed_experts,
        )

    def record(self, uid: str, captured: np.ndarray | None, length: int, held: int = 0) -> TokenRouting:
        """Routing of a turn that ends a stream of `length` tokens, from captured [n, M, K] of all of it.

        held  tokens that the turns before it had: what these recorded stays, and only from the last one on,
              which this turn was the first to feed, are experts recorded
        Tokens and layers that vLLM has no experts of are marked as missing. EngineError where it gave none
        at all, or what cannot be this model's.
        """
        if captured is None:
            raise EngineError(
                f"vLLM returned no experts of request {uid}; set grpo.replay_routing=false, or take a "
                "version whose enable_return_routed_experts works"
            )
        if captured.ndim != 3 or captured.shape[1:] != (self.num_layers, self.topk):
            raise EngineError(
                f"vLLM returned experts {list(captured.shape)} of request {uid}, expected are "
                f"[tokens, {self.num_layers}, {self.topk}]"
            )
        first = max(held - 1, 0)
        found = np.full((length - 1 - first, len(self.layers), self.topk), MISSING, np.int16)
        given = captured[first : length - 1, list(self.layers)].astype(np.int64)
        if given.size and not 0 <= given.min() <= given.max() < self.num_experts:
            raise EngineError(
                f"vLLM returned expert {given.max()} of request {uid}, the model has {self.num_experts}"
            )
        in_order = np.sort(given, -1)
        is_choice = (in_order[..., 1:] != in_order[..., :-1]).all(-1, keepdims=True)
        found[: len(given)] = np.where(is_choice, given, MISSING)
        stored = np.uint8 if choice_dtype(self.num_experts, self.topk) == "u1" else np.int16
        return TokenRouting.of(self.layers, found.astype(stored))
