"""What a rank holds in training by today's engines: arithmetic alone, for weights in fp32.

P parameters with MTP, R ranks. Muon and AdamW as V4 has them, or as the caller counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from consilience.conf.errors import ConfigError
from consilience.model.config import ModelConfig
from consilience.model.cost_training import Layout, device_bytes
from consilience.model.weights import main_weights, mtp_weights, num_parameters

FP32 = 4


@dataclass(frozen=True, slots=True)
class EngineLayout:
    """The settings `engine.*` that decide what a rank holds; micro_batch in tokens."""

    kind: str
    ranks: int
    context_ranks: int = 1
    zero_stage: int = 2
    is_state_divided: bool = False
    is_offloaded: bool = False
    recompute: str = "block"
    micro_batch: int = 16384


def rank_bytes(config: ModelConfig, layout: EngineLayout) -> dict[str, float]:
    """Bytes on a rank's device by kind at the peak, of a step of several micro-batches.

    What the allocator, libraries and the link hold comes on top. Divided parts are counted as even.
    """
    if layout.kind not in ("torch", "deepspeed", "fsdp"):
        raise ConfigError(f"kind is {layout.kind!r}; torch, deepspeed or fsdp")
    ranks, context = layout.ranks, layout.context_ranks
    tokens = -(-layout.micro_batch // context) * context
    given = Layout(
        ranks,
        context_ranks=context,
        is_state_divided=layout.kind != "torch" or layout.is_state_divided,
        recompute=layout.recompute,
        micro_batch=tokens,
    )
    found = device_bytes(config, given)
    del found["distillation"]
    main = main_weights(config)
    outer = [w for w in main if w.part in ("embedding", "head")]
    whole = FP32 * num_parameters([*main, *mtp_weights(config)])
    block = FP32 * (num_parameters(main) - num_parameters(outer)) / config.num_hidden_layers
    around = whole - block * config.num_hidden_layers  # embedding, head, MTP
    if layout.kind == "fsdp":
        # Gradients of a call stay whole until its last micro-batch; a block in use, the next on its way.
        found["weights"] = whole / ranks
        found["gathered"] = FP32 * num_parameters(outer) + 2 * block
    if layout.kind == "deepspeed":
        found["masters"] = whole / ranks
        if layout.zero_stage >= 2:
            found["gradients"] = whole / ranks
        if layout.zero_stage == 3:
            # Around the trunk all stays whole; a block's gradients are there before they are sent.
            found["weights"] = around + (whole - around) / ranks
            found["gathered"] = 2 * block
        if layout.is_offloaded:
            found["masters"] = found["optimiser state"] = 0.0
    return found
