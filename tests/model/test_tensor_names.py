"""Table 11.1: names both ways, and how each tensor is stored."""

import pytest
import torch
from synthetic_release import RELEASED, is_fp8, is_fp32
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from consilience.model.checkpoint import expected_shapes
from consilience.model.tensor_names import (
    Kind,
    kind_of,
    official_of,
    packed_experts,
    packed_name,
    scale_name,
    transformers_of,
)

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("official", "transformers", "kind"),
    [
        ("embed.weight", "model.embed_tokens.weight", "bf16"),
        ("head.weight", "lm_head.weight", "bf16"),
        ("norm.weight", "model.norm.weight", "bf16"),
        ("hc_head_fn", "model.hc_head.hc_fn", "fp32"),
        ("layers.3.attn_norm.weight", "model.layers.3.input_layernorm.weight", "bf16"),
        ("layers.3.hc_ffn_scale", "model.layers.3.ffn_hc.scale", "fp32"),
        ("layers.12.attn.attn_sink", "model.layers.12.self_attn.sinks", "fp32"),
        ("layers.3.attn.wkv.weight", "model.layers.3.self_attn.kv_proj.weight", "fp8"),
        ("layers.3.attn.kv_norm.weight", "model.layers.3.self_attn.kv_norm.weight", "bf16"),
        ("layers.3.attn.wo_a.weight", "model.layers.3.self_attn.o_a_proj.weight", "fp8"),
        (
            "layers.3.attn.compressor.wkv.weight",
            "model.layers.3.self_attn.compressor.kv_proj.weight",
            "bf16",
        ),
        ("layers.3.attn.compressor.ape", "model.layers.3.self_attn.compressor.position_bias", "fp32"),
        (
            "layers.2.attn.indexer.wq_b.weight",
            "model.layers.2.self_attn.compressor.indexer.q_b_proj.weight",
            "fp8",
        ),
        (
            "layers.2.attn.indexer.compressor.norm.weight",
            "model.layers.2.self_attn.compressor.indexer.kv_norm.weight",
            "bf16",
        ),
        ("layers.3.ffn.gate.weight", "model.layers.3.mlp.gate.weight", "bf16"),
        ("layers.3.ffn.gate.bias", "model.layers.3.mlp.gate.e_score_correction_bias", "fp32"),
        ("layers.0.ffn.gate.tid2eid", "model.layers.0.mlp.gate.tid2eid", "int64"),
        (
            "layers.3.ffn.shared_experts.w2.weight",
            "model.layers.3.mlp.shared_experts.down_proj.weight",
            "fp8",
        ),
    ],
)
def test_names_and_types_of_the_released_table(official, transformers, kind):
    assert transformers_of(official) == transformers
    assert official_of(transformers) == official_of(official) == official_of(f"model.{official}") == official
    assert kind_of(official).value == kind


def test_every_tensor_of_a_model_is_stored_as_the_table_says():
    for name in expected_shapes(RELEASED):
        expected = Kind.EXPERT if ".ffn.experts." in name else Kind.FP8 if is_fp8(name) else None
        expected = expected or (Kind.FP32 if is_fp32(name) else None)
        assert kind_of(name) is (expected or (Kind.INT64 if "tid2eid" in name else Kind.BF16)), name
    assert kind_of("mtp.0.e_proj.weight") is Kind.FP8 and kind_of("mtp.0.hc_head_fn") is Kind.FP32


def test_the_names_are_those_of_transformers_modules_and_none_is_left_over():
    config = DeepseekV4Config(**RELEASED.to_transformers_dict())
    with torch.device("meta"):
        theirs = {n: tuple(t.shape) for n, t in DeepseekV4ForCausalLM(config).state_dict().items()}
    ours = {}
    for name, shape in expected_shapes(RELEASED).items():
        if kind_of(name) is Kind.EXPERT and not name.startswith("mtp."):
            stored, _, rows = packed_name(name, shape[0])
            ours[stored] = (RELEASED.n_routed_experts, rows, shape[1])
        elif not name.startswith("mtp."):
            ours[transformers_of(name)] = shape
    assert ours == theirs


def test_the_names_of_save_pretrained_are_read_too():
    assert official_of("model.layers.0.attn.norm.weight") == "layers.0.attn.kv_norm.weight"
    assert official_of("layers.0.attn.compressor.norm.weight") == "layers.0.attn.compressor.norm.weight"
    assert official_of("model.layers.0.attn_norm.weight") == "layers.0.attn_norm.weight"
    assert official_of("model.hc_head.hc_base") == "hc_head_base"
    assert official_of("mtp.0.norm.weight") == "mtp.0.norm.weight"


def test_scales_stand_beside_their_weights():
    assert scale_name("layers.0.attn.wq_a.weight") == "layers.0.attn.wq_a.scale"
    assert official_of("layers.0.attn.wq_a.scale") == "layers.0.attn.wq_a.scale"


def test_two_experts_of_three_rows_packed_by_hand():
    packed = packed_experts("model.layers.7.mlp.experts.gate_up_proj", 2, 6)
    prefix = "layers.7.ffn.experts"
    assert packed == {
        f"{prefix}.0.w1.weight": (0, 3), f"{prefix}.0.w3.weight": (3, 6),
        f"{prefix}.1.w1.weight": (6, 9), f"{prefix}.1.w3.weight": (9, 12),
    }  # fmt: skip
    assert packed_experts("layers.7.mlp.experts.down_proj", 2, 5) == {
        f"{prefix}.0.w2.weight": (0, 5),
        f"{prefix}.1.w2.weight": (5, 10),
    }
    assert packed_experts("layers.7.mlp.gate.weight", 2, 6) == {}


def test_packing_and_taking_apart_agree():
    for part, rows in (("w1", 3), ("w2", 5), ("w3", 3)):
        name = f"layers.4.ffn.experts.2.{part}.weight"
        stored, first, rows_of_expert = packed_name(name, rows)
        assert packed_experts(stored, 6, rows_of_expert)[name] == (first, first + rows)
