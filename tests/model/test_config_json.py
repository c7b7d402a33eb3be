"""config.json of every family: what is read, and what is refused instead of guessed (specification 1)."""

from dataclasses import replace

import pytest
import torch
from transformers import DeepseekV4Config

from consilience.conf.errors import ConfigError
from consilience.model.config import FLASH, PRO, TINY, ModelConfig
from consilience.model.config_json import read_expert_dtype, read_fields

torch.set_num_threads(1)

# The fields of the released Flash file as table 1.1 lists them, typed in by hand.
FLASH_FILE = {
    "architectures": ["DeepseekV4ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 1, "hc_eps": 1e-06, "hc_mult": 4, "hc_sinkhorn_iters": 20,
    "head_dim": 512, "hidden_act": "silu", "hidden_size": 4096, "index_head_dim": 128, "index_n_heads": 64,
    "index_topk": 512, "initializer_range": 0.02, "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4", "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 64, "num_experts_per_tok": 6,
    "num_hash_layers": 3, "num_hidden_layers": 43, "num_key_value_heads": 1, "num_nextn_predict_layers": 1,
    "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 16, "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000, "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "sliding_window": 128,
    "swiglu_limit": 10.0, "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1", "use_cache": True, "vocab_size": 129280, "compress_rope_theta": 160000,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
}  # fmt: skip


def flash(**changes):
    row = FLASH_FILE | changes
    return {name: value for name, value in row.items() if value is not ...}


def nested(**changes):
    """`flash()` with RoPE as transformers rewrites it."""
    main = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.125}
    compress = FLASH_FILE["rope_scaling"] | {
        "rope_type": "yarn", "rope_theta": 160000.0, "partial_rotary_factor": 0.125, "attention_factor": 1.0,
    }  # fmt: skip
    parameters = {"main": main, "compress": compress | changes}
    return flash(rope_scaling=..., rope_theta=..., compress_rope_theta=..., rope_parameters=parameters)


def test_the_early_flash_file_without_expert_dtype_is_the_flash_preset():
    config = ModelConfig.from_json_dict(FLASH_FILE)
    assert config == FLASH and config.expert_dtype is None


@pytest.mark.parametrize("dtype", ["fp4", "fp8"])
def test_the_type_of_the_experts_lies_at_the_top_or_in_the_quantisation(dtype):
    assert ModelConfig.from_json_dict(flash(expert_dtype=dtype)) == replace(FLASH, expert_dtype=dtype)
    inside = FLASH_FILE["quantization_config"] | {"expert_dtype": dtype}
    assert read_expert_dtype({"quantization_config": inside}) == dtype
    assert read_expert_dtype({"quantization_config": inside, "expert_dtype": dtype}) == dtype
    assert read_expert_dtype({"expert_dtype": None, "quantization_config": None}) is None


def test_the_toy_defaults_of_the_release_code_do_not_get_in():
    """7 layers, factor 40, theta 40000: its ModelArgs. Ours come from the file or there is an error."""
    config = ModelConfig.from_json_dict(FLASH_FILE)
    assert (config.num_hidden_layers, config.rope_factor, config.compress_rope_theta) == (43, 16.0, 160000.0)
    with pytest.raises(ConfigError, match="compress_rope_theta is missing"):
        ModelConfig.from_json_dict(flash(compress_rope_theta=...))


@pytest.mark.parametrize(
    "name",
    [n for n in FLASH_FILE if isinstance(FLASH_FILE[n], int | float) and n not in (
        "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "initializer_range",
        "norm_topk_prob", "num_key_value_heads", "num_nextn_predict_layers", "tie_word_embeddings",
        "use_cache",
    )],
)  # fmt: skip
def test_a_number_that_decides_arithmetic_is_never_filled_in(name):
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_json_dict(flash(**{name: ...}))
    with pytest.raises(ConfigError, match=name):
        ModelConfig.from_json_dict(flash(**{name: "many"}))


def test_without_the_layer_pattern_there_is_an_error_and_no_guess():
    with pytest.raises(ConfigError, match=r"compress_ratios \(or layer_types\) is missing; .*never guessed"):
        ModelConfig.from_json_dict(flash(compress_ratios=...))
    with pytest.raises(ConfigError, match="num_hash_layers or mlp_layer_types is missing"):
        ModelConfig.from_json_dict(flash(num_hash_layers=...))


