"""A real checkpoint as a teacher: states, head and logits are those of the model, whatever the batching."""

import json
from dataclasses import replace

import pytest
import torch
from synthetic_release import hf_model, write_official

from consilience.conf.errors import AdmissionError, CheckpointError
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.teachers.admission import admit, check_self_kl, self_kl
from consilience.teachers.heads import read_digests, read_head
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import ModelTeacher, load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest, TeacherScheduler
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
CONFIG = replace(PRESETS["tiny"], vocab_size=80)
LENGTHS = [5, 70, 33, 1, 130, 64]


def build(seed):
    return initialize(Transformer(CONFIG), seed)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Two specialists as checkpoint folders."""
    root = tmp_path_factory.mktemp("teachers")
    (root / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    for seed, name in enumerate(["math", "code"]):
        meta = CheckpointMeta("grpo", seed, 3, special_tokens={"<eos>": 1}, domain=name)
        save_checkpoint(root / name, build(seed), root / "tokenizer.json", meta)
    return {name: TeacherRecord(name, root / name, (name,)) for name in ("math", "code")}


@pytest.fixture(scope="module")
def samples():
    g = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(80, (n,), generator=g).tolist()) for n in LENGTHS]


def alone(model, ids):
    with torch.no_grad():
        return model.hidden(torch.tensor([ids]))[0]


@pytest.mark.parametrize(("row_tokens", "batch_tokens"), [(64, 64), (256, 512), (128, 100_000)])
def test_states_are_those_of_each_sample_run_alone(records, samples, row_tokens, batch_tokens):
    teacher = load_model_teacher(records["math"], row_tokens=row_tokens, batch_tokens=batch_tokens)
    positions = [range(0, len(ids), 2) for ids in samples]
    model = build(0)
    for state, ids, wanted in zip(teacher.score(samples, positions), samples, positions, strict=True):
        # Packing changes the shapes of matrix products, so fp32 sums round differently: 1e-5 at 1.
        torch.testing.assert_close(state, alone(model, ids)[list(wanted)], rtol=1e-4, atol=1e-5)
        assert not state.requires_grad


def test_digests_and_head_are_those_of_the_folder(records):
    teacher = load_model_teacher(records["code"])
    found = read_digests(records["code"])
    assert (teacher.digest, teacher.head_digest) == (found.weights, found.head)
    assert torch.equal(teacher.head(), read_head(records["code"].checkpoint))
    assert teacher.digest != load_model_teacher(records["math"]).digest


def test_stored_states_times_the_head_of_the_folder_are_the_models_logits(records, samples, tmp_path):
    store = HiddenStore(tmp_path)
    requests = [
        ScoreRequest(f"{name}/{i}", name, ids, tuple(range(len(ids))))
        for name in records
        for i, ids in enumerate(samples)
    ]
    scheduler = TeacherScheduler(
        TeacherRegistry(records.values()), load_model_teacher, store, batch_tokens=128
    )
    report = scheduler.score(requests)
    assert sorted(report.loads) == ["code", "math"] and report.num_scored == 12
    models = {"math": build(0), "code": build(1)}
    for r in requests:
        logits = store.take(report.keys[r.uid]) @ read_head(records[r.teacher].checkpoint).t()
        with torch.no_grad():
            expected = models[r.teacher].head(alone(models[r.teacher], r.token_ids))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    store.free_taken()
    assert store.size_bytes == 0


def test_a_model_distilled_from_itself_has_nothing_to_learn(records, samples):
    student = ModelTeacher("student", build(0), "in memory", row_tokens=256)
    admit(records["math"].checkpoint, records["code"].checkpoint)
    check_self_kl(self_kl(student, load_model_teacher(records["math"], row_tokens=64), samples))
    assert self_kl(student, load_model_teacher(records["code"]), samples) > 1e-6


def test_states_come_in_the_models_activation_type(samples):
    teacher = ModelTeacher("half", initialize(Transformer(CONFIG, torch.bfloat16), 0), "x")
    states = teacher.score(samples[:2], [[0, 1], []])
    assert [s.shape for s in states] == [(2, CONFIG.hidden_size), (0, CONFIG.hidden_size)]
    assert states[0].dtype == torch.bfloat16


def test_no_samples_give_no_states_and_uneven_lists_are_refused(records):
    teacher = load_model_teacher(records["math"])
    assert teacher.score([], []) == []
    with pytest.raises(ValueError, match="1 samples but positions for 2"):
        teacher.score([[1]], [[0], [0]])


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError):
        load_model_teacher(TeacherRecord("x", tmp_path / "nowhere", ("x",)))


RELEASES = {
    "official, FP4 experts": lambda folder: write_official(folder),
    "official, FP8 experts": lambda folder: write_official(folder, experts="fp8", num_shards=1),
    "transformers": lambda folder: hf_model(torch.bfloat16).save_pretrained(folder),
}


@pytest.mark.parametrize("layout", RELEASES)
def test_a_released_folder_teaches_as_it_is(layout, tmp_path):
    """Student: the same weights saved as a checkpoint of ours."""
    released, own = tmp_path / "released", tmp_path / "own"
    RELEASES[layout](released)
    tokens = [{"content": "<eos>", "id": 1, "special": True}]
    (released / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    model, meta = load_checkpoint(released)
    save_checkpoint(own, model, released / "tokenizer.json", replace(meta, special_tokens={"<eos>": 1}))
    admit(own, released)

    record = TeacherRecord("math", released, ("math",))
    found = read_digests(record)
    assert found == read_digests(TeacherRecord("own", own, ("math",)))
    assert found.dtype == torch.bfloat16 and torch.equal(read_head(released), model.head.weight)

    ids = tuple(range(40))
    store = HiddenStore(tmp_path / "store")
    scheduler = TeacherScheduler(TeacherRegistry([record]), load_model_teacher, store)
    report = scheduler.score([ScoreRequest("a", "math", ids, tuple(range(39)))])
    expected = ModelTeacher("alone", model, meta.digest).score([ids], [range(39)])[0]
    assert torch.equal(store.take(report.keys["a"]), expected)


def test_a_released_teacher_whose_weights_change_during_the_run_is_refused(tmp_path):
    folder = write_official(tmp_path / "released", num_shards=1)
    record = TeacherRecord("math", folder, ("math",))

    def load_another(record):
        write_official(folder, seed=1, num_shards=1)
        return load_model_teacher(record)

    scheduler = TeacherScheduler(TeacherRegistry([record]), load_another, HiddenStore(tmp_path / "store"))
    with pytest.raises(AdmissionError, match="the folder changed during the run"):
        scheduler.score([ScoreRequest("a", "math", (1, 2, 3), (0, 1))])
