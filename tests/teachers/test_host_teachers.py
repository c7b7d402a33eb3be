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
from consilience.teachers.host_teachers import HostTeachers, twin_on
from consilience.teachers.model_teacher import load_model_teacher
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


def test_a_twin_has_the_models_values_in_tensors_of_its_own(records):
    model = initialize(Transformer(CONFIG), 0)
    twin = twin_on(torch.device("meta"), model)
    assert {n: (p.shape, p.device.type) for n, p in twin.state_dict().items()} == {
        n: (p.shape, "meta") for n, p in model.state_dict().items()
    }
    assert all(p.device.type == "cpu" for p in model.state_dict().values())
    assert twin.layers[0] is not model.layers[0] and twin.config == model.config