def test_without_a_scaling_there_is_no_yarn():
    for scaling in (..., None, {}, {"rope_type": "default"}):
        assert ModelConfig.from_json_dict(flash(rope_scaling=scaling)).rope_factor == 1.0


def test_yarn_of_the_file_wins_over_the_preset_s():
    scaling = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 4096}
    config = ModelConfig.from_json_dict(flash(rope_scaling=scaling))
    yarn = (config.rope_factor, config.rope_original_length, config.rope_beta_fast, config.rope_beta_slow)
    assert yarn == (8.0, 4096, 32.0, 1.0)


def test_rope_as_transformers_rewrites_it_is_the_same_model():
    assert ModelConfig.from_json_dict(nested()) == FLASH
    flat = FLASH_FILE["rope_scaling"] | {"rope_type": "yarn"}
    assert ModelConfig.from_json_dict(flash(rope_scaling=..., rope_parameters=flat)) == FLASH
    assert ModelConfig.from_json_dict(flash(rope_parameters=flat)) == FLASH


@pytest.mark.parametrize(("extra", "num_mtp"), [([], 0), ([0], 1), ([0], 0), ([0, 0], 2)])
def test_ratios_of_the_trunk_and_of_the_mtp_blocks_are_told_apart(extra, num_mtp):
    ratios = FLASH_FILE["compress_ratios"][:43] + extra
    config = ModelConfig.from_json_dict(flash(compress_ratios=ratios, num_nextn_predict_layers=num_mtp))
    assert config.compress_ratios == FLASH.compress_ratios
    assert (config.num_nextn_predict_layers, config.mtp_compress_ratios) == (num_mtp, (0,) * num_mtp)


def test_a_file_without_ratios_for_its_mtp_block_has_ratio_0_there():
    config = ModelConfig.from_json_dict(flash(compress_ratios=FLASH_FILE["compress_ratios"][:43]))
    assert config == FLASH


def test_of_dspark_with_46_ratios_the_trunk_is_read():
    ratios = [*FLASH.compress_ratios, 0, 0, 0]
    config = ModelConfig.from_json_dict(flash(compress_ratios=ratios))
    assert config == replace(FLASH, num_nextn_predict_layers=0, mtp_compress_ratios=())


def test_what_transformers_saves_is_read_as_the_same_model():
    for ours in (replace(FLASH, torch_dtype="float32"), replace(PRO, torch_dtype="float32")):
        saved = DeepseekV4Config(**ours.to_json_dict()).to_dict() | {"dtype": "float32"}
        assert "compress_ratios" not in saved and "rope_scaling" not in saved
        assert ModelConfig.from_json_dict(saved) == ours


def test_the_width_of_rope_is_given_as_channels_or_as_a_share():
    assert ModelConfig.from_json_dict(flash(qk_rope_head_dim=..., partial_rotary_factor=0.125)) == FLASH
    with pytest.raises(ConfigError, match="qk_rope_head_dim is 64, partial_rotary_factor makes it 128"):
        ModelConfig.from_json_dict(flash(partial_rotary_factor=0.25))
    with pytest.raises(ConfigError, match=r"qk_rope_head_dim .* is missing"):
        ModelConfig.from_json_dict(flash(qk_rope_head_dim=...))


