"""What a token costs: FLOPs by part, bytes of decode state by part (specification 8 and 14).

Arithmetic over `ModelConfig` alone; nothing is built. FLOPs count matrix products, 2 a multiply-add:
projections, scores, weighted sums. Norms, softmax, pooling and the mixing of streams are left out.
`cost_v32.py` holds the model the report compares with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.weights import PARTS, main_weights, series_width


@dataclass(frozen=True, slots=True)
class Work:
    """Matrix products of one token. kind: low (FP8 or FP4 weights), high (BF16, FP32), core, index."""

    part: str
    kind: str
    flops: float


EQUIVALENT: Mapping[str, float] = MappingProxyType({"low": 1.0, "high": 2.0, "core": 2.0, "index": 0.5})
"""FP8 FLOPs that one FLOP of a kind counts as: BF16 runs at half the speed of FP8, FP4 at twice.

FP4 experts multiply FP8 activations, at FP8 speed. A reconstruction that reproduces every figure of
the report (specification 14).
"""


def forward_work(config: ModelConfig, num_tokens: int, *, is_mean: bool = False) -> list[Work]:
    """Forward FLOPs of token N = num_tokens (is_mean: mean over tokens 1 to N), by part, without MTP."""
    linear: dict[tuple[str, str], float] = {}
    for w in main_weights(config):
        if w.is_matrix:
            key = (w.part, "low" if w.format in ("fp8", "expert") else "high")
            linear[key] = linear.get(key, 0.0) + 2.0 * w.num_active_parameters
    core: dict[str, float] = {}
    index = 0.0
    window = _num_keys(num_tokens, 1, config.sliding_window, is_mean)
    for ratio in config.compress_ratios:
        name, keys = "core, sliding", window
        if ratio != SLIDING:
            cap = config.index_topk if ratio == CSA_RATIO else num_tokens
            name = "core, CSA" if ratio == CSA_RATIO else "core, HCA"
            keys += _num_keys(num_tokens, ratio, cap, is_mean)
        core[name] = core.get(name, 0.0) + 4.0 * config.num_attention_heads * config.head_dim * keys
        if ratio == CSA_RATIO:
            entries = _num_keys(num_tokens, ratio, num_tokens, is_mean)
            index += 2.0 * config.index_n_heads * config.index_head_dim * entries
    return [
        *(Work(part, kind, linear[part, kind]) for part, kind in sorted(linear, key=_order)),
        *(Work(name, "core", flops) for name, flops in core.items()),
        *([Work("index scores", "index", index)] if CSA_RATIO in config.compress_ratios else []),
    ]


def _order(key: tuple[str, str]) -> tuple[bool, int]:
    part, kind = key
    return kind == "high", PARTS.index(part)


def _num_keys(num_tokens: int, ratio: int, cap: int, is_mean: bool) -> float:
    """min(cap, ⌊t / ratio⌋) for t = num_tokens, or its mean over t = 1 … num_tokens."""
    if not is_mean:
        return min(cap, num_tokens // ratio)
    below = min(num_tokens, (cap + 1) * ratio - 1)
    quotient, rest = divmod(below, ratio)
    total = ratio * quotient * (quotient - 1) // 2 + quotient * (rest + 1) + cap * (num_tokens - below)
    return total / num_tokens


def training_flops(config: ModelConfig, num_tokens: int) -> float:
    """FLOPs a token of forward and backward, mean over one sample of num_tokens, nothing recomputed.

    A backward is two products for each of the forward; the indexer, which the language-model loss
    does not reach, runs forward only. Without MTP and the indexer's own loss.
    """
    work = forward_work(config, num_tokens, is_mean=True)
    return sum(w.flops * (1 if w.part in ("indexer", "index scores") else 3) for w in work)


def equivalent_flops(work: Iterable[Work], weighting: Mapping[str, float] = EQUIVALENT) -> float:
    """The work in FP8 FLOPs."""
    return sum(w.flops * weighting[w.kind] for w in work)


@dataclass(frozen=True, slots=True)
class StateFormat:
    """Bytes of one entry [C] of the window or a compressor, of one index key, of one number of a tail."""

    entry: int
    index_key: int
    tail: int = 4


def serving_format(config: ModelConfig, *, has_scales: bool = True) -> StateFormat:
    """FP8 entries with BF16 rope channels, FP4 index keys (specification 5.2, 7): 584 and 68 bytes.

    An entry has one scale byte per 64 FP8 channels and is padded to a multiple of 8 bytes.
    """
    plain = config.head_dim - config.qk_rope_head_dim
    entry, key = plain + 2 * config.qk_rope_head_dim, config.index_head_dim // 2
    if not has_scales:
        return StateFormat(entry, key)
    return StateFormat(-(-(entry + -(-plain // 64)) // 8) * 8, key + -(-config.index_head_dim // 32))


def state_bytes(config: ModelConfig, num_tokens: int, format_: StateFormat) -> dict[str, int]:
    """Bytes of one sequence's decode state by part (specification 8); the report leaves the tails out."""
    parts = {"window": config.num_hidden_layers * config.sliding_window * format_.entry}
    parts |= {"CSA entries": 0, "index keys": 0, "HCA entries": 0, "compressor tails": 0}
    for ratio in config.compress_ratios:
        if ratio == SLIDING:
            continue
        entries = num_tokens // ratio
        is_csa = ratio == CSA_RATIO
        parts["CSA entries" if is_csa else "HCA entries"] += entries * format_.entry
        width = config.head_dim + (config.index_head_dim if is_csa else 0)
        ring = 2 * ratio if is_csa else ratio
        parts["compressor tails"] += 2 * ring * series_width(width, ratio) * format_.tail
        parts["index keys"] += entries * format_.index_key if is_csa else 0
    return parts


def report_state_bytes(parts: Mapping[str, int]) -> int:
    """The sum the report compares by: all of `state_bytes` but the tails."""
    return sum(parts.values()) - parts["compressor tails"]


def allocated_bytes(config: ModelConfig, num_slots: int, max_length: int, element_bytes: int) -> int:
    """What `DecodeState.allocate` takes: entries in the activations' type, tails in fp32 or wider.

    Entries lie in whole blocks, one more than the sequences need; each sequence has a position and a
    table of its blocks, 8 bytes each.
    """
    entry, key = config.head_dim * element_bytes, config.index_head_dim * element_bytes
    parts = state_bytes(config, config.block_tokens, StateFormat(entry, key, max(4, element_bytes)))
    own = parts.pop("window") + parts.pop("compressor tails")
    num_blocks = -(-max_length // config.block_tokens)
    return num_slots * (8 + 8 * num_blocks + own) + (num_slots * num_blocks + 1) * sum(parts.values())
