"""A checkpoint is whole or absent, says what is wrong with it, and resumes bit for bit."""

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import nn

from consilience.conf.errors import CheckpointError
from consilience.model.digest import weights_digest
from consilience.training.checkpoint import (
    CheckpointMeta,
    ModelFormat,
    load_checkpoint,
    load_engine_state,
    read_meta,
    save_checkpoint,
)
from consilience.training.disk import Disk
from consilience.training.durable_files import replace_folder
from consilience.training.step_folders import latest_checkpoint, prune_checkpoints, step_folder
from consilience.training.tensor_files import INDEX, read_tensors, write_tensors
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)


class Small(nn.Module):
    """Embedding, norm, head: three official names, enough to train and to shard."""

    def __init__(self, width: int = 8, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Embedding(16, width, dtype=dtype)
        self.norm = nn.RMSNorm(width, dtype=dtype)
        self.head = nn.Linear(width, 16, bias=False, dtype=dtype)

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def load_small(model, tensors):
    model.load_state_dict(dict(tensors))


SMALL = ModelFormat(
    config_dict=lambda model: {"width": model.width},
    build=lambda row, dtype: Small(row["width"], dtype),
    to_official=lambda model: {name: t.detach() for name, t in model.state_dict().items()},
    load_official=load_small,
    check=lambda model: None,
    digest=weights_digest,
)
META = CheckpointMeta(
    stage="sft", seed=3, step=7, special_tokens={"<bos>": 0}, domain="math", cursor={"next": 64}
)


def save(folder, model, engine=None, meta=META, tokenizer=None, **kwargs):
    return save_checkpoint(folder, model, tokenizer, meta, engine, model_format=SMALL, **kwargs)


def load(folder, **kwargs):
    return load_checkpoint(folder, model_format=SMALL, **kwargs)


def loss_fn(model, ids):
    """Next-token loss with dropout, so that the random state matters."""
    logits = nn.functional.dropout(model(ids[:, :-1]), 0.2)
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()), {}


