"""Layers, choices and tokens on which experts over ranks are held against one process."""

from dataclasses import replace

import torch

from consilience.model.config import TINY
from consilience.model.moe import MoE

CONFIG = replace(
    TINY,
    hidden_size=16,
    vocab_size=11,
    n_routed_experts=7,  # no multiple of 2 or 4 ranks
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    swiglu_limit=0.7,  # binds
)
# Tokens of each rank in three batches: uneven, a rank without one, hardly any (most experts without one).
BATCHES = {2: [(13, 6), (0, 9), (1, 0)], 4: [(5, 0, 11, 3), (0, 0, 2, 0)]}
ROUTERS = {"hash": True, "learned": False}


def layer(router, dtype=None, config=CONFIG, seed=0):
    is_hash = ROUTERS[router]
    moe = MoE(config, 0 if is_hash else config.num_hash_layers, dtype)
    assert moe.gate.is_hash == is_hash
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in moe.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=g))
        if is_hash:
            table = torch.rand(config.vocab_size, config.n_routed_experts, generator=g)
            moe.gate.tid2eid.copy_(table.argsort(1)[:, : config.num_experts_per_tok])
    return moe


def tokens(counts, dtype=None, seed=1, config=CONFIG):
    """Of each rank: hidden [T, D], token ids [T], upstream gradient [T, D], sample of each token [T], and
    choices: weights [T, K], experts [T, K]."""
    g, found = torch.Generator().manual_seed(seed), []
    odds = torch.arange(config.n_routed_experts) + 0.3  # the last expert is chosen the most
    for count in counts:
        hidden, grad = (torch.randn(count, config.hidden_size, generator=g) for _ in range(2))
        ids = torch.randint(config.vocab_size, (count,), generator=g)
        sample = torch.arange(count) // 3
        sample[count - count // 4 :] = -1
        weights = torch.rand(count, config.num_experts_per_tok, generator=g)
        drawn = torch.rand(count, config.n_routed_experts, generator=g).log() / odds
        experts = drawn.argsort(1, descending=True)[:, : config.num_experts_per_tok]
        found.append((hidden.to(dtype), ids, grad.to(dtype), sample, weights.to(dtype), experts))
    return found


def joined(counts, dtype=None, seed=1, config=CONFIG):
    """The same tokens in one process; the samples of each rank get numbers of their own."""
    parts = tokens(counts, dtype, seed, config)
    samples = [torch.where(p[3] >= 0, p[3] + 100 * rank, -1) for rank, p in enumerate(parts)]
    return tuple(torch.cat(samples if i == 3 else x) for i, x in enumerate(zip(*parts)))
