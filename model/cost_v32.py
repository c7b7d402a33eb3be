"""DeepSeek-V3.2's cost of a token, which V4's report compares itself with (specification 14).

Sizes are those of V3.2's released `config.json`. MLA is counted as it decodes: the up-projections of
keys and values are absorbed into queries and outputs, so attention runs over 512 + 64 shared channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from consilience.model.cost import Work


@dataclass(frozen=True)
class V32Config:
    """Field names of the released file."""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_shared_experts: int = 1
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048


V32 = V32Config()


def v32_work(num_tokens: int, config: V32Config = V32) -> list[Work]:
    """Forward FLOPs of one token at context `num_tokens`; the indexer scores every token in FP8."""
    c = config
    d, heads, layers = c.hidden_size, c.num_attention_heads, c.num_hidden_layers
    attention = (
        d * (c.q_lora_rank + c.kv_lora_rank + c.qk_rope_head_dim)
        + c.q_lora_rank * heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        + c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        + heads * c.v_head_dim * d
    )
    indexer = (c.q_lora_rank * c.index_n_heads + d) * c.index_head_dim
    experts = 3 * d * c.moe_intermediate_size * (c.num_experts_per_tok + c.n_shared_experts)
    dense, sparse = c.first_k_dense_replace, layers - c.first_k_dense_replace
    low = layers * (attention + indexer) + dense * 3 * d * c.intermediate_size + sparse * experts
    high = layers * c.index_n_heads * d + sparse * c.n_routed_experts * d + c.vocab_size * d
    keys = min(c.index_topk, num_tokens)
    core = layers * 2 * heads * (2 * c.kv_lora_rank + c.qk_rope_head_dim) * keys
    return [
        Work("linear, FP8", "low", 2.0 * low),
        Work("linear, BF16", "high", 2.0 * high),
        Work("attention core", "core", float(core)),
        Work("index scores", "low", layers * 2.0 * c.index_n_heads * c.index_head_dim * num_tokens),
    ]


def v32_state_bytes(num_tokens: int, config: V32Config = V32, *, has_scales: bool = True) -> int:
    """Bytes of one sequence's cache: FP8 latent, BF16 rope key, FP8 index key, scales (656 + 132 a layer).

    Four fp32 scales a latent, one an index key.
    """
    entry = config.kv_lora_rank + 2 * config.qk_rope_head_dim + config.index_head_dim
    scales = 4 * (config.kv_lora_rank // 128 + config.index_head_dim // 128) if has_scales else 0
    return num_tokens * config.num_hidden_layers * (entry + scales)
