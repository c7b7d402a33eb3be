"""Released field names, layer schedules and sizes, and what a config refuses."""

import json
from dataclasses import replace

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.model.config import FLASH, PRESETS, PRO, TINY, ModelConfig
from consilience.model.initialize import num_parameters
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


def size(config):
    with torch.device("meta"):
        return num_parameters(Transformer(config))


def test_flash_and_pro_have_exactly_the_published_number_of_parameters():
    trunk = {"num_nextn_predict_layers": 0, "mtp_compress_ratios": ()}
    assert size(replace(FLASH, **trunk)) == 284_332_240_471
    assert size(replace(PRO, **trunk)) == 1_572_997_201_763
    assert size(FLASH) == 290_942_289_362
    assert size(PRO) == 1_598_837_347_742


def test_the_smaller_presets_have_the_sizes_they_promise():
    assert 0.5e9 <= size(PRESETS["small"]) <= 0.56e9
    assert 27e6 <= size(PRESETS["mini"]) <= 33e6
    assert size(PRESETS["tiny"]) <= 500_000


def test_flash_starts_with_two_sliding_layers_and_alternates_from_csa_at_layer_2():
    ratios = FLASH.compress_ratios
    assert len(ratios) == 43 and ratios[:5] == (0, 0, 4, 128, 4) and ratios[-1] == 4
    assert (ratios.count(0), ratios.count(128), ratios.count(4)) == (2, 20, 21)
    assert all(r == (4 if i % 2 == 0 else 128) for i, r in enumerate(ratios) if i >= 2)


def test_pro_starts_with_two_hca_layers_and_has_no_sliding_only_layer():
    ratios = PRO.compress_ratios
    assert len(ratios) == 61 and ratios[:5] == (128, 128, 4, 128, 4) and ratios[-1] == 4
    assert (ratios.count(0), ratios.count(128), ratios.count(4)) == (0, 31, 30)


@pytest.mark.parametrize(
    ("name", "flash", "pro"),
    [
        ("hidden_size", 4096, 7168),
        ("num_attention_heads", 64, 128),
        ("head_dim", 512, 512),
        ("qk_rope_head_dim", 64, 64),
        ("q_lora_rank", 1024, 1536),
        ("o_groups", 8, 16),
        ("o_lora_rank", 1024, 1024),
        ("sliding_window", 128, 128),
        ("index_n_heads", 64, 64),
        ("index_head_dim", 128, 128),
        ("index_topk", 512, 1024),
        ("rope_theta", 10000, 10000),
        ("compress_rope_theta", 160000, 160000),
        ("n_routed_experts", 256, 384),
        ("num_experts_per_tok", 6, 6),
        ("moe_intermediate_size", 2048, 3072),
        ("num_hash_layers", 3, 3),
        ("routed_scaling_factor", 1.5, 2.5),
        ("swiglu_limit", 10.0, 10.0),
        ("hc_mult", 4, 4),
        ("hc_sinkhorn_iters", 20, 20),
        ("num_nextn_predict_layers", 1, 1),
        ("max_position_embeddings", 1048576, 1048576),
        ("vocab_size", 129280, 129280),
    ],
)
def test_released_values(name, flash, pro):
    assert (getattr(FLASH, name), getattr(PRO, name)) == (flash, pro)


def test_every_preset_holds_the_parts_the_demo_must_show():
    for name in ("tiny", "mini", "small"):
        config = PRESETS[name]
        assert {0, 4} < set(config.compress_ratios) and len(config.ratios) == 2, name
        assert 0 < config.num_hash_layers < config.num_hidden_layers, name
        assert config.hc_mult == 4 and config.hc_sinkhorn_iters == 20, name


@pytest.mark.parametrize("name", PRESETS)
def test_config_json_round_trip(name):
    row = json.loads(json.dumps(PRESETS[name].to_json_dict()))
    assert ModelConfig.from_json_dict(row) == PRESETS[name]


def test_config_json_has_the_released_layout():
    row = FLASH.to_json_dict()
    assert row["compress_ratios"] == [0, 0] + [4, 128] * 20 + [4, 0]  # the last is the MTP block's
    assert row["rope_scaling"] == {
        "type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    }
    fixed = {"model_type": "deepseek_v4", "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc"}
    assert fixed.items() <= row.items() and row["tie_word_embeddings"] is False
    assert not {"rope_factor", "mtp_compress_ratios", "expert_dtype"} & row.keys()
    assert replace(FLASH, expert_dtype="fp4").to_json_dict()["expert_dtype"] == "fp4"


def test_fields_of_the_released_file_that_mean_nothing_here_are_passed_over():
    row = FLASH.to_json_dict() | {"quantization_config": {"fmt": "e4m3"}, "use_cache": True}
    assert ModelConfig.from_json_dict(row) == FLASH


@pytest.mark.parametrize("name", ["hidden_size", "compress_ratios", "num_hidden_layers", "index_topk"])
def test_a_missing_field_is_named(name):
    row = TINY.to_json_dict()
    del row[name]
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_json_dict(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 5}, "entries for 5 layers"),
        ({"num_attention_heads": 5}, "no multiple of o_groups"),
        ({"qk_rope_head_dim": 7}, "must be even"),
        ({"qk_rope_head_dim": 0}, "qk_rope_head_dim is 0"),
        ({"qk_rope_head_dim": 64}, "at most head_dim"),
        ({"head_dim": 33}, "head_dim 33"),
        ({"index_head_dim": 17}, "index_head_dim 17"),
        ({"index_head_dim": 8}, "smaller than qk_rope_head_dim"),
        ({"num_experts_per_tok": 9}, "exceeds n_routed_experts"),
        ({"num_key_value_heads": 2}, "V4 shares one"),
        ({"compress_ratios": (0, 4, 1, 4)}, "0 or at least 2"),
        ({"compress_ratios": (0, 4, -4, 4)}, "0 or at least 2"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"hc_sinkhorn_iters": 0}, "hc_sinkhorn_iters is 0"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
    ],
)
def test_a_config_that_no_model_can_have_is_refused(change, message):
    config = replace(
        TINY, compress_ratios=(0, 4, 128, 4), num_hidden_layers=4, head_dim=32, qk_rope_head_dim=16
    )
    config = replace(config, index_head_dim=16, num_attention_heads=4, o_groups=2, n_routed_experts=8)
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)
