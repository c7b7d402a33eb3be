"""What a training step over many GPUs holds on each, and how fast it can be at best: arithmetic alone.

Tensors are those of `weights.py`, with MTP. Routed experts may lie over expert ranks; everything else is
the dense part, whole on each GPU or cut over all (FSDP2). Optimiser state and fp32 masters are cut evenly;
owners of whole matrices are uneven by what docs/scale.md lists (padding).

L layers, N streams, D model width, K experts a token, V vocabulary, G GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from consilience.conf.errors import ConfigError
from consilience.model.config import ModelConfig
from consilience.model.cost import forward_work, training_flops
from consilience.model.weights import Weight, main_weights, mtp_weights, num_parameters, training_bytes


@dataclass(frozen=True, slots=True)
class Types:
    """Bytes of a number: weights and gradients as the passes use them, fp32 masters beside them (0: none)."""

    weight: int
    gradient: int
    master: int


TYPES: Mapping[str, Types] = MappingProxyType(
    {"fp32": Types(4, 4, 0), "bf16, fp32 gradients": Types(2, 4, 4), "bf16": Types(2, 2, 4)}
)
"""Name -> how weights, gradients and masters are held. Optimiser state is fp32 in all of them."""

STREAMS = MappingProxyType({"block": (1.0, 16.0), "none": (15.0, 0.0)})
"""`engine.recompute` -> sets of streams [tokens, N, D], in the weights' type: for each layer, and once.

block: a layer's input, and what is there while one block runs again; none: all that a backward asks for.
Both cover what four layers of Flash's widths took on an H100 at 4,096 and 32,768 tokens
(docs/kernels.md); at 4,096 a little over half of it was measured.
"""


@dataclass(frozen=True, slots=True)
class Layout:
    """A step over `gpus`.

    expert_ranks       GPUs that hold the experts once; gpus / expert_ranks copies
    context_ranks      GPUs that hold the rows of a micro-batch
    types              one of TYPES
    is_dense_divided   the dense part cut over all GPUs (FSDP2), gathered by block
    is_state_divided   optimiser state and masters cut over all GPUs
    recompute          one of STREAMS
    micro_batch        tokens a context group runs at once, one sample each
    num_micro_batches  of a step, by context group
    kl_chunk           tokens whose logits of student and teacher are there at once (distillation); 0: none
    """

    gpus: int
    expert_ranks: int = 1
    context_ranks: int = 1
    types: str = "fp32"
    is_dense_divided: bool = False
    is_state_divided: bool = True
    recompute: str = "block"
    micro_batch: int = 16384
    num_micro_batches: int = 1
    kl_chunk: int = 0

    def __post_init__(self) -> None:
        for name in ("gpus", "expert_ranks", "context_ranks", "micro_batch", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least 1")
        for name in ("expert_ranks", "context_ranks"):
            if self.gpus % getattr(self, name):
                raise ConfigError(f"{name} is {getattr(self, name)}; a divisor of the {self.gpus} GPUs")
        if self.micro_batch % self.context_ranks:
            raise ConfigError(
                f"micro_batch is {self.micro_batch}; a multiple of the {self.context_ranks} context_ranks"
            )
        if self.kl_chunk < 0:
            raise ConfigError(f"kl_chunk is {self.kl_chunk}; at least 0")
        for name, allowed in (("types", TYPES), ("recompute", STREAMS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; one of {', '.join(map(repr, allowed))}"
                )

    @property
    def tokens(self) -> int:
        """A GPU's tokens of a micro-batch."""
        return self.micro_batch // self.context_ranks


