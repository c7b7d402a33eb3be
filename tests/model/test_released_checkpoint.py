"""Reading: every layout under one set of names, values exact, parts equal to the whole's."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from synthetic_release import (
    RELEASED,
    dspark,
    hf_model,
    release_config,
    release_tensors,
    write_folder,
    write_official,
)

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import expected_shapes, to_official
from consilience.model.config import FLASH
from consilience.model.digest import weights_digest
from consilience.model.release_plan import plan_slots, shard_slots
from consilience.model.released_checkpoint import TensorsOnDisk, blocks_of, find_tensor, open_checkpoint
from consilience.model.shards import INDEX, ShardWriter, read_rows
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint

torch.set_num_threads(1)

FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def decoded(tensors, name):
    """The values in fp64 by the definition: code times the scale of its tile, element by element."""
    codes, scale = tensors[name], tensors[name.removesuffix("weight") + "scale"].double()
    if codes.dtype == torch.int8:
        low, high = (codes.view(torch.uint8).long() >> shift & 15 for shift in (0, 4))
        values, tile = FP4[torch.stack([low, high], -1)].flatten(1), (1, 32)
    else:
        values, tile = codes.double(), (128, 128)
    rows, columns = (torch.arange(size) // side for size, side in zip(values.shape, tile))
    return values * scale[rows][:, columns]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = write_official(tmp_path_factory.mktemp("official"))
    return folder, release_tensors()


def test_every_tensor_has_exactly_the_stored_values(official):
    folder, tensors = official
    checkpoint = open_checkpoint(folder)
    assert checkpoint.layout == "official" and not checkpoint.left_out
    assert checkpoint.config == replace(RELEASED, expert_dtype="fp4")
    assert list(checkpoint.entries) == list(expected_shapes(RELEASED))
    for name, entry in checkpoint.entries.items():
        if entry.scale is None:
            assert bits(checkpoint.read(name)).equal(bits(tensors[name])), name
            continue
        for dtype in (torch.float32, torch.bfloat16):
            expected = decoded(tensors, name).to(dtype)
            assert bits(checkpoint.read(name, dtype=dtype)).equal(bits(expected)), name


def test_a_code_by_hand(tmp_path):
    tensors = release_tensors()
    name = "layers.0.ffn.experts.0.w2"
    tensors[f"{name}.weight"].view(torch.uint8)[3, 16] = 0x9F  # inputs 32 and 33: -6 and -0.5
    tensors[f"{name}.scale"].view(torch.uint8)[3, 1] = 120  # 2^-7
    tensors["mtp.0.h_proj.weight"].view(torch.uint8)[200, 130] = 0x01  # the smallest denormal, 2^-9
    tensors["mtp.0.h_proj.scale"].view(torch.uint8)[1, 1] = 117  # 2^-10
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, release_config()))
    row = checkpoint.read(f"{name}.weight", slice(3, 4))
    assert row[0, 32:34].tolist() == [-6 * 2.0**-7, -0.5 * 2.0**-7]
    assert checkpoint.read("mtp.0.h_proj.weight")[200, 130] == 2.0**-19


@pytest.mark.parametrize(
    "name",
    ["mtp.0.h_proj.weight", "layers.1.ffn.experts.1.w1.weight", "head.weight", "layers.2.attn.wkv.weight"],
)
def test_rows_and_columns_are_those_of_the_whole_also_inside_a_tile(official, name):
    checkpoint = open_checkpoint(official[0])
    whole = checkpoint.read(name)
    cuts = [slice(0, 0), slice(3, 40), slice(None, 128), slice(128, None), slice(127, 130), slice(-5, None)]
    for rows in cuts:
        for columns in (None, slice(0, 128), slice(128, 256), slice(33, 161), slice(-1, None)):
            expected = whole[rows] if columns is None else whole[rows, columns]
            assert bits(checkpoint.read(name, rows, columns)).equal(bits(expected)), (rows, columns)


def test_blocks_cover_a_tensor_on_borders_of_tiles():
    assert list(blocks_of((300, 1 << 15))) == [(0, 128), (128, 256), (256, 300)]
    assert list(blocks_of((129280, 4096)))[:2] == [(0, 512), (512, 1024)]
    assert list(blocks_of((5,))) == [(0, 5)]
    assert list(blocks_of((300, 1 << 30))) == [(0, 128), (128, 256), (256, 300)]


def test_base_checkpoints_have_fp8_experts_with_scales_in_float32(tmp_path):
    write_official(tmp_path, experts="fp8", scale_dtype=torch.float32)
    tensors = release_tensors(experts="fp8", scale_dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.expert_dtype == "fp8"
    name = "layers.3.ffn.experts.3.w2.weight"
    assert checkpoint.read(name, dtype=torch.bfloat16).double().equal(decoded(tensors, name))


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_where_the_config_does_not_say_how_experts_are_stored_the_tensors_do(tmp_path, experts):
    row = release_config()
    del row["expert_dtype"]
    write_folder(tmp_path, release_tensors(experts=experts), row)
    assert open_checkpoint(tmp_path).config.expert_dtype == experts


def test_a_scale_that_is_not_a_number_is_named(tmp_path):
    tensors = release_tensors()
    tensors["layers.2.attn.wkv.scale"].view(torch.uint8)[0, 1] = 0xFF
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, release_config()))
    checkpoint.read("layers.2.attn.wkv.weight", columns=slice(0, 128))
    with pytest.raises(CheckpointError, match=r"model-0000\d-.*: tensor layers.2.attn.wkv.scale: .*scale"):
        checkpoint.read("layers.2.attn.wkv.weight")


def test_a_file_without_mtp_tensors_is_the_trunk(tmp_path):
    tensors = {n: t for n, t in release_tensors().items() if not n.startswith("mtp.")}
    checkpoint = open_checkpoint(write_folder(tmp_path, tensors, release_config()))
    assert checkpoint.config.num_nextn_predict_layers == 0
    assert not any(name.startswith("mtp.") for name in checkpoint.entries)


def test_of_dspark_the_trunk_is_read_and_the_stages_are_left_out(tmp_path):
    checkpoint = open_checkpoint(dspark(tmp_path))
    assert checkpoint.config.num_nextn_predict_layers == 0
    assert sorted(t.name for t in checkpoint.left_out) == sorted(
        f"mtp.{s}.{n}" for s in range(3)
        for n in ("attn.wkv.scale", "attn.wkv.weight", "confidence", "main_proj.scale", "main_proj.weight")
    )  # fmt: skip
    assert checkpoint.read("norm.weight").shape == (256,)


def test_the_released_flash_file_by_file(tmp_path):
    """Listing of the real one: 69,187 tensors in 46 shards, 159.6 GB. Headers are real, contents sparse."""
    slots = plan_slots(expected_shapes(FLASH), "official", "fp4", torch.bfloat16, None)
    writer = ShardWriter(tmp_path)
    for file_name, tensors in shard_slots(slots, 3_500_000_000):
        writer.lay_out(file_name, tensors)
    assert len(writer.weight_map) == 69_187 and len(set(writer.weight_map.values())) == 46
    assert f"{writer.total_bytes / 1e9:.1f}" == "159.6"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": writer.weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(FLASH.to_json_dict()))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == replace(FLASH, expert_dtype="fp4") and not checkpoint.left_out
    last = checkpoint.read("mtp.0.ffn.experts.255.w2.weight", slice(4000, 4096))
    assert last.shape == (96, 2048) and not last.any()


def assert_is(checkpoint, model):
    """Every tensor of the checkpoint is the one of transformers' module, found by hand for each kind."""
    layer, csa = model.model.layers[0], model.model.layers[1].self_attn
    trunk = replace(RELEASED, num_nextn_predict_layers=0, mtp_compress_ratios=())
    assert checkpoint.layout == "transformers" and list(checkpoint.entries) == list(expected_shapes(trunk))
    inner = RELEASED.moe_intermediate_size
    for name, expected in {
        "embed.weight": model.model.embed_tokens.weight,
        "head.weight": model.lm_head.weight,
        "hc_head_scale": model.model.hc_head.hc_scale,
        "layers.0.hc_attn_fn": layer.attn_hc.fn,
        "layers.0.attn.kv_norm.weight": layer.self_attn.kv_norm.weight,
        "layers.1.attn.compressor.ape": csa.compressor.position_bias,
        "layers.1.attn.indexer.compressor.wgate.weight": csa.compressor.indexer.gate_proj.weight,
        "layers.0.ffn.gate.tid2eid": layer.mlp.gate.tid2eid,
        "layers.0.ffn.shared_experts.w3.weight": layer.mlp.shared_experts.up_proj.weight,
        "layers.0.ffn.experts.2.w1.weight": layer.mlp.experts.gate_up_proj[2, :inner],
        "layers.0.ffn.experts.2.w3.weight": layer.mlp.experts.gate_up_proj[2, inner:],
        "layers.0.ffn.experts.3.w2.weight": layer.mlp.experts.down_proj[3],
    }.items():
        assert checkpoint.read(name).equal(expected), name
    assert checkpoint.read("layers.0.ffn.experts.2.w3.weight", slice(5, 9), slice(7, 11)).equal(
        layer.mlp.experts.gate_up_proj[2, inner + 5 : inner + 9, 7:11]
    )


