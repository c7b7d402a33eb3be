"""Writing: byte for byte what was read, canonical where it changed, and what others load."""

import json
from dataclasses import replace

import pytest
import torch
import transformers.quantizers.quantizer_finegrained_fp8 as hf_fp8
from safetensors.torch import load_file
from synthetic_release import (
    RELEASED,
    dspark,
    hf_model,
    release_config,
    release_tensors,
    write_folder,
    write_official,
)
from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.config import ModelConfig
from consilience.model.number_formats import decode_mxfp4, encode_fp8, encode_mxfp4
from consilience.model.release import encode_keeping, from_checkpoint, from_model, write_release
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.released_loading import load_released
from consilience.model.shards import INDEX
from consilience.model.tensor_names import Kind, kind_of, packed_name, transformers_of
from consilience.model.transformer import Transformer

torch.set_num_threads(1)
E8M0 = torch.float8_e8m0fnu


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(checkpoint, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = Transformer(checkpoint.config, dtype)
    load_released(model, checkpoint)
    return model


def write(target, source, **settings):
    target.mkdir()
    write_release(target, source, **settings)
    return open_checkpoint(target)


# --- bit for bit ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_shards": 1},
        {"num_shards": 7, "seed": 3},
        {"experts": "fp8", "scale_dtype": torch.float32},
        {"experts": "fp8"},
    ],
)
def test_a_checkpoint_read_into_a_model_and_written_back_is_the_same_files(tmp_path, settings, dtype):
    folder = write_official(tmp_path / "in", **settings)
    checkpoint = open_checkpoint(folder)
    write(tmp_path / "out", from_model(loaded(checkpoint, dtype)), like=checkpoint)
    assert files(tmp_path / "out") == files(folder)


def test_so_is_one_whose_matrices_end_inside_tiles(tmp_path, smallest):
    config = replace(smallest, num_nextn_predict_layers=1, mtp_compress_ratios=(0,), torch_dtype="bfloat16")
    checkpoint = open_checkpoint(write_official(tmp_path / "in", config))
    write(tmp_path / "out", from_model(loaded(checkpoint)), like=checkpoint)
    assert files(tmp_path / "out") == files(tmp_path / "in")


@pytest.mark.parametrize("make", [write_official, dspark])
def test_so_is_one_that_is_converted_to_what_it_is(tmp_path, make):
    make(tmp_path / "in")
    write(tmp_path / "out", from_checkpoint(open_checkpoint(tmp_path / "in")))
    assert files(tmp_path / "out") == files(tmp_path / "in")


def test_stages_of_dspark_are_carried_over(tmp_path):
    checkpoint = open_checkpoint(dspark(tmp_path / "in"))
    assert len(checkpoint.left_out) == 15
    write(tmp_path / "out", from_model(loaded(checkpoint)), like=checkpoint)
    assert files(tmp_path / "out") == files(tmp_path / "in")


def test_what_training_changed_is_encoded_anew_and_the_rest_stays(tmp_path):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    model = loaded(checkpoint)
    changed = "mtp.0.e_proj.weight"
    with torch.no_grad():
        model.mtp[0].e_proj.weight[:128, 128:] += 1.0
    back = write(tmp_path / "out", from_model(model), like=checkpoint)
    scales = [c.read_quantised(changed, 0, 256)[1].float() for c in (checkpoint, back)]
    kept = scales[0] == scales[1]
    assert kept.tolist() == [[True, False], [True, True]]
    block = model.mtp[0].e_proj.weight[:128, 128:].detach()
    codes, scale = encode_fp8(block)
    assert scales[1][0, 1] == scale.float()
    assert back.read(changed, slice(0, 128), slice(128, 256)).equal(codes.float() * scale.float())
    for name in checkpoint.entries:
        if name != changed:
            assert bits(back.read(name)).equal(bits(checkpoint.read(name))), name


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def test_minus_zero_is_not_zero_where_scales_are_kept():
    given = torch.tensor([[2.0**-3]]).to(E8M0)
    values = torch.zeros(2, 32, dtype=torch.bfloat16)
    values[0, 3] = -0.0
    for form, zero in (("fp8", 0x80), ("fp4", 0x80)):
        scale = given if form == "fp8" else given.expand(2, 1).contiguous()
        codes, used = encode_keeping(values, form, scale)
        assert used.float().unique().tolist() == [2.0**-3]
        raw = codes.view(torch.uint8)
        assert raw[0, 3 if form == "fp8" else 1] == zero and raw.count_nonzero() == 1


def test_a_given_scale_that_does_not_hold_a_tile_gives_way_in_that_tile_alone():
    g = torch.Generator().manual_seed(0)
    values = decode_mxfp4(torch.randint(-128, 128, (3, 32), generator=g, dtype=torch.int8),
                          torch.full((3, 2), 2.0**-4).to(E8M0))  # fmt: skip
    given = torch.full((3, 2), 2.0**-4).to(E8M0)
    values[1, 40] = 1.3
    codes, scale = encode_keeping(values, "fp4", given)
    canonical = encode_mxfp4(values)
    assert scale[1, 1].float() == canonical[1][1, 1].float()
    given[1, 1] = scale[1, 1]
    assert scale.float().equal(given.float())
    assert codes[1, 16:].equal(canonical[0][1, 16:])


