"""One teacher at a time, every sample once, nothing scored twice, memory flat in the number of teachers."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import AdmissionError, CheckpointError, ConfigError, EngineError
from consilience.teachers import scheduler as scheduler_file
from consilience.teachers.fake_teacher import FakeTeacher
from consilience.teachers.heads import TeacherDigests
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest, TeacherScheduler

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {"math": 1, "code": 2, "agent": 3}


def build(name):
    return FakeTeacher(name, seed=SEEDS[name])


def digests(record):
    teacher = build(record.name)
    return TeacherDigests(teacher.digest, teacher.head_digest)


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return TeacherRegistry([TeacherRecord(name, tmp_path, (name,)) for name in SEEDS])


@pytest.fixture
def store(tmp_path):
    return HiddenStore(tmp_path / "store")


def request(uid, teacher, length, first=0):
    ids = tuple((first + i) % 32 for i in range(length))
    return ScoreRequest(uid, teacher, ids, tuple(range(1, length)))


REQUESTS = [
    request("a", "math", 4),
    request("b", "agent", 5),
    request("c", "code", 3),
    request("d", "math", 6),
    request("e", "code", 20),
]


def test_teachers_are_loaded_once_each_largest_queue_first_and_states_are_theirs(registry, store):
    found = TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests).score(REQUESTS)
    assert found.loads == ("code", "math", "agent")  # 23, 10 and 5 tokens
    assert (found.num_scored, found.num_reused, found.num_tokens) == (5, 0, 38)
    for r in REQUESTS:
        expected = build(r.teacher).score([r.token_ids], [r.positions])[0]
        assert torch.equal(store.take(found.keys[r.uid]), expected)


def test_two_names_of_one_checkpoint_are_loaded_once(registry, store):
    same = TeacherDigests(build("math").digest, build("math").head_digest)
    loaded = []

    def loader(record):
        loaded.append(record.name)
        return build("math")

    found = TeacherScheduler(registry, loader, store, digests=lambda record: same).score(REQUESTS)
    assert loaded == ["math"] == list(found.loads) and found.num_scored == 5
    for r in REQUESTS:
        expected = build("math").score([r.token_ids], [r.positions])[0]
        assert torch.equal(store.take(found.keys[r.uid]), expected)


def test_each_distinct_teacher_is_checked_once_before_any_state_of_it_is_stored(registry, tmp_path):
    seen = []

    def check(teacher):
        seen.append((teacher.name, len(store)))
        if teacher.name == "agent":
            raise AdmissionError("its KL to itself is 0.3")

    store = HiddenStore(tmp_path / "checked")
    scheduler = TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests, check=check)
    scheduler.score([request("a", "math", 4), request("b", "code", 3)])
    scheduler.score([request("c", "math", 5), request("d", "code", 4)])
    assert seen == [("math", 0), ("code", 1)]
    with pytest.raises(AdmissionError, match="KL to itself"):
        scheduler.score([request("e", "agent", 5)])
    assert len(store) == 4


def test_the_next_teachers_files_are_read_while_one_scores(registry, store, tmp_path, monkeypatch):
    events = []

    class Warm(scheduler_file.WarmFiles):
        def __init__(self, folder):
            events.append(f"warm {folder.name}")
            super().__init__(folder)

    for name in SEEDS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    apart = TeacherRegistry([TeacherRecord(name, tmp_path / name, (name,)) for name in SEEDS])
    monkeypatch.setattr(scheduler_file, "WarmFiles", Warm)

    def loader(record):
        events.append(f"load {record.name}")
        return build(record.name)

    TeacherScheduler(apart, loader, store, digests=digests).score(REQUESTS)
    assert events == ["load code", "warm math", "load math", "warm agent", "load agent"]


def test_never_two_teachers_in_memory(registry, store):
    import weakref

    seen = []

    def loader(record):
        assert all(ref() is None for ref in seen)
        teacher = build(record.name)
        seen.append(weakref.ref(teacher))
        return teacher

    TeacherScheduler(registry, loader, store, digests=digests).score(REQUESTS)
    assert len(seen) == 3 and all(ref() is None for ref in seen)


def test_a_loader_that_keeps_its_teachers_is_found_out(registry, store):
    kept = []

    def loader(record):
        kept.append(build(record.name))
        return kept[-1]

    with pytest.raises(EngineError, match="'code' is still in memory"):
        TeacherScheduler(registry, loader, store, digests=digests).score(REQUESTS)
    assert len(kept) == 1


def test_a_restart_between_score_and_use_scores_nothing_again(registry, store):
    TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests).score(REQUESTS)

    def no_loader(record):
        raise AssertionError(f"{record.name} loaded again")

    reopened = HiddenStore(store.folder)
    found = TeacherScheduler(registry, no_loader, reopened, digests=digests).score(REQUESTS)
    assert found.loads == () and found.num_scored == 0 and found.num_reused == 5
    assert all(reopened.take(found.keys[r.uid]).shape == (len(r.positions), 8) for r in REQUESTS)


def test_a_crash_in_the_second_teacher_keeps_what_the_first_stored(registry, store):
    def loader(record):
        if record.name == "math":
            raise OSError("disk gone")
        return build(record.name)

    with pytest.raises(CheckpointError, match=r"teacher .math. cannot be read .*disk gone"):
        TeacherScheduler(registry, loader, store, digests=digests).score(REQUESTS)
    found = TeacherScheduler(
        registry, lambda r: build(r.name), HiddenStore(store.folder), digests=digests
    ).score(REQUESTS)
    assert found.loads == ("math", "agent") and found.num_reused == 2


def test_two_samples_with_the_same_tokens_are_scored_once_and_taken_twice(registry, store):
    pair = [request("x", "math", 4), request("y", "math", 4)]
    found = TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests).score(pair)
    assert (found.num_scored, found.num_reused) == (1, 1) and found.keys["x"] == found.keys["y"]
    assert torch.equal(store.take(found.keys["x"]), store.take(found.keys["y"]))
    store.free_taken()
    assert len(store) == 0


@pytest.mark.parametrize(("batch_tokens", "num_files"), [(1, 5), (10, 4), (1000, 3)])
def test_batches_respect_the_token_budget_and_give_the_same_states(registry, store, batch_tokens, num_files):
    scheduler = TeacherScheduler(
        registry, lambda r: build(r.name), store, digests=digests, batch_tokens=batch_tokens
    )
    found = scheduler.score(REQUESTS)
    assert len(list(store.folder.iterdir())) == num_files
    for r in REQUESTS:
        assert torch.equal(
            store.take(found.keys[r.uid]), build(r.teacher).score([r.token_ids], [r.positions])[0]
        )


def test_no_requests_load_nothing(registry, store):
    found = TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests).score([])
    assert found.loads == () and found.keys == {}


def test_wrong_requests_are_refused_before_anything_is_loaded(registry, store):
    def no_loader(record):
        raise AssertionError("loaded")

    scheduler = TeacherScheduler(registry, no_loader, store, digests=digests)
    with pytest.raises(ConfigError, match="unknown teacher 'mat'; did you mean 'math'"):
        scheduler.score([*REQUESTS, request("z", "mat", 3)])
    with pytest.raises(ValueError, match="two requests have the uid 'a'"):
        scheduler.score([REQUESTS[0], REQUESTS[0]])
    for position in (3, -1):
        with pytest.raises(ValueError, match="z: positions outside its 3 tokens"):
            scheduler.score([ScoreRequest("z", "math", (1, 2, 3), (position,))])


def test_a_teacher_with_other_weights_than_its_checkpoint_states_is_refused(registry, store):
    scheduler = TeacherScheduler(registry, lambda r: FakeTeacher(r.name, seed=9), store, digests=digests)
    with pytest.raises(AdmissionError, match="changed during the run"):
        scheduler.score(REQUESTS)
    assert len(store) == 0


class Broken(FakeTeacher):
    """Returns what `change` makes of its first state."""

    def __init__(self, name, change):
        super().__init__(name, seed=SEEDS[name])
        self.change = change

    def score(self, token_ids, positions):
        first, *rest = super().score(token_ids, positions)
        changed = self.change(first)
        return rest if changed is None else [changed, *rest]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:-1], "was expected"),
        (lambda x: x.double(), r"torch\.float64; .* torch\.float32 was expected"),
        (lambda x: x * float("nan"), "not finite"),
        (lambda x: None, "returned 0 tensors for 1 samples"),
    ],
)
def test_states_that_cannot_be_right_are_refused(registry, store, change, message):
    scheduler = TeacherScheduler(registry, lambda r: Broken(r.name, change), store, digests=digests)
    with pytest.raises(EngineError, match=message):
        scheduler.score([request("a", "math", 4)])
    assert len(store) == 0


@pytest.mark.parametrize(
    "change", [lambda x: x[:-1], lambda x: x / 0.0, lambda x: x[:, :-1], lambda x: x.half()]
)
def test_a_sample_with_bad_states_is_named_and_neither_stored_nor_reserved(registry, store, change):
    def wide(record):
        return replace(digests(record), width=8)

    scheduler = TeacherScheduler(registry, lambda r: Broken(r.name, change), store, digests=wide)
    found = scheduler.score([request("a", "math", 4), request("b", "math", 5), request("c", "math", 6)])
    assert list(found.bad) == ["a"] and "teacher 'math', a: " in found.bad["a"]
    assert found.keys["a"] not in store and len(store) == 2
    for uid in "bc":
        store.take(found.keys[uid])
    with pytest.raises(EngineError, match="already used up"):
        store.take(found.keys["a"])


def test_a_teacher_all_of_whose_states_are_bad_is_an_error_and_no_sample(registry, store):
    class Mute(FakeTeacher):
        def score(self, token_ids, positions):
            return [state * float("inf") for state in super().score(token_ids, positions)]

    scheduler = TeacherScheduler(registry, lambda r: Mute(r.name, seed=SEEDS[r.name]), store, digests=digests)
    with pytest.raises(EngineError, match="teacher 'code', c: hidden states are not finite; so are all"):
        scheduler.score(REQUESTS)


def test_a_teacher_that_vanishes_is_one_error_that_names_it(registry, store):
    def gone(record):
        raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

    with pytest.raises(CheckpointError, match=r"teacher 'code' cannot be read from .* put its folder back"):
        TeacherScheduler(registry, gone, store, digests=digests).score(REQUESTS)
    with pytest.raises(CheckpointError, match="teacher 'math' cannot be read from"):
        TeacherScheduler(registry, gone, store, digests=gone).score(REQUESTS)


def test_a_budget_too_small_is_said_before_a_teacher_is_loaded(registry, tmp_path):
    def no_loader(record):
        raise AssertionError("loaded")

    def wide(record):
        return replace(digests(record), width=8)

    small = HiddenStore(tmp_path / "small", budget_bytes=1000)
    with pytest.raises(EngineError, match="1056 bytes of hidden states do not fit"):  # 33 states of 8 fp32
        TeacherScheduler(registry, no_loader, small, digests=wide).score(REQUESTS)
    enough = HiddenStore(tmp_path / "enough", budget_bytes=1056)
    TeacherScheduler(registry, lambda r: build(r.name), enough, digests=wide).score(REQUESTS)
    assert enough.size_bytes == 1056


def test_states_of_other_weights_are_not_taken_for_a_teachers_own(registry, store):
    TeacherScheduler(registry, lambda r: build(r.name), store, digests=digests).score(REQUESTS)

    def other(record):
        return replace(digests(record), weights="another" * 2)

    def no_loader(record):
        raise AssertionError("loaded")

    scheduler = TeacherScheduler(registry, no_loader, store, digests=other, may_load=False)
    with pytest.raises(EngineError) as error:
        scheduler.score(REQUESTS)
    stored = build("math").digest[:12]
    assert "weights anotheranoth" in str(error.value) and f"'math' (weights {stored}" in str(error.value)
    assert "2 of 2 samples have no stored states" in str(error.value)


def test_states_of_another_arithmetic_are_not_taken_for_a_teachers_own(registry, store):
    load = lambda r: build(r.name)
    TeacherScheduler(registry, load, store, digests=digests, arithmetic="fp4").score(REQUESTS)
    again = TeacherScheduler(registry, load, store, digests=digests, arithmetic="fp4", may_load=False)
    assert again.score(REQUESTS).num_reused == 5
    plain = TeacherScheduler(registry, load, store, digests=digests, may_load=False)
    with pytest.raises(EngineError, match=r"the store holds those of .*torch.float32, fp4\)"):
        plain.score(REQUESTS)


def test_after_a_kill_the_rest_is_scored_in_the_batches_in_which_it_would_have_been(registry, store):
    batches = []

    class Noted(FakeTeacher):
        def score(self, token_ids, positions):
            batches.append(tuple(map(len, token_ids)))
            if len(batches) == stop:
                raise KeyboardInterrupt
            return super().score(token_ids, positions)

    requests = [request(str(i), "math", 4 + i) for i in range(6)]  # 4 5 | 6 | 7 | 8 | 9 tokens

    def scheduler():
        return TeacherScheduler(
            registry, lambda r: Noted(r.name, seed=1), store, digests=digests, batch_tokens=10
        )

    stop = 3
    with pytest.raises(KeyboardInterrupt):
        scheduler().score(requests)
    stop = 0
    scheduler().score(requests)
    assert batches == [(4, 5), (6,), (7,), (7,), (8,), (9,)]


MEMORY = """
import resource, sys, tempfile, pathlib
from consilience.teachers import scheduler as scheduler_file
from consilience.teachers.fake_teacher import FakeTeacher
from consilience.teachers.heads import TeacherDigests
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest, TeacherScheduler
folder = pathlib.Path(sys.argv[1])
def digests(record):
    teacher = FakeTeacher(record.name, seed=ord(record.name))
    return TeacherDigests(teacher.digest, teacher.head_digest)
def load(record):
    return FakeTeacher(record.name, seed=ord(record.name), ballast_bytes=64 * 2**20)
for names in ("a", "abc"):
    registry = TeacherRegistry(TeacherRecord(n, folder, (n,)) for n in names)
    scheduler = TeacherScheduler(registry, load, HiddenStore(folder / names), digests=digests)
    report = scheduler.score([ScoreRequest(n, n, (1, 2, 3), (0, 1)) for n in names])
    assert len(report.loads) == len(names)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def test_resident_memory_is_flat_from_one_to_three_teachers(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, three = (int(line) for line in done.stdout.split())
    # A teacher weighs 64 MiB; a second one kept would show as such.
    assert three - one < 16 * 2**20