@pytest.mark.parametrize("max_shard_size", ["50GB", "1MB"])
def test_what_transformers_saves_is_read_under_the_released_names(tmp_path, max_shard_size):
    model = hf_model()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "50GB")
    checkpoint = open_checkpoint(tmp_path)
    assert_is(checkpoint, model)
    assert checkpoint.config == replace(
        RELEASED, num_nextn_predict_layers=0, mtp_compress_ratios=(), torch_dtype="float32"
    )


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_transformers_own_module_names_are_read_with_and_without_prefix(tmp_path, prefix):
    model = hf_model()
    state = {n.replace("model.", prefix, 1): t.clone() for n, t in model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    assert_is(open_checkpoint(tmp_path), model)


def test_a_transformers_model_that_was_cast_as_a_whole_is_read_too(tmp_path):
    model = hf_model(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.read("layers.0.hc_attn_fn").dtype == torch.bfloat16
    assert_is(checkpoint, model)


def test_what_training_saves_is_the_native_layout(tmp_path, rough_model):
    model = rough_model(RELEASED)
    save_checkpoint(tmp_path / "saved", model, None, CheckpointMeta("base", 0, 0), max_shard_bytes=1 << 20)
    checkpoint = open_checkpoint(tmp_path / "saved")
    assert checkpoint.layout == "native" and checkpoint.config == replace(RELEASED, torch_dtype="float32")
    for name, tensor in to_official(model).items():
        assert checkpoint.read(name).equal(tensor), name


def test_a_tensor_under_two_names_is_refused(tmp_path):
    model = hf_model()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    state["embed.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"tensor \S+ is embed.weight again, which model.safetensors has as"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("num_shards", [1, 3])
def test_one_tensor_is_found_by_its_official_name_in_any_layout(tmp_path, num_shards):
    official = write_official(tmp_path / "official", num_shards=num_shards)
    theirs = hf_model()
    theirs.save_pretrained(tmp_path / "transformers", max_shard_size="50MB" if num_shards == 1 else "300KB")
    head = theirs.lm_head.weight
    assert read_rows(find_tensor(tmp_path / "transformers", "head.weight")).equal(head)
    assert find_tensor(official, "head.weight") == open_checkpoint(official).entries["head.weight"].payload
    with pytest.raises(CheckpointError, match=r"safetensors.*: tensor nothing is missing"):
        find_tensor(official, "nothing")


def test_one_tensor_needs_its_own_shard_only(tmp_path):
    folder = write_official(tmp_path / "official")
    where = find_tensor(folder, "head.weight").file
    for shard in set(folder.glob("*.safetensors")) - {where}:
        shard.unlink()
    assert find_tensor(folder, "head.weight").file == where
    where.unlink()
    with pytest.raises(CheckpointError, match=f"{where.name} is missing"):
        find_tensor(folder, "head.weight")


def test_tensors_on_disk_are_those_in_memory(official):
    checkpoint = open_checkpoint(official[0])
    in_memory = {name: checkpoint.read(name) for name in checkpoint.entries}
    assert weights_digest(TensorsOnDisk(checkpoint)) == weights_digest(in_memory)
    halves = dict.fromkeys(checkpoint.entries, torch.bfloat16)
    found = TensorsOnDisk(checkpoint, halves)
    assert len(found) == len(in_memory)
    assert all(t.equal(in_memory[name].bfloat16()) for name, t in found.items())
