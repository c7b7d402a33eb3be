"""Teachers read ahead are those that are read in their turn: same states, same errors, no memory kept."""

import json
import shutil
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from consilience.conf.errors import CheckpointError
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.host_teachers import HostTeachers, twin_of
from consilience.teachers.model_teacher import ModelTeacher, load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest, TeacherScheduler
from consilience.training.checkpoint import CheckpointMeta, save_checkpoint

torch.set_num_threads(1)

CONFIG = replace(TINY, vocab_size=64, num_hidden_layers=2, compress_ratios=(0, 4))
IDS = tuple(range(3, 40))


@pytest.fixture
def records(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    for seed, name in enumerate(("math", "code", "agent")):
        model = initialize(Transformer(CONFIG), seed)
        meta = CheckpointMeta(stage="sft", seed=seed, step=0)
        save_checkpoint(tmp_path / name, model, tmp_path / "tokenizer.json", meta)
    return [TeacherRecord(name, tmp_path / name, (name,)) for name in ("math", "code", "agent")]


@pytest.mark.parametrize("host_bytes", [32 << 30, 0])
def test_a_teacher_read_ahead_gives_the_states_and_digests_of_one_read_in_its_turn(records, host_bytes):
    teachers = HostTeachers(host_bytes=host_bytes)
    for record in records[:2]:
        teachers.announce(record)
        found, expected = teachers.load(record), load_model_teacher(record)
        assert (found.digest, found.head_digest) == (expected.digest, expected.head_digest)
        states, wanted = (t.score([IDS], [range(36)])[0] for t in (found, expected))
        assert torch.equal(states, wanted)


def test_the_next_teacher_is_read_while_one_scores_and_none_is_kept_on_a_cpu(records, tmp_path):
    alive, readers = [], []

    class Noted(HostTeachers):
        def _read(self, folder):
            readers.append((folder.name, threading.current_thread() is threading.main_thread()))
            found = super()._read(folder)
            alive.append(weakref.ref(found.model))
            return found

    requests = [ScoreRequest(r.name, r.name, IDS[: 30 - i], (4, 5)) for i, r in enumerate(records)]
    scheduler = TeacherScheduler(TeacherRegistry(records), Noted(), HiddenStore(tmp_path / "store"))
    assert scheduler.score(requests).loads == ("math", "code", "agent")
    assert readers == [("math", True), ("code", False), ("agent", False)]
    assert all(model() is None for model in alive)


def test_announcing_a_teacher_whose_files_are_links_to_nothing_is_left_to_its_load(records, tmp_path):
    weights = next(records[1].checkpoint.glob("*.safetensors"))
    weights.unlink()
    weights.symlink_to(tmp_path / "gone.safetensors")
    teachers = HostTeachers()
    teachers.announce(records[1])
    with pytest.raises(CheckpointError, match="safetensors is missing"):
        teachers.load(records[1])


def test_what_goes_wrong_in_reading_ahead_is_raised_when_it_is_loaded(records):
    teachers = HostTeachers()
    shutil.rmtree(records[1].checkpoint)
    teachers.announce(records[1])
    teachers.load(records[0])  # another one than announced: it is not in its way
    teachers.announce(records[1])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        teachers.load(records[1])


class LateCopies:
    """Copies that arrive no earlier than somebody waits for them; until then their values are wrong."""

    def __init__(self):
        self.coming, self.arrived = [], 0

    def copy(self, tensor):
        found = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else 0)
        self.coming.append((found, tensor))
        return found

    def mark(self):
        last = len(self.coming)
        return lambda: self.arrive(last)

    def arrive(self, last):
        for found, tensor in self.coming[self.arrived : last]:
            found.copy_(tensor)
        self.arrived = max(self.arrived, last)


def test_a_twin_computes_with_each_tensor_once_it_has_arrived(records):
    model = initialize(Transformer(CONFIG), 0).eval().requires_grad_(False)
    copies = LateCopies()
    twin = twin_of(model, copies)
    assert 0 < copies.arrived < len(copies.coming) == len(model.state_dict())
    assert torch.equal(twin.head.weight, model.head.weight)
    seen = []
    for layer in model.layers:  # hooks of the host's model are not the twin's, nor the other way round
        layer.register_forward_pre_hook(lambda *_: seen.append(copies.arrived))
    teachers = [ModelTeacher(name, own, "digest") for name, own in (("twin", twin), ("host", model))]
    one, other = (teacher.score([IDS], [range(36)])[0] for teacher in teachers)
    assert torch.equal(one, other) and one.isfinite().all()
    assert seen == [len(copies.coming)] * len(model.layers)
    tensor = weakref.ref(twin.layers[1].attn_norm.weight)
    del twin, teachers
    assert tensor() is None  # at once: nothing holds it in a circle


def test_a_twin_has_tensors_and_modules_of_its_own_and_shares_those_that_its_model_shares(records):
    model = initialize(Transformer(CONFIG), 0)
    model.norm.weight = model.layers[0].attn_norm.weight
    copies = LateCopies()
    twin = twin_of(model, copies)
    copies.arrive(len(copies.coming))
    assert twin.norm.weight is twin.layers[0].attn_norm.weight
    own, copied = model.state_dict(), twin.state_dict()
    assert list(own) == list(copied) and all(torch.equal(own[name], copied[name]) for name in own)
    assert not {t.data_ptr() for t in own.values()} & {t.data_ptr() for t in copied.values()}
    assert not {id(module) for module in model.modules()} & {id(module) for module in twin.modules()}
    assert twin.config == model.config


def test_what_predicts_further_ahead_is_not_kept_of_a_teacher(records):
    ahead = replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))
    folder = records[0].checkpoint.with_name("ahead")
    meta = CheckpointMeta(stage="sft", seed=0, step=0)
    save_checkpoint(folder, initialize(Transformer(ahead), 0), folder.parent / "tokenizer.json", meta)
    record = TeacherRecord("ahead", folder, ("ahead",))
    found, expected = HostTeachers().load(record), load_model_teacher(record)
    assert len(found._model.mtp) == 0 < len(expected._model.mtp)
    assert found.digest == expected.digest
    states, wanted = (t.score([IDS], [range(36)])[0] for t in (found, expected))
    assert torch.equal(states, wanted)