def train(engine, steps):
    for _ in range(steps):
        ids = torch.randint(16, (2, 9))
        engine.forward_backward(loss_fn, [ids[:1], ids[1:]], {})
        engine.step(lr_scale=random.random() + np.random.random())


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_a_saved_model_comes_back_with_its_meta_and_files(tmp_path):
    tokenizer = tmp_path / "any.json"
    tokenizer.write_text('{"model": "bpe"}')
    model = Small()
    meta = save(tmp_path / "ckpt", model, tokenizer=tokenizer)
    found, found_meta = load(tmp_path / "ckpt")
    assert same(model, found) and found_meta == meta
    assert meta.digest == weights_digest(SMALL.to_official(model))
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == [
        "config.json",
        "consilience.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert json.loads((tmp_path / "ckpt/config.json").read_text()) == {"width": 8, "torch_dtype": "float32"}
    row = json.loads((tmp_path / "ckpt/consilience.json").read_text())
    assert row["schema"] == 1 and row["special_tokens"] == {"<bos>": 0} and row["domain"] == "math"


def test_weights_are_sharded_by_size_and_indexed(tmp_path):
    model = Small()
    save(tmp_path / "ckpt", model, max_shard_bytes=600)
    index = json.loads((tmp_path / "ckpt" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert same(model, load(tmp_path / "ckpt")[0])


def test_bf16_weights_stay_bf16_and_loading_draws_no_random_number(tmp_path):
    save(tmp_path / "ckpt", Small(dtype=torch.bfloat16))
    before = torch.get_rng_state()
    found, _ = load(tmp_path / "ckpt")
    assert found.embed.weight.dtype == torch.bfloat16
    assert torch.equal(before, torch.get_rng_state())


def test_training_resumed_from_a_checkpoint_equals_training_never_stopped(tmp_path):
    def seeded():
        torch.manual_seed(0)
        np.random.seed(1)
        random.seed(2)
        model = Small()
        return TorchEngine(model, OptimizerSettings(lr=0.05))

    straight = seeded()
    train(straight, 6)
    first = seeded()
    train(first, 3)
    save(tmp_path / "ckpt", first.model, first)
    train(first, 2)  # whatever happens after the checkpoint is forgotten
    torch.manual_seed(99)
    model, meta = load(tmp_path / "ckpt")
    resumed = TorchEngine(model, OptimizerSettings(lr=0.05))
    load_engine_state(tmp_path / "ckpt", resumed)
    assert resumed.num_steps == 3 and meta.cursor == {"next": 64}
    train(resumed, 3)
    assert same(straight.model, resumed.model)


class FailingDisk:
    """A `Disk` whose n-th operation fails with ENOSPC."""

    def __init__(self, fail_at):
        self.left = fail_at
        plain = Disk()
        self.disk = Disk(**{f.name: self._wrap(getattr(plain, f.name)) for f in fields(Disk)})

    def _wrap(self, operation):
        def attempt(*args):
            self.left -= 1
            if self.left == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return operation(*args)

        return attempt


def test_a_disk_that_is_full_at_any_operation_leaves_the_old_checkpoint_and_no_debris(tmp_path):
    old = Small()
    save(tmp_path / "ckpt", old)
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    for fail_at in range(1, 100):
        disk = FailingDisk(fail_at)
        engine = TorchEngine(Small())
        try:
            save(tmp_path / "ckpt", engine.model, engine, tokenizer=tokenizer, disk=disk.disk)
            break
        except CheckpointError as error:
            assert "no room to write the checkpoint" in str(error) and "Free disk space" in str(error)
        assert same(old, load(tmp_path / "ckpt")[0])
        assert sorted(os.listdir(tmp_path)) == ["ckpt", "tokenizer.json"]
    assert fail_at > 8
    assert same(engine.model, load(tmp_path / "ckpt")[0])


@contextmanager
def largest_file(limit):
    """The kernel refuses (EFBIG) any file of this process over `limit` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("width", "limit"), [(512, 16 << 10), (8, 700)])  # in the weights; in a small file
def test_a_real_write_that_hits_a_file_size_limit_is_one_checkpoint_error(tmp_path, width, limit):
    old = Small()
    save(tmp_path / "ckpt", old)
    engine = TorchEngine(Small(width))
    with pytest.raises(CheckpointError, match="no room to write the checkpoint"), largest_file(limit):
        save(tmp_path / "ckpt", engine.model, engine)
    assert same(old, load(tmp_path / "ckpt")[0]) and os.listdir(tmp_path) == ["ckpt"]


def test_ctrl_c_while_saving_leaves_the_old_checkpoint_and_no_debris(tmp_path):
    def interrupt(_path, _tensors):
        raise KeyboardInterrupt

    old = Small()
    save(tmp_path / "ckpt", old)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "ckpt", Small(), disk=Disk(write_tensors=interrupt))
    assert same(old, load(tmp_path / "ckpt")[0]) and os.listdir(tmp_path) == ["ckpt"]


def test_a_crash_between_the_two_renames_brings_the_old_checkpoint_back(tmp_path):
    old = Small()
    save(tmp_path / "step-000001", old)
    os.rename(tmp_path / "step-000001", tmp_path / ".step-000001.replaced")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000001"
    os.rename(tmp_path / "step-000001", tmp_path / ".step-000001.replaced")
    assert same(old, load(tmp_path / "step-000001")[0])


def test_what_a_killed_process_left_is_swept_by_the_next_save(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / f".ckpt.tmp-{child.pid}").mkdir()
    (tmp_path / f".ckpt.tmp-{os.getppid()}").mkdir()  # alive: not ours to remove
    save(tmp_path / "ckpt", Small())
    assert sorted(os.listdir(tmp_path)) == sorted([f".ckpt.tmp-{os.getppid()}", "ckpt"])


def test_a_folder_is_replaced_whole(tmp_path):
    for name, text in (("a", "old"), ("b", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(text)
    replace_folder(tmp_path / "b", tmp_path / "a")
    assert (tmp_path / "a/file").read_text() == "new" and os.listdir(tmp_path) == ["a"]


def rewrite(folder, change):
    """Apply `change` to the tensors of the only shard and keep index and file in step."""
    path = folder / "model-00001-of-00001.safetensors"
    tensors = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors)
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(tensors, path.name)}
    (folder / INDEX).write_text(json.dumps(index))


def flip(tensors):
    tensors["norm.weight"][0] += 1


DAMAGE = {
    "missing": (lambda t: t.pop("norm.weight"), r"index.json: tensor norm.weight is missing"),
    "unexpected": (
        lambda t: t.update(extra=torch.zeros(1)),
        r"00001.safetensors: tensor extra is unexpected",
    ),
    "shape": (
        lambda t: t.update({"norm.weight": torch.ones(9)}),
        r"00001.safetensors: tensor norm.weight has shape \[9\].*needs \[8\]",
    ),
    "type": (
        lambda t: t.update({"norm.weight": torch.ones(8, dtype=torch.float64)}),
        r"norm.weight has type float64.*needs float32",
    ),
    "value": (flip, r"the weights have digest"),
    "no embedding": (lambda t: t.pop("embed.weight"), r"embed.weight is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_wrong_weights_are_refused_naming_file_and_tensor(tmp_path, kind):
    change, says = DAMAGE[kind]
    save(tmp_path / "ckpt", Small())
    rewrite(tmp_path / "ckpt", change)
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path / "ckpt")


def truncate(name, keep=0.5):
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


FILES = {
    "shard cut": (truncate("model-00001-of-00001.safetensors"), "00001.safetensors cannot be read"),
    "shard empty": (truncate("model-00001-of-00001.safetensors", 0), "00001.safetensors cannot be read"),
    "shard gone": (lambda f: (f / "model-00001-of-00001.safetensors").unlink(), "safetensors is missing"),
    "index gone": (lambda f: (f / INDEX).unlink(), "index.json is missing"),
    "index cut": (truncate(INDEX), "index.json cannot be read"),
    "index outside": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"embed.weight": "../x.safetensors"}}'),
        "lies outside",
    ),
    "config gone": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "meta cut": (truncate("consilience.json"), "consilience.json cannot be read"),
    "meta list": (lambda f: (f / "consilience.json").write_text("[]"), "holds no table"),
    "schema": (
        lambda f: (f / "consilience.json").write_text('{"schema": 9}'),
        "schema 9, this version reads 1",
    ),
    "field": (lambda f: (f / "consilience.json").write_text('{"schema": 1}'), "field 'stage' is missing"),
    "folder gone": (shutil.rmtree, "no checkpoint at .*Run the stage"),
}


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files_are_refused_by_name(tmp_path, kind):
    damage, says = FILES[kind]
    save(tmp_path / "ckpt", Small())
    damage(tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match=says):
        load(tmp_path / "ckpt")


def test_a_changed_tokenizer_or_state_is_noticed(tmp_path):
    tokenizer = tmp_path / "t.json"
    tokenizer.write_text('{"a": 1}')
    engine = TorchEngine(Small())
    save(tmp_path / "ckpt", engine.model, engine, tokenizer=tokenizer)
    (tmp_path / "ckpt/tokenizer.json").write_text('{"a": 2}')
    with pytest.raises(CheckpointError, match=r"tokenizer.json was changed"):
        load(tmp_path / "ckpt")
    os.truncate(tmp_path / "ckpt/state/optimizer.safetensors", 100)
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors was changed"):
        load_engine_state(tmp_path / "ckpt", engine)


def test_a_checkpoint_without_state_cannot_resume_and_says_so(tmp_path):
    save(tmp_path / "ckpt", Small())
    with pytest.raises(CheckpointError, match="has no state/ folder"):
        load_engine_state(tmp_path / "ckpt", TorchEngine(Small()))


def test_the_latest_step_is_found_and_older_ones_are_pruned(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None and latest_checkpoint(tmp_path) is None
    for step in (2, 10, 4):
        save(step_folder(tmp_path, step), Small())
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000010"
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step-000004", "step-000010"]
    assert read_meta(tmp_path / "step-000004").stage == "sft"


def test_a_tensor_type_of_python_objects_is_never_needed_to_load(tmp_path):
    engine = TorchEngine(Small())
    train(engine, 1)
    save(tmp_path / "ckpt", engine.model, engine)
    suffixes = {p.suffix for p in (tmp_path / "ckpt").rglob("*") if p.is_file()}
    assert suffixes == {".json", ".safetensors"}


def test_a_checkpoint_from_before_families_has_the_one_that_all_had(tmp_path):
    save(tmp_path / "ckpt", Small())
    file = tmp_path / "ckpt" / "consilience.json"
    row = json.loads(file.read_text())
    del row["family"]
    file.write_text(json.dumps(row))
    assert read_meta(tmp_path / "ckpt").family == "official"
