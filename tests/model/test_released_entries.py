"""A folder that does not fit is refused whole: file, tensor, what was found, what is expected."""

import json

import pytest
import torch
from synthetic_release import release_config, release_tensors, write_folder

from consilience.conf.errors import CheckpointError
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.shards import INDEX, header_bytes

torch.set_num_threads(1)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def change(name, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def drop(name):
    return lambda tensors: tensors.pop(name)


W1 = "layers.1.ffn.experts.2.w1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("layers.1.attn.indexer.compressor.ape"),
         r"index\.json: tensor layers.1.attn.indexer.compressor.ape is missing, .* shape \[4, 64\]"),
        (drop("mtp.0.enorm.weight"), r"tensor mtp.0.enorm.weight is missing"),
        (put("layers.4.attn_norm.weight", torch.ones(256)), "tensor layers.4.attn_norm.weight is unexpected"),
        (put("mtp.1.enorm.weight", torch.ones(256)), "tensor mtp.1.enorm.weight is unexpected"),
        (put("rotary.inv_freq", torch.ones(4)), "tensor rotary.inv_freq is unexpected"),
        (put("norm.weight", torch.ones(255, dtype=torch.bfloat16)),
         r"safetensors: tensor norm.weight has shape \[255\] .*needs \[256\]"),
        (put("head.weight", torch.ones(256, 48)), r"head.weight has shape \[256, 48\] .*needs \[48, 256\]"),
        (change(f"{W1}.weight", lambda t: t[:, :64].contiguous()),
         r"experts.2.w1.weight has shape \[128, 128\] \(two values a byte, as found\).*needs \[128, 256\]"),
        (drop("layers.2.attn.wkv.scale"),
         r"layers.2.attn.wkv.weight \(float8_e4m3fn\) has no scale, expected layers.2.attn.wkv.scale"),
        (drop(f"{W1}.scale"), rf"{W1}.weight \(int8\) has no scale"),
        (drop(f"{W1}.weight"), rf"tensor {W1}.scale is the scale of {W1}.weight, which is missing"),
        (change("layers.2.attn.wkv.scale", lambda t: t.float().to(torch.bfloat16)),
         r"wkv.scale is bfloat16 \[1, 2\], expected float8_e8m0fnu or float32 \[1, 2\]"),
        (change("layers.2.attn.wkv.scale", lambda t: t.view(torch.uint8)), r"wkv.scale is uint8"),
        (change("layers.2.attn.wkv.scale", lambda t: t.T.contiguous()),
         r"wkv.scale is float8_e8m0fnu \[2, 1\], expected .* \[1, 2\]"),
        (change(f"{W1}.scale", lambda t: t.float()), r"w1.scale is float32 \[128, 8\], expected float8_e8m0"),
        (change(f"{W1}.scale", lambda t: t[:1, :2].contiguous()), r"w1.scale is float8_e8m0fnu \[1, 2\]"),
        (change("layers.2.attn.wkv.weight", lambda t: t.float()),
         r"wkv.weight \(float32\) has a scale, expected none"),
        (change("norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
         "norm.weight has type float8_e4m3fn, expected float64 or float32 or bfloat16 or float16"),
        (change("layers.2.attn.wkv.weight", lambda t: t.view(torch.int8)), "wkv.weight has type int8"),
        (change("layers.0.hc_attn_fn", lambda t: t.bfloat16()),
         "hc_attn_fn has type bfloat16, expected float32"),
        (change("layers.0.ffn.gate.tid2eid", lambda t: t.int()), "tid2eid has type int32, expected int64"),
        (change("layers.0.ffn.gate.tid2eid", lambda t: t + 1), "tid2eid has expert ids from 1 to 4, exp"),
        (change("layers.0.ffn.gate.tid2eid", lambda t: t - 1), "tid2eid has expert ids from -1 to 2"),
        (put("model.layers.0.attn.norm.weight", torch.ones(64)),
         r"tensor layers.0.attn.kv_norm.weight|tensor model.layers.0.attn.norm.weight is layers.0"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(tmp_path, damage, message):
    tensors = release_tensors()
    damage(tensors)
    write_folder(tmp_path, tensors, release_config())
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def shard(folder, number=2):
    return folder / f"model-0000{number}-of-00003.safetensors"


def edit_index(folder, edit):
    table = json.loads((folder / INDEX).read_text())
    edit(table["weight_map"])
    (folder / INDEX).write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-1]), "model-00002-of-00003.*truncated"),
        (lambda f: shard(f).unlink(), "model-00002-of-00003.safetensors is missing"),
        (lambda f: edit_index(f, lambda m: m.update({"x": "model-00002-of-00003.safetensors"})),
         "model-00002-of-00003.safetensors: tensor x is missing"),
        (lambda f: edit_index(f, lambda m: m.pop("embed.weight")),
         "model-00001-of-00003.safetensors: tensor embed.weight is not listed"),
        (lambda f: (f / INDEX).unlink(), "index.json is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json cannot be read"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json: .*model_type is missing"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(tmp_path, damage, message):
    write_folder(tmp_path, release_tensors(), release_config())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_type_of_the_experts_that_the_config_denies_is_refused(tmp_path):
    write_folder(tmp_path, release_tensors(), release_config(expert_dtype="fp8"))
    with pytest.raises(
        CheckpointError, match=r"experts.0.w1.weight is fp4, config.json says expert_dtype fp8"
    ):
        open_checkpoint(tmp_path)


def test_experts_of_two_types_are_refused(tmp_path):
    tensors = release_tensors()
    mixed = release_tensors(experts="fp8")
    for part in ("weight", "scale"):
        tensors[f"{W1}.{part}"] = mixed[f"{W1}.{part}"]
    write_folder(tmp_path, tensors, release_config(expert_dtype=None))
    with pytest.raises(CheckpointError, match="is one of experts stored as fp4 and fp8"):
        open_checkpoint(tmp_path)


def test_headers_alone_are_enough_to_refuse(tmp_path):
    """Not one byte of a weight is needed: the shards end after their headers, sparse."""
    tensors = release_tensors()
    tensors["norm.weight"] = torch.ones(3)
    write_folder(tmp_path, tensors, release_config())
    for number in (1, 2, 3):
        path = shard(tmp_path, number)
        size, header = path.stat().st_size, header_bytes(path)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(size)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape"):
        open_checkpoint(tmp_path)
