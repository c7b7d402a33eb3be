"""Random initialisation for training from scratch.

The report does not publish mHC's start. The streams begin as four copies of the embedding; if
every read and write treated them alike they would stay copies for ever, so the static parts below
prefer one stream per layer for reading (the hyper-connections paper's one-hot start, softened),
write with a different strength to each, and mostly keep streams apart when mixing.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from consilience.model.config import ModelConfig
from consilience.model.hyper_connections import HyperConnection
from consilience.model.transformer import Block, Transformer

SMALL_GATE = 0.01  # "gating factors initialised to small values" (mHC report, appendix A.1)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> Transformer:
    """Fill every parameter and hash table of `model` in place, deterministically from `seed`."""
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf == "fn":
            normal(parameter, config.initializer_range)
        elif name.endswith("embed.weight"):
            normal(parameter, 1.0 / math.sqrt(config.hidden_size))
        elif parameter.dim() >= 2 and leaf != "ape":
            normal(parameter, 1.0 / math.sqrt(parameter.shape[-1]))
        elif name.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif leaf in ("attn_sink", "bias", "base", "ape"):
            parameter.zero_()
        elif leaf == "scale":
            parameter.fill_(SMALL_GATE)
        else:
            raise AssertionError(f"no initialisation rule for {name}")
    for layer, block in enumerate((*model.layers, *model.mtp)):
        assert isinstance(block, Block)
        for index, connection in enumerate((block.hc_attn, block.hc_ffn)):
            _separate_streams(connection, 2 * layer + index, generator)
        if block.ffn.gate.is_hash:
            block.ffn.gate.tid2eid.copy_(hash_table(config, seed + layer))
    return model


def _separate_streams(connection: HyperConnection, sublayer: int, generator: torch.Generator) -> None:
    n = connection.num_streams
    base = connection.base
    pre = torch.full((n,), -1.0)
    pre[sublayer % n] = 1.0
    base[:n] = pre
    base[n : 2 * n] = 0.5 * torch.randn(n, generator=generator)
    base[2 * n :] = (2.0 * torch.eye(n) + 0.1 * torch.randn(n, n, generator=generator)).flatten()


def hash_table(config: ModelConfig, seed: int) -> Tensor:
    """K distinct experts per token id, [V, K] int64, every expert used about V·K/E times.

    How the released tables were made is unpublished; this draws experts from shuffled decks.
    """
    generator = torch.Generator().manual_seed(seed)
    num_experts, topk = config.n_routed_experts, config.num_experts_per_tok
    hands_per_deck = num_experts // topk
    num_decks = -(-config.vocab_size // hands_per_deck)
    decks = torch.rand(num_decks, num_experts, generator=generator).argsort(1)
    hands = decks[:, : hands_per_deck * topk].reshape(-1, topk)
    return hands[: config.vocab_size]


def num_parameters(model: nn.Module) -> int:
    """Parameters as the report counts them (router biases in, hash tables out)."""
    return sum(p.numel() for p in model.parameters())
