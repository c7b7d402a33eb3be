"""Every tensor of a released V4 model by shape and type, without building one (specification 1, 9-11).

Parameters, active parameters, file sizes and a trainer's memory are sums over this list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig

PARTS = (
    "embedding",
    "head",
    "attention",
    "compressors",
    "indexer",
    "mHC",
    "router",
    "routed experts",
    "shared experts",
    "norms",
)

LAYOUTS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "FP8, FP4 experts": {"expert": "fp4"},
        "FP8": {"expert": "fp8"},
        "BF16": {"expert": "bf16", "fp8": "bf16"},
        "FP32": {"expert": "fp32", "fp8": "fp32", "bf16": "fp32"},
    }
)
"""Name of a checkpoint layout -> what its tensors are stored as, where that is not `Weight.format`."""


@dataclass(frozen=True, slots=True)
class Weight:
    """Tensors of one shape in the released layout (specification 11.1).

    part       one of PARTS (also inside an MTP block)
    shape      of one tensor; matrices are [out, in]
    format     fp8 (one scale byte per 128×128), expert (FP4 or FP8), bf16, fp32, int64
    num        tensors of this shape
    num_active of these, how many take part in one token (routed experts: K of E; embedding: 0)
    is_matrix  whether the token's activations are multiplied with it
    """

    part: str
    shape: tuple[int, ...]
    format: str
    num: int
    num_active: int
    is_matrix: bool

    @property
    def num_parameters(self) -> int:
        """Over all tensors; 0 for the hash tables, which are not learned."""
        return 0 if self.format == "int64" else self.num * math.prod(self.shape)

    @property
    def num_active_parameters(self) -> int:
        return self.num_parameters // self.num * self.num_active

    @property
    def is_muon(self) -> bool:
        """Whether Muon moves it (specification 12.2): every matrix but the head."""
        return self.is_matrix and self.part != "head"


def _matrix(part: str, format_: str, *shape: int, num: int = 1, num_active: int | None = None) -> Weight:
    return Weight(part, shape, format_, num, num if num_active is None else num_active, True)


def _vector(part: str, format_: str, *shape: int, num: int = 1) -> Weight:
    return Weight(part, shape, format_, num, num, False)


def main_weights(config: ModelConfig) -> list[Weight]:
    """Every tensor of the model without MTP, in the order of the forward pass."""
    v, d = config.vocab_size, config.hidden_size
    found = [Weight("embedding", (v, d), "bf16", 1, 0, False)]
    for layer, ratio in enumerate(config.compress_ratios):
        found += _block(config, ratio, is_hash=layer < config.num_hash_layers)
    return [*found, *_collapse(config), _vector("norms", "bf16", d), _matrix("head", "bf16", v, d)]


def mtp_weights(config: ModelConfig) -> list[Weight]:
    """Every tensor of the MTP blocks (specification 10); they share embedding and head."""
    found: list[Weight] = []
    d = config.hidden_size
    for ratio in config.mtp_compress_ratios[: config.num_nextn_predict_layers]:
        found += [_matrix("attention", "fp8", d, d, num=2), _vector("norms", "bf16", d, num=3)]
        found += [*_block(config, ratio, is_hash=False), *_collapse(config)]
    return found


def _block(config: ModelConfig, ratio: int, *, is_hash: bool) -> list[Weight]:
    d, n = config.hidden_size, config.hc_mult
    rows = (2 + n) * n
    return [
        *_attention(config, ratio),
        *_moe(config, is_hash),
        _vector("norms", "bf16", d, num=2),
        _matrix("mHC", "fp32", rows, n * d, num=2),
        _vector("mHC", "fp32", rows, num=2),
        _vector("mHC", "fp32", 3, num=2),
    ]


def _collapse(config: ModelConfig) -> list[Weight]:
    n = config.hc_mult
    shape = (n, n * config.hidden_size)
    return [_matrix("mHC", "fp32", *shape), _vector("mHC", "fp32", n), _vector("mHC", "fp32", 1)]


def _attention(config: ModelConfig, ratio: int) -> list[Weight]:
    d, c, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    rank = config.q_lora_rank
    low = config.o_groups * config.o_lora_rank
    shapes = ((rank, d), (heads * c, rank), (c, d), (low, heads * c // config.o_groups), (d, low))
    found = [_matrix("attention", "fp8", *shape) for shape in shapes]
    found += [_vector("norms", "bf16", rank), _vector("norms", "bf16", c)]
    found.append(_vector("attention", "fp32", heads))
    if ratio != SLIDING:
        found += _compressor("compressors", d, c, ratio)
    if ratio == CSA_RATIO:
        index_heads, width = config.index_n_heads, config.index_head_dim
        found.append(_matrix("indexer", "fp8", index_heads * width, rank))
        found.append(_matrix("indexer", "bf16", index_heads, d))
        found += _compressor("indexer", d, width, ratio)
    return found


def _compressor(part: str, d: int, width: int, ratio: int) -> list[Weight]:
    series = series_width(width, ratio)
    return [
        _matrix(part, "bf16", series, d, num=2),
        _vector(part, "fp32", ratio, series),
        _vector("norms", "bf16", width),
    ]


def series_width(width: int, ratio: int) -> int:
    """Channels a compressor projects: CSA's windows overlap, so each token serves two entries."""
    return 2 * width if ratio == CSA_RATIO else width


