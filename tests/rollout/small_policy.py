"""A model whose borders every short prompt crosses, for the tests of the native engine."""

from dataclasses import replace

import torch

from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer

# Windows and top-k so small that every prompt here crosses borders of all of them.
CONFIG = replace(
    TINY,
    vocab_size=61,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    sliding_window=8,
    compress_ratios=(0, 4, 12),
    index_head_dim=12,
    index_topk=6,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    num_hash_layers=1,
    hc_sinkhorn_iters=3,  # half the time of a step otherwise, and rows do not meet there
)


def policy(seed=0, gain=3.0):
    """fp64, so that what differs is the engine and not rounding; `gain` peaks the distribution."""
    model = initialize(Transformer(CONFIG), seed)
    with torch.no_grad():
        model.head.weight.mul_(gain)
    return model.double()


def prompt(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(CONFIG.vocab_size, (length,), generator=g).tolist())
