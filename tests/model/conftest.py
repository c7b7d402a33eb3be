"""Small models in which nothing is zero, so that no part can be forgotten unnoticed."""

from dataclasses import replace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

# All three attention kinds and both routers; every size differs from its neighbours.
SMALLEST = replace(
    TINY,
    vocab_size=53,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=12,
    sliding_window=6,
    compress_ratios=(0, 4, 12, 4),
    index_n_heads=6,
    index_head_dim=12,
    index_topk=5,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    num_hash_layers=1,
    # YaRN's blend falls inside these 4 channel pairs, and angles are large enough to matter.
    compress_rope_theta=400.0,
    rope_theta=50.0,
    rope_original_length=512,
    max_position_embeddings=4096,
    routed_scaling_factor=1.7,
)


@pytest.fixture(scope="session")
def smallest():
    """The config of the small models here; `dataclasses.replace` varies it."""
    return SMALLEST


@pytest.fixture(scope="session")
def rough_model():
    """rough_model(config, seed=0, dtype=None): a model with every parameter away from its start."""

    def build(config=SMALLEST, seed=0, dtype=None):
        model = initialize(Transformer(config), seed)
        g = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                leaf = name.rsplit(".", 1)[-1]
                noise = torch.randn(p.shape, generator=g)
                if leaf in ("attn_sink", "ape", "base"):
                    p.add_(noise)
                elif leaf == "bias":
                    p.copy_(0.3 * noise)
                elif leaf == "scale":
                    p.copy_(0.5 + noise.abs())
                elif leaf == "fn":  # mixes of size about 1: larger ones amplify rounding
                    p.copy_(0.1 * noise)
                elif name.endswith("norm.weight"):
                    p.copy_(1 + 0.3 * noise)
        return model if dtype is None else model.to(dtype)

    return build
