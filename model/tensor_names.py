"""The released names of tensors, how each is stored, and what transformers calls it (specification 11.1)."""

from __future__ import annotations

import re
from enum import Enum


class Kind(Enum):
    """How the released checkpoints store a tensor."""

    FP8 = "fp8"  # e4m3, one power-of-two scale a tile of 128 x 128
    EXPERT = "expert"  # MXFP4, one scale for 32 inputs of a row; FP8 in Base checkpoints
    BF16 = "bf16"
    FP32 = "fp32"
    INT64 = "int64"


# What follows `layers.L.`: official name, transformers' name. The experts of a layer are packed there.
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}
TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# `save_pretrained` writes official names again, but for its prefix and these (specification 11.3).
_LAYER_BACK = {theirs: ours for ours, theirs in LAYER.items()} | {"attn.norm.weight": "attn.kv_norm.weight"}
_TOP_BACK = {theirs.removeprefix("model."): ours for ours, theirs in TOP.items()}
_LAYER_NAME = re.compile(r"(layers\.\d+)\.(.+)")
_EXPERT = re.compile(r"(?:layers|mtp)\.\d+\.ffn\.experts\.\d+\.w[123]\.weight")
_PACKED = re.compile(r"(layers\.\d+)\.(?:mlp|ffn)\.experts\.(gate_up_proj|down_proj)")
_FP8 = re.compile(
    r"(?:layers|mtp)\.\d+\.(?:attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)|ffn\.shared_experts\.w[123]"
    r"|e_proj|h_proj)\.weight"
)
_FP32 = re.compile(r"(?:.*\.)?(?:hc_(?:attn|ffn|head)_(?:fn|base|scale)|attn_sink|ape|gate\.bias)")


def kind_of(name: str) -> Kind:
    """How the released checkpoints store the tensor of this official name."""
    if _EXPERT.fullmatch(name):
        return Kind.EXPERT
    if _FP8.fullmatch(name):
        return Kind.FP8
    if _FP32.fullmatch(name):
        return Kind.FP32
    return Kind.INT64 if name.endswith(".tid2eid") else Kind.BF16


def official_of(name: str) -> str:
    """The official name of a stored one: official itself, transformers', or its `save_pretrained`'s.

    A name that means nothing to V4 comes back as it is, without the prefix `model.`.
    """
    name = name.removeprefix("model.")
    in_layer = _LAYER_NAME.fullmatch(name)
    if in_layer:
        return f"{in_layer[1]}.{_LAYER_BACK.get(in_layer[2], in_layer[2])}"
    return _TOP_BACK.get(name, name)


def transformers_of(name: str) -> str:
    """What transformers calls an official tensor; experts have no name of their own there."""
    in_layer = _LAYER_NAME.fullmatch(name)
    if in_layer:
        return f"model.{in_layer[1]}.{LAYER[in_layer[2]]}"
    return TOP[name]


def scale_name(weight: str) -> str:
    """`….weight` -> `….scale`."""
    return f"{weight.removesuffix('.weight')}.scale"


def packed_experts(name: str, num_experts: int, num_rows: int) -> dict[str, tuple[int, int]]:
    """What a packed tensor of transformers holds: official name -> its rows [first, last).

    `gate_up_proj` [E, 2I, D] is w1 then w3 of each expert, `down_proj` [E, D, I] is w2; rows are
    those of the tensor as a matrix [E · num_rows, …]. Empty if `name` is no packed tensor.
    """
    packed = _PACKED.fullmatch(name.removeprefix("model."))
    if not packed:
        return {}
    parts = ("w1", "w3") if packed[2] == "gate_up_proj" else ("w2",)
    size = num_rows // len(parts)
    starts = [(e, part, e * num_rows + i * size) for e in range(num_experts) for i, part in enumerate(parts)]
    return {f"{packed[1]}.ffn.experts.{e}.{part}.weight": (row, row + size) for e, part, row in starts}


def packed_name(expert: str, num_rows: int) -> tuple[str, int, int]:
    """Where transformers packs `layers.L.ffn.experts.E.wN.weight` of num_rows rows.

    The packed tensor's name, the expert's first row in it as a matrix, rows of one expert.
    """
    _, layer, _, _, number, part, _ = expert.split(".")
    prefix = f"model.layers.{layer}.mlp.experts"
    if part == "w2":
        return f"{prefix}.down_proj", int(number) * num_rows, num_rows
    first = (2 * int(number) + (part == "w3")) * num_rows
    return f"{prefix}.gate_up_proj", first, 2 * num_rows
