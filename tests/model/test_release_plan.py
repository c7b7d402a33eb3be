"""What is stored under which name, in which form and file."""

import pytest
import torch
from synthetic_release import RELEASED, release_tensors, write_official

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import expected_shapes
from consilience.model.release_plan import plan_slots, shard_slots
from consilience.model.released_checkpoint import open_checkpoint

torch.set_num_threads(1)
SHAPES = expected_shapes(RELEASED)
BF16, FP32 = torch.bfloat16, torch.float32
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def stored(layout, experts, dtype=BF16, like=None):
    found = {}
    for slot in plan_slots(SHAPES, layout, experts, dtype, like).values():
        found |= slot.tensors()
    return found


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_the_official_layout_has_the_tensors_of_the_released_files(experts):
    tensors = release_tensors(experts=experts)
    assert stored("official", experts) == {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}


def test_a_few_by_hand():
    official = stored("official", "fp4")
    assert official["layers.1.ffn.experts.3.w1.weight"] == (torch.int8, (128, 128))
    assert official["layers.1.ffn.experts.3.w1.scale"] == (E8M0, (128, 8))
    assert official["mtp.0.e_proj.scale"] == (E8M0, (2, 2))
    assert official["layers.0.hc_attn_fn"] == (FP32, (24, 1024))
    assert official["layers.0.ffn.gate.tid2eid"] == (torch.int64, (48, 2))
    assert stored("official", "bf16")["layers.1.ffn.experts.3.w1.weight"] == (BF16, (128, 256))
    native = stored("native", "bf16", FP32)
    assert native["layers.1.attn.wkv.weight"] == (FP32, (64, 256))
    assert len(native) == len(SHAPES)
    theirs = stored("transformers", "bf16")
    assert theirs["model.layers.1.mlp.experts.gate_up_proj"] == (BF16, (4, 256, 256))
    assert theirs["model.layers.1.mlp.experts.down_proj"] == (BF16, (4, 256, 128))
    assert theirs["model.layers.1.self_attn.sinks"] == (FP32, (4,))
    assert not any("mtp" in name for name in theirs)


def test_scales_keep_the_type_of_the_file_they_come_from(tmp_path):
    like = open_checkpoint(write_official(tmp_path, experts="fp8", scale_dtype=FP32))
    assert stored("official", "fp8", like=like)["layers.1.attn.wkv.scale"] == (FP32, (1, 2))
    assert stored("official", "fp4", like=like)["layers.1.ffn.experts.0.w1.scale"] == (E8M0, (128, 8))


@pytest.mark.parametrize(("layout", "experts"), [("gguf", "fp4"), ("official", "int4")])
def test_what_does_not_exist_is_refused(layout, experts):
    with pytest.raises(CheckpointError, match=rf"layout {layout} with {experts} experts does not exist"):
        plan_slots(SHAPES, layout, experts, BF16, None)


@pytest.mark.parametrize("layout", ["official", "transformers"])
@pytest.mark.parametrize("max_shard_bytes", [1, 300_000, 1 << 30])
def test_files_hold_everything_once_within_the_limit(layout, max_shard_bytes):
    slots = plan_slots(SHAPES, layout, "fp4", BF16, None)
    files = dict(shard_slots(slots, max_shard_bytes))
    names = [name for tensors in files.values() for name in tensors]
    assert sorted(names) == sorted(stored(layout, "fp4")) and len(names) == len(set(names))
    for number, (file, tensors) in enumerate(files.items(), 1):
        assert file == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
        assert size <= max_shard_bytes or len({name.rpartition(".")[0] for name in tensors}) == 1
        assert all(
            n.removesuffix("scale") + "weight" in tensors
            for n in tensors
            if n.endswith(".scale") and "hc" not in n
        )
    assert (len(files) == 1) == (max_shard_bytes == 1 << 30)