def device_bytes(config: ModelConfig, layout: Layout) -> dict[str, float]:
    """Bytes a GPU by kind at the peak; the allocator, libraries and what NCCL holds come on top."""
    if config.n_routed_experts % layout.expert_ranks:
        raise ConfigError(
            f"expert_ranks is {layout.expert_ranks}; a divisor of the {config.n_routed_experts} experts"
        )
    types, (experts, dense) = TYPES[layout.types], _groups(config)
    cut = layout.gpus if layout.is_dense_divided else 1
    held = num_parameters(experts) / layout.expert_ranks + num_parameters(dense) / cut
    if layout.is_state_divided:
        owned, state = (
            num_parameters([*experts, *dense]) / layout.gpus,
            _state([*experts, *dense]) / layout.gpus,
        )
    else:
        owned, state = held, _state(experts) / layout.expert_ranks + _state(dense) / cut
    each, once = STREAMS[layout.recompute]
    streams = types.weight * config.hc_mult * config.hidden_size * layout.tokens
    head = config.vocab_size * config.hidden_size
    found = {
        "weights": types.weight * held,
        "gradients": types.gradient * held,
        "masters": types.master * owned,
        "optimiser state": state,
        "activations": (each * config.num_hidden_layers + once) * streams,
        "gathered": 0.0,
        "distillation": 0.0,
    }
    if layout.is_dense_divided:
        block = _mean_block(config)  # one in use, the next on its way; one's gradients
        found["gathered"] = types.weight * (2 * head + 2 * block) + types.gradient * (2 * head + block)
    if layout.kl_chunk:
        # logits of both and their gradient in fp32; the teacher's head and states in bf16
        logits = 3 * 4 * layout.kl_chunk * config.vocab_size
        found["distillation"] = logits + 2 * head + 2 * config.hidden_size * layout.tokens
    return found


def least_seconds(
    config: ModelConfig, layout: Layout, flops_rate: float, bytes_rate: float
) -> dict[str, float]:
    """Least seconds of a step by what limits it: FLOP/s of a GPU, bytes/s that a GPU sends to all others.

    Every byte to another GPU counts alike; faster links within a machine take a share of them off. All
    samples are as long as a micro-batch. Sampling, teachers' forwards, the optimiser's products, MTP's work
    and the indexer's loss are left out. Each can hide behind the others: a step takes the largest.
    """
    tokens, times = layout.tokens * layout.num_micro_batches, layout.num_micro_batches
    flops = training_flops(config, layout.micro_batch)
    if layout.recompute == "block":
        flops += sum(w.flops for w in forward_work(config, layout.micro_batch, is_mean=True))
    if layout.kl_chunk:
        flops += 2 * config.vocab_size * config.hidden_size  # the teacher's head
    types, (experts, dense) = TYPES[layout.types], _groups(config)
    # out and home, forward and backward; once more each where blocks run again
    passes = 6 if layout.recompute == "block" else 4
    rows = config.num_hidden_layers * config.num_experts_per_tok * config.hidden_size * tokens
    copies = layout.gpus // layout.expert_ranks
    both = types.weight + types.gradient  # gradients to owners, weights back
    summed = num_parameters(experts) / layout.expert_ranks * both * _others(copies)
    if layout.is_dense_divided:  # weights for forward and backward, gradients back, each micro-batch
        summed += num_parameters(dense) * times * (types.weight + both) * _others(layout.gpus)
    else:
        summed += num_parameters(dense) * both * _others(layout.gpus)
    return {
        "matrix products": flops * tokens / flops_rate,
        "all-to-all": types.weight * passes * rows * _others(layout.expert_ranks) / bytes_rate,
        "weights and gradients": summed / bytes_rate,
    }


def _groups(config: ModelConfig) -> tuple[list[Weight], list[Weight]]:
    """Routed experts, and the dense part."""
    weights = [*main_weights(config), *mtp_weights(config)]
    experts = [w for w in weights if w.part == "routed experts"]
    return experts, [w for w in weights if w.part != "routed experts"]


def _state(weights: list[Weight]) -> int:
    parts = training_bytes(weights)
    return parts["Muon momentum"] + parts["AdamW moments"]


def _mean_block(config: ModelConfig) -> float:
    """Parameters of the dense part of a block, a mean over the layers."""
    own = [w for w in main_weights(config) if w.part not in ("routed experts", "embedding", "head")]
    return num_parameters(own) / config.num_hidden_layers


def _others(number: int) -> float:
    """Share of what is spread over so many that leaves a GPU."""
    return (number - 1) / number
