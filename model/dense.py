"""A dense causal model of transformers, behind the face that trainers and publishers know of `Transformer`.

So that GRPO can be run with models that V4 is not: small ones on a CPU, or what vLLM's builds serve there.
Tensors keep the names of the checkpoint, which are those that vLLM reads. transformers is imported when a
model is built.

B rows, T tokens in a row, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.model.context_parallel import context_ranks
from consilience.model.quantization import Quantization

V4_TYPES = (None, "deepseek_v4")  # `model_type` of config.json
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
CHECKED_TOKENS = 7
FP32_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class DenseConfig:
    """config.json of a dense model, as it was read."""

    row: Mapping[str, Any]

    @property
    def vocab_size(self) -> int:
        return int(self.row["vocab_size"])

    def to_json_dict(self) -> dict[str, Any]:
        return dict(self.row)


def is_dense(row: Mapping[str, Any]) -> bool:
    """Whether a config.json is of another model than V4."""
    return row.get("model_type") not in V4_TYPES


class DenseModel(nn.Module):
    """Llama, Mistral, Qwen2, Qwen3 and whatever has their parts and their names.

    Uninitialised weights until a checkpoint is read into it. Tied weights are one tensor, as in the files.
    CheckpointError where a packed row cannot be computed as its samples one by one would be: other parts than
    `model` and `lm_head`, layers that see a window, experts.
    """

    def __init__(self, row: Mapping[str, Any], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        whole = build_causal(row, dtype)
        self.config = DenseConfig(dict(row))
        self._whole = (whole,)  # what `check` compares with; in a tuple, as its parts are registered below
        self.model = whole.model
        if not whole.config.tie_word_embeddings:
            self.lm_head = whole.lm_head
        self.eval()

    @property
    def head(self) -> Any:
        """Holds `weight` [V, D]."""
        return self.model.embed_tokens if "lm_head" not in self._modules else self.lm_head

    def quantize(self, quantization: Quantization) -> None:
        """ConfigError unless nothing is to be rounded: the quantisers are V4's."""
        if quantization != Quantization():
            raise ConfigError("engine.quantization rounds what V4 keeps in few bits; a dense model needs off")

    def hidden(
        self, token_ids: Tensor, segment_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Last hidden states behind the final norm [B, T, D] of packed rows, as `Transformer.hidden`."""
        num_tokens = token_ids.shape[1]
        place = torch.arange(num_tokens, device=token_ids.device)
        if segment_ids is None:
            segment_ids = torch.zeros_like(token_ids)
        if position_ids is None:
            position_ids = place.expand_as(token_ids)
        # Padding sees padding before it, so that no row of the softmax is empty.
        is_seen = (segment_ids[:, None, :] == segment_ids[:, :, None]) & (place <= place[:, None])
        dtype = self.head.weight.dtype
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=token_ids.device)
        mask = mask.masked_fill_(~is_seen, torch.finfo(dtype).min)[:, None]
        found = self.model(
            input_ids=token_ids, attention_mask=mask, position_ids=position_ids, use_cache=False
        )
        return found.last_hidden_state

    def streams(
        self,
        token_ids: Tensor,
        segment_ids: Tensor,
        position_ids: Tensor,
        *,
        trace: Any = None,
        routing: Any = None,
    ) -> tuple[Tensor, None]:
        """Hidden states [B·T, D], normed already; no layout. ConfigError if routing is to be followed, or
        rows to be cut for several ranks.

        Nothing is traced: there is no router, and one stream.
        """
        if context_ranks().size > 1:
            raise ConfigError("engine.context_ranks cuts V4's attention; for a dense model set it to 1")
        if routing is not None:
            raise ConfigError("grpo.replay_routing needs experts; for a dense model set it to false")
        return self.hidden(token_ids, segment_ids, position_ids).flatten(0, 1), None

    def hc_head(self, streams: Tensor) -> Tensor:
        """There is one stream."""
        return streams

    def norm(self, hidden: Tensor) -> Tensor:
        """`hidden` has been through it."""
        return hidden

    def mtp_hidden(self, *_: Any, **__: Any) -> list[Tensor]:
        """No prediction block."""
        return []

    def forward(self, token_ids: Tensor, segment_ids: Tensor | None = None, **places: Any) -> Tensor:
        """Logits [B, T, V], fp32 or wider; arguments as `hidden`."""
        hidden, weight = self.hidden(token_ids, segment_ids, **places), self.head.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return hidden.to(wide) @ weight.to(wide).t()

    @torch.no_grad()
    def check(self) -> None:
        """CheckpointError if the model's own logits are others than its head's products with what it sees."""
        ids = torch.arange(CHECKED_TOKENS, device=self.head.weight.device)[None] % self.config.vocab_size
        own, ours = self._whole[0](ids, use_cache=False).logits, self.forward(ids)
        bound = logits_bound(own.dtype, self.head.weight.shape[1]) * float(ours.abs().max())
        if not float((own.to(ours.dtype) - ours).abs().max()) <= bound:
            raise CheckpointError(
                f"{type(self._whole[0]).__name__} makes other logits than its head's products (a scale, a "
                "cap, a bias?), which losses would not see; train a model without"
            )


def logits_bound(dtype: torch.dtype, width: int) -> float:
    """By what share of the largest two ways to the same logits may differ.

    Both are rounded once to the weights' type, and sum `width` products in fp32 or wider, in another order.
    """
    return max(16 * torch.finfo(dtype).eps, 4 * width**0.5 * FP32_EPS)


def build_causal(row: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """transformers' causal model of a config.json with random weights. CheckpointError as `DenseModel`."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise CheckpointError(
            f"a model of type {row['model_type']} needs transformers; pip install transformers"
        ) from error

    try:
        config = AutoConfig.for_model(
            row["model_type"], **{k: v for k, v in row.items() if k != "model_type"}
        )
        whole = AutoModelForCausalLM.from_config(
            config, dtype=dtype or torch.float32, attn_implementation="eager"
        )
    except ValueError as error:
        raise CheckpointError(f"transformers builds no {row['model_type']}: {error}") from error
    names = {name for name, _ in whole.named_children()}
    windows = {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}
    has_window = getattr(config, "sliding_window", None) and not hasattr(config, "layer_types")
    has_experts = any(getattr(config, name, None) for name in EXPERT_COUNTS)
    if names != {"model", "lm_head"} or windows or has_window or has_experts:
        raise CheckpointError(
            f"{type(whole).__name__} has parts {sorted(names)}, layers {sorted(windows) or 'alike'}; trained "
            "are V4 and dense models of full attention with parts model and lm_head, as Qwen3 and Llama are"
        )
    return whole