def _moe(config: ModelConfig, is_hash: bool) -> list[Weight]:
    d, i = config.hidden_size, config.moe_intermediate_size
    e, k = config.n_routed_experts, config.num_experts_per_tok
    shared = i * config.n_shared_experts
    table = _vector("router", "int64", config.vocab_size, k) if is_hash else _vector("router", "fp32", e)
    return [
        _matrix("router", "bf16", e, d),
        table,
        _matrix("routed experts", "expert", i, d, num=2 * e, num_active=2 * k),
        _matrix("routed experts", "expert", d, i, num=e, num_active=k),
        _matrix("shared experts", "fp8", shared, d, num=2),
        _matrix("shared experts", "fp8", d, shared),
    ]


def num_parameters(weights: Iterable[Weight]) -> int:
    """Parameters as the report counts them (router biases in, hash tables and scales out)."""
    return sum(w.num_parameters for w in weights)


def num_active_parameters(weights: Iterable[Weight]) -> int:
    """Parameters one token touches: its experts, the head, not the embedding (specification 1.1)."""
    return sum(w.num_active_parameters for w in weights)


def released_layout(config: ModelConfig) -> str:
    """The layout of its own files: FP8 experts in Base checkpoints, FP4 where the config does not say."""
    return "FP8" if config.expert_dtype == "fp8" else "FP8, FP4 experts"


def weight_bytes(weights: Iterable[Weight], layout: str) -> int:
    """Bytes of the tensors, scales and hash tables included, in one of LAYOUTS."""
    stored = LAYOUTS[layout]
    return sum(w.num * _tensor_bytes(w.shape, stored.get(w.format, w.format)) for w in weights)


def _tensor_bytes(shape: tuple[int, ...], format_: str) -> int:
    if format_ == "fp8":
        return math.prod(shape) + math.prod(-(-size // 128) for size in shape)
    if format_ == "fp4":
        return math.prod(shape[:-1]) * (-(-shape[-1] // 2) + -(-shape[-1] // 32))
    return math.prod(shape) * {"bf16": 2, "fp32": 4, "int64": 8}[format_]


def training_bytes(weights: Iterable[Weight]) -> dict[str, int]:
    """Bytes a trainer holds, over all ranks, without activations; all in fp32 (specification 12.2)."""
    weights = list(weights)
    total = num_parameters(weights)
    muon = sum(w.num_parameters for w in weights if w.is_muon)
    by_rule = sum(w.num_parameters for w in weights if w.part == "router" and not w.is_matrix)
    return {
        "master weights": 4 * total,
        "gradients": 4 * (total - by_rule),
        "Muon momentum": 4 * muon,
        "AdamW moments": 8 * (total - muon - by_rule),
    }