# --- without a model to be like ---


def test_without_one_scales_are_canonical_and_values_as_near_as_the_format_gets(tmp_path, rough_model):
    model = rough_model(RELEASED)
    found = write(tmp_path / "out", from_model(model), max_shard_bytes=1 << 20)
    assert found.layout == "official" and found.config.expert_dtype == "fp4"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, tensor in to_official(model).items():
        form = found.entries[name].form
        if form == "plain":
            assert found.read(name).equal(tensor.to(found.read(name).dtype)), name
        else:
            codes, scale = (encode_fp8 if form == "fp8" else encode_mxfp4)(tensor)
            stored = found.read_quantised(name, 0, tensor.shape[0])
            assert bits(stored[0]).equal(bits(codes)) and bits(stored[1]).equal(bits(scale)), name
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (
        row["expert_dtype"] == "fp4" and row["quantization_config"] == release_config()["quantization_config"]
    )
    total = sum(
        sum(t.nbytes for t in load_file(f).values()) for f in (tmp_path / "out").glob("*.safetensors")
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": total}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["native", "transformers"])
def test_an_unquantised_layout_holds_the_same_values(tmp_path, layout, dtype):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    found = write(
        tmp_path / "out", from_checkpoint(checkpoint), layout=layout, dtype=dtype, max_shard_bytes=1 << 20
    )
    assert found.layout == layout and found.config.expert_dtype is None
    assert found.config.torch_dtype == str(dtype).removeprefix("torch.")
    trunk = [n for n in checkpoint.entries if layout == "native" or not n.startswith("mtp.")]
    assert list(found.entries) == trunk
    for name in trunk:
        value = found.read(name)
        assert bits(value).equal(bits(checkpoint.read(name, dtype=value.dtype))), name


def test_official_and_native_layout_lead_back_to_each_other(tmp_path):
    """Scales are canonical after that, and the values the same to the bit."""
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    native = write(tmp_path / "native", from_checkpoint(checkpoint), layout="native")
    back = write(tmp_path / "back", from_checkpoint(native), experts="fp4")
    for name in checkpoint.entries:
        if checkpoint.entries[name].form != "fp8":  # random FP8 codes need their own scales
            assert bits(back.read(name)).equal(bits(checkpoint.read(name))), name
    like = tmp_path / "like"
    like.mkdir()
    write_release(like, from_model(loaded(native)), like=checkpoint)
    assert files(like) == files(tmp_path / "in")


def test_keys_of_the_config_that_mean_nothing_here_survive(tmp_path):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    for layout in ("native", "transformers"):
        found = write(tmp_path / layout, from_checkpoint(checkpoint), layout=layout)
        assert {k: found.row[k] for k in ("ep_size", "note", "use_cache")} == {
            "ep_size": 1, "note": "é ü", "use_cache": True,
        }  # fmt: skip


def narrow(tensors):
    """Scales of experts within 2^11 of each other, as QAT leaves them."""
    for name, tensor in tensors.items():
        if ".experts." in name and name.endswith("scale"):
            tensor.view(torch.uint8).clamp_(110, 121)
    return tensors


def test_fp4_experts_become_fp8_without_loss(tmp_path):
    folder = write_folder(tmp_path / "in", narrow(release_tensors()), release_config())
    checkpoint = open_checkpoint(folder)
    found = write(tmp_path / "out", from_checkpoint(checkpoint), experts="fp8")
    assert found.config.expert_dtype == "fp8"
    for name in checkpoint.entries:
        assert bits(found.read(name)).equal(bits(checkpoint.read(name))), name


def test_fp4_experts_that_would_lose_something_are_refused(tmp_path):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    with pytest.raises(
        CheckpointError, match=r"tensor layers.0.ffn.experts.0.w1.weight cannot be stored as fp8.*2\^"
    ):
        write(tmp_path / "out", from_checkpoint(checkpoint), experts="fp8")


def test_experts_can_be_left_as_they_are_in_an_official_folder(tmp_path):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    found = write(tmp_path / "out", from_checkpoint(checkpoint), experts="bf16")
    name = "layers.1.ffn.experts.0.w2.weight"
    assert found.layout == "official" and found.entries[name].form == "plain"
    assert found.read(name).equal(checkpoint.read(name, dtype=torch.bfloat16))
    assert found.row["expert_dtype"] == "bf16" and found.config.expert_dtype is None
    again = write(tmp_path / "again", from_checkpoint(found))
    assert again.entries[name].form == "plain"


def test_values_that_no_format_holds_are_named(tmp_path, rough_model):
    model = rough_model(RELEASED)
    with torch.no_grad():
        model.layers[2].attn.wkv.weight[3, 5] = float("nan")
    with pytest.raises(CheckpointError, match=r"tensor layers.2.attn.wkv.weight cannot be stored as fp8"):
        write(tmp_path / "out", from_model(model))


def test_another_model_is_not_written_like_this_one(tmp_path, rough_model):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    other = rough_model(replace(RELEASED, routed_scaling_factor=9.0))
    with pytest.raises(CheckpointError, match=r"config.json describes another model"):
        write(tmp_path / "out", from_model(other), like=checkpoint)


def test_progress_adds_up_to_the_bytes_written(tmp_path):
    checkpoint = open_checkpoint(write_official(tmp_path / "in"))
    seen = {}
    total = sum(t.nbytes for t in release_tensors().values())

    def count(name, size, of):
        assert of == total
        seen[name] = seen.get(name, 0) + size

    (tmp_path / "out").mkdir()
    write_release(tmp_path / "out", from_checkpoint(checkpoint), on_block=count)
    assert list(seen) == list(checkpoint.entries)
    assert sum(seen.values()) == total


# --- what others load ---


def transformers_loads(folder, dtype=None, **settings):
    model, info = DeepseekV4ForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, attn_implementation="eager", **settings
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("layout", ["transformers", "native"])
def test_transformers_loads_it_and_computes_the_same(tmp_path, rough_model, layout):
    """1e-5 of logits of size about 4: fp32 rounding in another order of summation (specification 0.1).

    The indexer picks every entry: three heads tie at 0 often, and ties are broken differently (5.2).
    """
    config = replace(RELEASED, num_nextn_predict_layers=0, mtp_compress_ratios=(), index_topk=64)
    model = rough_model(config)
    write(tmp_path / "out", from_model(model), layout=layout, dtype=torch.float32, max_shard_bytes=1 << 20)
    theirs = transformers_loads(tmp_path / "out", torch.float32)
    tokens = torch.randint(config.vocab_size, (2, 150), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected = model(tokens), theirs(tokens).logits
    assert expected.abs().max() > 1
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_transformers_saved_comes_back_to_it_unchanged(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "in")
    source = from_checkpoint(open_checkpoint(tmp_path / "in"))
    write(tmp_path / "out", source, layout="transformers", dtype=torch.float32)
    found = transformers_loads(tmp_path / "out", torch.float32)
    expected = model.config.to_dict() | {"num_nextn_predict_layers": 0}  # the file has no such block
    ignored = {"_name_or_path": None}
    assert found.config.to_dict() | ignored == expected | ignored
    for (name, a), b in zip(model.state_dict().items(), found.state_dict().values(), strict=True):
        assert a.equal(b), name


@pytest.mark.parametrize("source", ["released", "ours"])
def test_transformers_decodes_the_official_layout_to_the_same_bits(
    tmp_path, monkeypatch, rough_model, source
):
    # It asks for a package that dequantising never calls.
    monkeypatch.setattr(hf_fp8, "is_accelerate_available", lambda: True)
    if source == "ours":
        checkpoint = write(tmp_path / "out", from_model(rough_model(RELEASED, dtype=torch.bfloat16)))
    else:
        checkpoint = open_checkpoint(write_official(tmp_path / "out"))
    theirs = transformers_loads(tmp_path / "out", quantization_config=FineGrainedFP8Config(dequantize=True))
    state = theirs.state_dict()
    for name, entry in checkpoint.entries.items():
        if name.startswith("mtp."):
            continue
        if kind_of(name) is Kind.EXPERT:
            stored, first, _ = packed_name(name, entry.shape[0])
            found = state[stored].flatten(0, 1)[first : first + entry.shape[0]]
        else:
            found = state[transformers_of(name)]
        assert bits(found).equal(bits(checkpoint.read(name, dtype=found.dtype))), name


@pytest.mark.parametrize("layout", ["official", "native"])
def test_vllm_finds_the_names_types_and_fields_it_reads(tmp_path, layout):
    """vLLM swaps in its own config class: DeepSeek's words, none of transformers' (it refuses those)."""
    hf_model().save_pretrained(tmp_path / "in")
    source = from_checkpoint(open_checkpoint(tmp_path / "in"))
    found = write(tmp_path / "out", source, layout=layout)
    row = json.loads((tmp_path / "out" / "config.json").read_text())
    needed = {"compress_ratios", "num_hash_layers", "topk_method", "qk_rope_head_dim", "rope_scaling"}
    assert needed <= row.keys() and not {"layer_types", "mlp_layer_types", "rope_parameters"} & row.keys()
    assert row["compress_ratios"] == [0, 4, 128, 4] and row["rope_scaling"]["type"] == "yarn"
    assert ("quantization_config" in row) == (layout == "official")
    names = {name for file in (tmp_path / "out").glob("*.safetensors") for name in load_file(file)}
    released = {n for n in release_tensors() if not n.startswith("mtp.")}
    scales = {n for n in released if n.endswith(".scale")}
    assert names == (released if layout == "official" else released - scales)
    assert ModelConfig.from_json_dict(row) == replace(
        found.config, expert_dtype="fp4" if layout == "official" else None
    )
