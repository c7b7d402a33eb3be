"""config.json written: the layout transformers saves, and a file rewritten with nothing lost."""

import json
from dataclasses import replace

import pytest
import torch
from synthetic_release import RELEASED, release_config
from transformers import DeepseekV4Config

from consilience.conf.errors import ConfigError
from consilience.model.config import FLASH, PRESETS, PRO, TINY, ModelConfig
from consilience.model.config_layouts import rewrite

torch.set_num_threads(1)


@pytest.mark.parametrize("config", [*PRESETS.values(), RELEASED, replace(TINY, rope_factor=1.0)])
def test_the_transformers_layout_is_read_as_the_same_model(config):
    row = json.loads(json.dumps(config.to_transformers_dict()))
    trunk = replace(config, num_nextn_predict_layers=0, mtp_compress_ratios=())
    assert ModelConfig.from_json_dict(row | {"num_nextn_predict_layers": 0}) == trunk
    assert ModelConfig.from_json_dict(row) == config


@pytest.mark.parametrize("config", [FLASH, PRO])
def test_it_is_what_transformers_itself_makes_of_the_released_file(config):
    theirs = DeepseekV4Config(**config.to_json_dict()).to_dict()
    assert theirs.pop("topk_method") == "noaux_tc"  # a word of the released file that it keeps
    assert theirs["rope_parameters"]["compress"].pop("type") == "yarn"  # beside "rope_type"
    assert DeepseekV4Config(**config.to_transformers_dict()).to_dict() == theirs


def test_two_hca_ratios_cannot_be_said_in_it():
    config = replace(TINY, num_hidden_layers=4, compress_ratios=(0, 4, 64, 128))
    with pytest.raises(ConfigError, match=r"one HCA ratio a model, this one has \[64, 128\]"):
        config.to_transformers_dict()


EXTRA = {"use_cache", "ep_size", "transformers_version", "note"}


def test_a_released_file_rewritten_in_its_own_layout_is_the_same_table_in_the_same_order():
    row = release_config()
    assert list(rewrite(row, "official", "fp4", "bfloat16", 1).items()) == list(row.items())


def test_without_quantisation_nothing_says_that_there_is_one():
    row = release_config()
    native = rewrite(row, "native", "bf16", "float32", 1)
    assert native == {k: v for k, v in row.items() if k not in ("quantization_config", "expert_dtype")} | {
        "torch_dtype": "float32"
    }
    assert ModelConfig.from_json_dict(native) == replace(RELEASED, torch_dtype="float32")


def test_a_released_file_comes_back_from_the_native_layout():
    row = release_config()
    back = rewrite(rewrite(row, "native", "bf16", "float32", 1), "official", "fp4", "bfloat16", 1)
    assert back == row


def test_keys_that_mean_nothing_to_the_model_survive_the_other_dialect():
    row = release_config()
    theirs = rewrite(row, "transformers", "bf16", "bfloat16", 0)
    assert {k: theirs[k] for k in EXTRA} == {k: row[k] for k in EXTRA}
    words = {"compress_ratios", "rope_scaling", "torch_dtype", "quantization_config", "expert_dtype"}
    assert not words & theirs.keys() and DeepseekV4Config(**theirs).layer_types[1].startswith("compressed")
    back = rewrite(theirs, "official", "fp4", "bfloat16", 1)
    assert back == row
    assert not {"layer_types", "mlp_layer_types", "compress_rates", "rope_parameters", "dtype"} & back.keys()


def test_the_type_of_the_experts_is_renewed_where_it_stands():
    inside = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    row = release_config(quantization_config=inside)
    changed = rewrite(row, "official", "fp8", "bfloat16", 1)
    assert changed["expert_dtype"] == changed["quantization_config"]["expert_dtype"] == "fp8"
    assert row["quantization_config"]["expert_dtype"] == "fp4"


def test_stages_that_are_not_stored_are_not_announced():
    """DSpark: 3 more ratios, 1 announced block, other tensors under mtp.*: the trunk is what is written."""
    row = release_config()
    row["compress_ratios"] = [*RELEASED.compress_ratios, 0, 0, 0]
    native = rewrite(row, "native", "bf16", "bfloat16", 0)
    assert native["compress_ratios"] == [0, 4, 128, 4] and native["num_nextn_predict_layers"] == 0
