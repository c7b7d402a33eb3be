"""Batches of a teacher, and which rank scores them: the stored states are the same bits whoever does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_teachers import registry_of

from consilience.model.ranks import ALONE
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.model_teacher import load_model_teacher
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import ScoreRequest, TeacherScheduler
from consilience.teachers.score_batches import cut_batches, share_out
from tests.rank_processes import on_ranks

torch.set_num_threads(1)

LENGTHS = {"math": (9, 12, 5, 30, 8), "code": (7, 6), "agent": (11,)}


def test_batches_by_hand():
    sizes = {"a": 4, "b": 5, "c": 20, "d": 3}
    assert [*cut_batches(sizes, 9)] == [["a", "b"], ["c"], ["d"]]
    assert [*cut_batches(sizes, 1)] == [["a"], ["b"], ["c"], ["d"]]
    assert [*cut_batches({}, 9)] == []


def test_shares_by_hand():
    assert share_out([4, 4, 4, 4], 2) == [0, 0, 1, 1]
    assert share_out([1, 8, 1], 2) == [0, 1, 1]
    assert share_out([5], 4) == [2] and share_out([], 4) == []
    assert share_out([1] * 12, 4) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_runs_of_which_none_has_more_than_its_part_and_one_batch(sizes, num_ranks):
    owners = share_out(sizes, num_ranks)
    assert owners == sorted(owners) and all(0 <= owner < num_ranks for owner in owners)
    for rank in range(num_ranks):
        own = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        assert own <= sum(sizes) / num_ranks + max(sizes, default=0)


def requests():
    generator = torch.Generator().manual_seed(4)
    made = []
    for teacher, lengths in LENGTHS.items():
        for number, length in enumerate(lengths):
            ids = tuple(torch.randint(2, 40, (length,), generator=generator).tolist())
            made.append(ScoreRequest(f"{teacher}/{number}", teacher, ids, tuple(range(2, length))))
    return made


def scored(ranks, root, folder, spoil=None, most_scorers=None):
    """(report, teachers that this rank loaded, uid -> bytes of the states as it reads them)."""
    loaded = []

    def load(record):
        loaded.append(record.name)
        teacher = load_model_teacher(record, row_tokens=64)
        if record.name == spoil:
            score = teacher.score
            teacher.score = lambda *given: [state * float("nan") for state in score(*given)]
        return teacher

    registry = TeacherRegistry([TeacherRecord(name, root / name, (name,)) for name in LENGTHS])
    ranks.barrier()
    store = HiddenStore(folder, is_reader=not ranks.is_first)
    ranks.barrier()
    scheduler = TeacherScheduler(registry, load, store, batch_tokens=20, most_scorers=most_scorers)
    report = scheduler.score(requests(), ranks=ranks)
    again = scheduler.score(requests(), ranks=ranks)
    assert (again.loads, again.num_scored, again.num_reused) == ((), 0, 8)
    states = {uid: store.take(key).numpy().tobytes() for uid, key in report.keys.items()}
    return report, loaded, states


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    registry_of(root, {name: seed for seed, name in enumerate(LENGTHS)})
    return root


ALL = ["math", "code", "agent"]


@pytest.mark.parametrize(
    ("size", "most_scorers", "expected"),
    [
        (2, None, [["math"], ALL]),
        pytest.param(3, None, [["math"], ["math"], ALL], marks=pytest.mark.slow),
        pytest.param(2, 1, [ALL, []], marks=pytest.mark.slow),
    ],
)
def test_states_are_the_same_bits_on_any_number_of_ranks(teachers, size, most_scorers, expected, tmp_path):
    report, loaded, states = scored(ALONE, teachers, tmp_path / "one")
    assert loaded == ALL
    found = on_ranks(size, scored, teachers, tmp_path / "more", None, most_scorers, folder=tmp_path)
    assert all(its == report and bits == states for its, _, bits in found)
    assert [names for _, names, _ in found] == expected
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("one", "more")]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_teacher_all_of_whose_states_are_bad_ends_every_rank(teachers, tmp_path):
    with pytest.raises(AssertionError, match=r"teacher 'math'.*not finite; so are all its samples"):
        on_ranks(2, scored, teachers, tmp_path / "states", "math", folder=tmp_path, limit_s=40)
