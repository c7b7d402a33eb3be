"""`consilience convert`: what it writes, what it says, what it refuses, and that it leaves no half."""

import json
import re
import resource
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from synthetic_release import RELEASED, dspark, hf_model, release_tensors, write_official

from consilience.cli.main import main
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.released_checkpoint import open_checkpoint
from consilience.rollout.tokenizer import Tokenizer
from consilience.teachers.admission import read_speech
from consilience.teachers.heads import read_digests
from consilience.teachers.registry import TeacherRecord
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, save_checkpoint

torch.set_num_threads(1)


@pytest.fixture
def source(tmp_path):
    folder = write_official(tmp_path / "source")
    Tokenizer.train(["one two three"], 400).save(folder / "tokenizer.json")
    (folder / "generation_config.json").write_text("{}")
    (folder / "LICENSE").write_text("MIT")
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text("REASONING_EFFORT_MAX = ''")
    (folder / "inference").mkdir()
    (folder / "inference" / "model.py").write_text("")
    (folder / "pytorch_model.bin").write_text("old")
    (folder / ".hidden").write_text("")
    return folder


def convert(*words):
    return main(["convert", "log.progress=lines", *words])


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_same_layout_is_the_same_files_with_what_belongs_to_them(source, tmp_path, capsys):
    target = tmp_path / "target"
    assert convert(f"source={source}", f"target={target}") == 0
    left = {"inference/model.py", "pytorch_model.bin", ".hidden"}
    assert files(target) == {name: data for name, data in files(source).items() if name not in left}
    said = capsys.readouterr()
    assert f"{source}: 203 tensors, official layout, fp4 experts" in said.out
    assert f"official checkpoint: {target}" in said.out
    size = sum(t.nbytes for t in release_tensors().values()) / 1e9
    assert f"convert: 203/203 tensors, GB {size:.3g} of {size:.3g}" in said.err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_the_native_layout_is_a_checkpoint_of_ours(source, tmp_path):
    target = tmp_path / "native"
    assert convert(f"source={source}", f"target={target}", "layout=native", "dtype=float32") == 0
    model, meta = load_checkpoint(target)
    assert meta.stage == "released" and meta.digest == weights_digest(to_official(model))
    released = open_checkpoint(source)
    assert all(t.equal(released.read(n, dtype=t.dtype)) for n, t in to_official(model).items())
    assert model.config == replace(RELEASED, torch_dtype="float32") and len(model.mtp) == 1
    tokenizer = Tokenizer.load(target)
    assert meta.special_tokens == dict(tokenizer.special_ids)
    assert read_speech(target).declared_tokens == meta.special_tokens
    assert read_digests(TeacherRecord("t", target, ("math",))).weights == meta.digest
    assert "tokenizer.json" in meta.files and not any(
        "safetensors" in name for name in meta.files if "index" not in name
    )


def test_a_checkpoint_of_ours_becomes_a_released_one_and_keeps_what_did_not_change(source, tmp_path):
    model, _ = load_checkpoint(source)
    with torch.no_grad():
        model.head.weight += 1
    trained = tmp_path / "trained"
    save_checkpoint(trained, model, source / "tokenizer.json", CheckpointMeta("sft", 0, 1))
    target = tmp_path / "target"
    assert convert(f"source={trained}", f"target={target}", f"like={source}") == 0
    changed = {name for name, data in files(target).items() if files(source).get(name) != data}
    assert changed == {open_checkpoint(target).entries["head.weight"].payload.file.name}
    assert open_checkpoint(target).read("head.weight").equal(model.head.weight)
    assert "consilience.json" not in files(target)


def test_a_folder_of_transformers_becomes_a_released_one(tmp_path):
    hf_model().save_pretrained(tmp_path / "source")
    target = tmp_path / "target"
    words = [f"source={tmp_path / 'source'}", f"target={target}", "experts=fp8", "max_shard_bytes=1000000"]
    assert convert(*words) == 0
    found = open_checkpoint(target)
    assert (found.layout, found.config.expert_dtype) == ("official", "fp8")
    assert json.loads((target / "config.json").read_text())["expert_dtype"] == "fp8"
    assert max(p.stat().st_size for p in target.glob("*.safetensors")) < 1_100_000


def test_dspark_s_stages_are_left_out_aloud(tmp_path, capsys):
    dspark(tmp_path / "source")
    assert convert(f"source={tmp_path / 'source'}", f"target={tmp_path / 'out'}", "layout=transformers") == 0
    said = capsys.readouterr().out
    assert "left out: 15 tensors of the prediction stages mtp.0, 1, 2" in said and "DSpark" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target=T"], "convert needs two folders"),
        (["source=S"], "convert needs two folders"),
        (["source=T", "target=T"], "convert.source is .*no checkpoint lies there"),
        (["source=S", "target=S"], "convert.target .*exists; give a folder that does not"),
        (["source=S", "target=T", "like=T"], "convert.like is .*no checkpoint lies there"),
        (["source=S", "target=T", "layout=native", "experts=fp4"], "layout=native quantises nothing"),
        (["source=S", "target=T", "layout=transformers", "like=S"], "convert.like keeps scales"),
        (["source=S", "target=T", "layout=gguf"], "convert.layout is 'gguf'"),
        (["source=S", "target=T", "experts=int4"], "convert.experts is 'int4'"),
        (["source=S", "target=T", "dtype=float8"], "convert.dtype is 'float8'"),
        (["sourc=S"], "did you mean 'source'"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line_and_exit_code_2(
    source, tmp_path, capsys, words, message
):
    places = {"S": source, "T": tmp_path / "target"}
    words = [f"{k}={places.get(v, v)}" for k, v in (word.split("=") for word in words)]
    assert convert(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "target").exists()


def nothing_left(tmp_path, expected):
    assert {p.name for p in tmp_path.iterdir()} == expected


def test_a_damaged_source_is_named_and_nothing_is_left(source, tmp_path, capsys):
    shard = sorted(source.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert convert(f"source={source}", f"target={tmp_path / 'target'}") == 1
    assert f"{shard} cannot be read as safetensors" in capsys.readouterr().err
    nothing_left(tmp_path, {"source"})


def test_experts_that_fp8_cannot_hold_are_named_and_nothing_is_left(source, tmp_path, capsys):
    assert convert(f"source={source}", f"target={tmp_path / 'target'}", "experts=fp8") == 1
    assert "experts.0.w1.weight cannot be stored as fp8" in capsys.readouterr().err
    nothing_left(tmp_path, {"source"})


@contextmanager
def largest_file(num_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_so_and_nothing_is_left(source, tmp_path, capsys):
    with largest_file(200_000):
        assert convert(f"source={source}", f"target={tmp_path / 'target'}") == 1
    assert "no room to write" in capsys.readouterr().err
    nothing_left(tmp_path, {"source"})
