"""Configuration of the V4 architecture, with the released field names, and the presets.

Source: `config.json` of the released checkpoints; report section 4.2.1 for the layer schedules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from consilience.conf.errors import ConfigError
from consilience.model.config_json import SIZES, read_fields
from consilience.model.config_layouts import write_official, write_transformers

SLIDING = 0
CSA_RATIO = 4
SLIDING_ONLY_BLOCK = 128  # a model without compressed layers stores nothing in its blocks


@dataclass(frozen=True)
class ModelConfig:
    """One V4 model. Field names are those of the released `config.json`.

    compress_ratios has one entry a layer: 0 sliding window only, 4 CSA (overlapping windows and
    the lightning indexer), any other ratio HCA (report 2.3). Released files carry one more entry
    for the MTP block, which is kept in `mtp_compress_ratios`.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    n_shared_experts: int = 1
    num_key_value_heads: int = 1
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_factor: float = 16.0
    rope_original_length: int = 65536
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 0
    mtp_compress_ratios: tuple[int, ...] = ()
    bos_token_id: int = 0
    eos_token_id: int = 1
    initializer_range: float = 0.02
    torch_dtype: str = "bfloat16"
    expert_dtype: str | None = None

    def __post_init__(self) -> None:
        for name in (*SIZES, "qk_rope_head_dim"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; it must be at least 1")
        for message, is_ok in self._checks():
            if not is_ok:
                raise ConfigError(f"model: {message}")

    def _checks(self) -> list[tuple[str, bool]]:
        """What must hold between fields, each with the message for when it does not."""
        heads, rope = self.num_attention_heads, self.qk_rope_head_dim
        topk, experts = self.num_experts_per_tok, self.n_routed_experts
        num_ratios = len(self.compress_ratios)
        return [
            (
                f"compress_ratios has {num_ratios} entries for {self.num_hidden_layers} layers",
                num_ratios == self.num_hidden_layers,
            ),
            (
                f"num_attention_heads {heads} is no multiple of o_groups {self.o_groups}",
                heads % self.o_groups == 0,
            ),
            (
                f"qk_rope_head_dim {rope} must be even and at most head_dim {self.head_dim}",
                rope % 2 == 0 and rope <= self.head_dim,
            ),
            (f"head_dim {self.head_dim} must be even", self.head_dim % 2 == 0),
            (f"index_head_dim {self.index_head_dim} must be even", self.index_head_dim % 2 == 0),
            (
                f"index_head_dim {self.index_head_dim} is smaller than qk_rope_head_dim {rope}",
                self.index_head_dim >= rope,
            ),
            (f"num_experts_per_tok {topk} exceeds n_routed_experts {experts}", topk <= experts),
            (
                f"num_key_value_heads is {self.num_key_value_heads}; V4 shares one",
                self.num_key_value_heads == 1,
            ),
            (
                f"mtp_compress_ratios has {len(self.mtp_compress_ratios)} entries for "
                f"{self.num_nextn_predict_layers} MTP blocks",
                len(self.mtp_compress_ratios) == self.num_nextn_predict_layers,
            ),
            ("compress_ratios must be 0 or at least 2", all(r == 0 or r >= 2 for r in self.compress_ratios)),
        ]

    @property
    def ratios(self) -> tuple[int, ...]:
        """Distinct non-zero compression ratios, ascending."""
        return tuple(sorted({r for r in self.compress_ratios if r != SLIDING}))

    @property
    def block_tokens(self) -> int:
        """Tokens a block of the decode state stands for: whole entries of every layer (report 3.5)."""
        return math.lcm(*self.ratios) if self.ratios else SLIDING_ONLY_BLOCK

    def ratio_of(self, layer: int) -> int:
        """Compression ratio of a layer; MTP blocks are counted behind the trunk's layers."""
        return (*self.compress_ratios, *self.mtp_compress_ratios)[layer]

    def mtp_config(self) -> ModelConfig:
        """The prediction blocks as a model of their own: what their decode state is allocated for."""
        ratios = self.mtp_compress_ratios
        return replace(
            self,
            num_hidden_layers=len(ratios),
            compress_ratios=ratios,
            num_nextn_predict_layers=0,
            mtp_compress_ratios=(),
        )

    def to_json_dict(self) -> dict[str, Any]:
        """The released `config.json` layout (rope_scaling as a table, MTP's ratio appended)."""
        return write_official(asdict(self))

    def to_transformers_dict(self) -> dict[str, Any]:
        """The `config.json` that `transformers` saves; ConfigError where it cannot say what this is."""
        return write_transformers(asdict(self))

    @classmethod
    def from_json_dict(cls, row: Mapping[str, Any]) -> ModelConfig:
        """From either layout (`config_json.read_fields`); ConfigError names a missing or foreign field."""
        try:
            return cls(**read_fields(row))
        except ConfigError as error:
            raise ConfigError(f"model config.json: {error}") from error


def _alternate(first: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """`first` (layers 0 and 1), then CSA on even layers and HCA (128) on odd ones."""
    return first + tuple(CSA_RATIO if layer % 2 == 0 else 128 for layer in range(len(first), num_layers))


FLASH = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    compress_ratios=_alternate((0, 0), 43),
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    num_hash_layers=3,
    num_nextn_predict_layers=1,
    mtp_compress_ratios=(0,),
)

PRO = replace(
    FLASH,
    hidden_size=7168,
    num_hidden_layers=61,
    num_attention_heads=128,
    q_lora_rank=1536,
    o_groups=16,
    compress_ratios=_alternate((128, 128), 61),
    index_topk=1024,
    n_routed_experts=384,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
)

SMALL = replace(
    FLASH,
    vocab_size=32768,
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    head_dim=128,
    qk_rope_head_dim=64,
    q_lora_rank=512,
    o_groups=4,
    o_lora_rank=512,
    sliding_window=128,
    compress_ratios=_alternate((0, 0), 8),
    index_n_heads=16,
    index_head_dim=128,
    index_topk=256,
    n_routed_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=512,
    num_hash_layers=2,
    num_nextn_predict_layers=0,
    mtp_compress_ratios=(),
    max_position_embeddings=65536,
)

MINI = replace(
    SMALL,
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=8,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=192,
    o_groups=2,
    o_lora_rank=192,
    sliding_window=64,
    compress_ratios=_alternate((0, 0), 6),
    index_n_heads=8,
    index_head_dim=64,
    index_topk=64,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=192,
    max_position_embeddings=16384,
    torch_dtype="float32",
)

TINY = replace(
    MINI,
    vocab_size=640,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=48,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=64,
    compress_ratios=(0, 4, 128),
    index_n_heads=2,
    index_head_dim=16,
    index_topk=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
    max_position_embeddings=2048,
)

PRESETS: dict[str, ModelConfig] = {"tiny": TINY, "mini": MINI, "small": SMALL, "flash": FLASH, "pro": PRO}
