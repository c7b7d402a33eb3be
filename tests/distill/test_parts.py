"""A phase scored in parts: what fits the budget together, and that it changes nothing that is trained."""

import pytest
import torch
from small_teachers import CountingLoader, Sampler, model, registry_of, run, samples, side

from consilience.conf.errors import EngineError
from consilience.distill.parts import cut_parts
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.teachers.hidden_store import HiddenStore

torch.set_num_threads(1)

SETTINGS = {"steps": 2, "mini_batches": 3}
OWNERS = ("math", "code", "math", "code", "code", "math")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    return registry_of(tmp_path_factory.mktemp("teachers"), {"math": 1, "code": 2})


@pytest.mark.parametrize(
    ("batches", "budget", "firsts"),
    [
        ([{"a": 4}, {"b": 4}, {"c": 4}], None, [0]),
        ([{"a": 4}, {"b": 4}, {"c": 4}], 12, [0]),
        ([{"a": 4}, {"b": 4}, {"c": 4}], 11, [0, 2]),
        ([{"a": 4}, {"b": 4}, {"c": 4}], 4, [0, 1, 2]),
        ([{"a": 4}, {"a": 4}, {"c": 4}], 8, [0]),  # one state, used twice
        ([{"a": 4}, {"b": 4, "c": 4}, {"a": 4}], 11, [0, 1, 2]),  # a does not fit beside b and c
        ([{"a": 4}, {"b": 8}, {"a": 4, "d": 4}], 12, [0, 2]),  # a waits for the last one
        ([], 4, [0]),
    ],
)
def test_parts_by_hand(batches, budget, firsts):
    assert cut_parts(batches, budget) == firsts


def test_a_mini_batch_that_does_not_fit_alone_is_refused_with_both_numbers():
    with pytest.raises(EngineError, match=r"9 bytes of hidden states of one mini-batch .* may hold 8"):
        cut_parts([{"a": 4}, {"b": 5, "c": 4}], 8)


def made(step):
    return samples(step, OWNERS)


BUDGET = sum(r.num_sampled for r in made(0)) * 4 * model().head.weight.shape[1] * 2 // 3


def digest(engine):
    return weights_digest(to_official(engine.model))


@pytest.fixture(scope="module")
def whole(registry, tmp_path_factory):
    """A run of two phases of three mini-batches that fits: its engine and its result."""
    folder = tmp_path_factory.mktemp("whole")
    engine, log, result = run(folder, side(registry, folder / "states"), Sampler(made), **SETTINGS)
    assert [row["parts"] for row in log.rows] == [1, 1]
    return engine, result


def test_a_phase_in_parts_is_the_phase_as_a_whole(registry, whole, tmp_path):
    engine, result = whole
    loader = CountingLoader()
    teachers = side(registry, tmp_path / "states", loader, budget_bytes=BUDGET)
    parted, log, found = run(tmp_path / "parts", teachers, Sampler(made), **SETTINGS)
    assert [row["parts"] for row in log.rows] == [2, 2] and len(loader.scored) == 2 * len(OWNERS)
    assert found["kl"] == result["kl"] and found["head_loads"] == result["head_loads"]
    assert digest(parted) == digest(engine)
    assert len(teachers.store) == 0


class Killed(Exception):
    pass


class KilledLoader(CountingLoader):
    """Dies when its n-th teacher is to be loaded."""

    def __init__(self, last):
        super().__init__()
        self.last = last

    def __call__(self, record):
        if len(self.loaded) == self.last:
            raise Killed
        return super().__call__(record)


@pytest.mark.parametrize("num_loads", [1, 3])
def test_killed_in_any_part_a_phase_resumes_to_the_same_bits(registry, whole, tmp_path, num_loads):
    engine, result = whole
    folder, states = tmp_path / "killed", tmp_path / "states"
    loader = KilledLoader(num_loads)
    with pytest.raises(Killed):
        run(folder, side(registry, states, loader, budget_bytes=BUDGET), Sampler(made), **SETTINGS)
    teachers = side(registry, states, budget_bytes=BUDGET)
    held = len(teachers.store)
    resumed, log, found = run(folder, teachers, Sampler(made), **SETTINGS)
    assert digest(resumed) == digest(engine) and found["kl"] == result["kl"]
    assert 0 < log.rows[0]["reused"] <= held and log.rows[0]["parts"] == 2


def test_states_of_a_later_part_stay_while_there_is_room_and_are_the_first_to_go(tmp_path):
    store = HiddenStore(tmp_path, budget_bytes=5 * 64)
    state = torch.ones(2, 8)  # 64 bytes
    for key in ("now", "soon", "last", "stale"):
        store.put({key: state})
    store.hold(["soon", "last"])
    store.reserve(["now"])
    store.make_room(64, {"now"})
    assert len(store) == 4  # fits
    store.make_room(2 * 64, {"now"})
    assert "stale" not in store and "last" in store
    store.make_room(3 * 64, {"now"})
    assert "last" not in store and "soon" in store
    store.take("now")
    store.free_taken()
    assert "now" not in store and "soon" in store
    store.hold([])
    assert store.free_taken() == 64 and len(store) == 0


def test_a_reader_finds_what_the_writer_scored_again_for_a_later_part(tmp_path):
    writer, state = HiddenStore(tmp_path), torch.ones(2, 8)
    writer.put({"a": state, "b": state})
    reader = HiddenStore(tmp_path, is_reader=True)
    reader.expect(["a"], later=["b"])
    reader.take("a")
    reader.free_taken()
    assert "b" in reader
    writer.reserve(["c"])
    writer.free_taken()  # the file goes
    writer.put({"c": state, "b": 2 * state})
    reader.expect(["b", "c"])
    assert torch.equal(reader.take("b"), 2 * state) and torch.equal(reader.take("c"), state)