def layers(names, rates=None, **changes):
    rates = rates or {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    return flash(
        num_hidden_layers=len(names), num_hash_layers=1, compress_ratios=..., compress_rates=rates,
        layer_types=[{"s": "sliding_attention", "c": "compressed_sparse_attention",
                      "h": "heavily_compressed_attention"}.get(n, n) for n in names],
    ) | changes  # fmt: skip


def test_layers_by_name():
    config = ModelConfig.from_json_dict(layers("schc"))
    assert config.compress_ratios == (0, 4, 128, 4)
    wide = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 64}
    assert ModelConfig.from_json_dict(layers("hc", wide)).compress_ratios == (64, 4)
    both = ModelConfig.from_json_dict(layers("sch") | {"compress_ratios": [0, 4, 128, 0]})
    assert (both.compress_ratios, both.num_nextn_predict_layers) == ((0, 4, 128), 1)
    kinds = layers("sch", mlp_layer_types=["hash_moe", "hash_moe", "moe"])
    kinds.pop("num_hash_layers")
    assert ModelConfig.from_json_dict(kinds).num_hash_layers == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (flash(scoring_func="sigmoid"), "scoring_func is 'sigmoid', V4 has only 'sqrtsoftplus'"),
        (flash(topk_method="group_limited_greedy"), "topk_method"),
        (flash(hidden_act="gelu"), "hidden_act"),
        (flash(tie_word_embeddings=True), "tie_word_embeddings"),
        (flash(norm_topk_prob=False), "norm_topk_prob"),
        (flash(attention_bias=True), "attention_bias"),
        (flash(mlp_bias=True), "mlp_bias"),
        (flash(attention_dropout=0.1), "attention_dropout"),
        (flash(model_type="deepseek_v41"), "model_type is 'deepseek_v41'"),
        (flash(model_type=...), "model_type is missing; .*inference/config.json is the release code's own"),
        (flash(num_key_value_heads=8), "V4 shares one"),
        (flash(expert_dtype="int4"), "expert_dtype is 'int4'; allowed are fp4, fp8, bf16"),
        (
            flash(expert_dtype="fp4", quantization_config={"expert_dtype": "fp8"}),
            r"expert_dtype is \['fp4', 'fp8'\] at once",
        ),
        (
            flash(quantization_config={"weight_block_size": [32, 32]}),
            r"weight_block_size is \[32, 32\], V4 has \[128, 128\]",
        ),
        (flash(quantization_config={"quant_method": "gptq"}), "quant_method is 'gptq'"),
        (flash(compress_ratios=[0, 0, 4]), "compress_ratios has 3 entries for 43 layers"),
        (flash(num_nextn_predict_layers=2), "compress_ratios has 1 entries for 2 MTP blocks"),
        (flash(compress_ratios=[*FLASH.compress_ratios, 4]), "gives the MTP block ratio 4"),
        (flash(compress_ratios="0,4"), "compress_ratios must be a list"),
        (flash(hidden_size=4096.5), "hidden_size is 4096.5, a whole number is needed"),
        (flash(hidden_size=True), "hidden_size is True"),
        (flash(eos_token_id=[1, 2]), r"eos_token_id is \[1, 2\], a whole number"),
        (flash(torch_dtype="int8"), "torch_dtype is 'int8'"),
        (flash(rope_scaling={"type": "linear", "factor": 4}), "of type 'linear'"),
        (flash(rope_scaling={"type": "yarn", "factor": 4}), "original_max_position_embeddings is missing"),
        (flash(rope_scaling=FLASH_FILE["rope_scaling"] | {"mscale": 0.7}), "mscale 0.7; V4 does not scale"),
        (flash(rope_parameters={"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 9}),
         "describe different tables"),
        (nested(attention_factor=1.277), "attention_factor 1.277; V4 does not scale"),
        (nested(partial_rotary_factor=0.5), "partial_rotary_factor is not 0.125"),
        (nested() | {"rope_theta": 5.0}, "rope_theta is 5.0 at the top and 10000.0 in rope_parameters"),
        (layers("sxc"), "layer_types names 'x' without a rate"),
        (layers("schc", num_hidden_layers=3), "layer_types has 4 entries; 3 of"),
        (layers("sch", compress_rates=None), "without a rate"),
        (layers("sch", {"compressed_sparse_attention": 8}), "layer_types names 'heavily"),
        (layers("sc", {"compressed_sparse_attention": 8}), "ratio 4 is CSA's"),
        (layers("sh", {"heavily_compressed_attention": 4}), "ratio 4 is CSA's"),
        (layers("sch") | {"compress_ratios": [0, 128, 4]}, "describe different layers"),
        (layers("sch", num_hash_layers=None), "num_hash_layers"),
    ],
)  # fmt: skip
def test_what_is_not_v4_is_refused_with_the_field_s_name(row, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json_dict(row)


def test_hash_layers_come_first():
    row = layers("sch", mlp_layer_types=["moe", "hash_moe", "moe"])
    row.pop("num_hash_layers")
    with pytest.raises(ConfigError, match="V4 has hash_moe in the first layers"):
        ModelConfig.from_json_dict(row)


def test_the_fields_are_those_of_the_config_and_nothing_else():
    assert ModelConfig(**read_fields(TINY.to_json_dict())) == TINY
