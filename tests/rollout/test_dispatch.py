import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import DROPPED as DROPPED_ACTION
from consilience.rollout.deadlines import REDISPATCHED, Stall
from consilience.rollout.dispatch import DROPPED, REDISPATCHES, STALLED, Dispatch
from consilience.rollout.drops import drop_groups
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phase_health import HEALTH, phase_health
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord


def job(uid):
    return RolloutJob(uid, uid.split("/")[0], "math", "chat", ({"role": "user", "content": uid},))


def record(uid, **metadata):
    return RolloutRecord(
        uid, uid.split("/")[0], "math", "chat", None, (1,), (5, 1), (-0.5, -0.25), (1, 1), (0, 0),
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0, metadata=metadata,
    )  # fmt: skip


def stalled(uid):
    return record(uid, **{STALLED: Stall("tool", 9.0, 5.0, uids=(uid,)).to_dict()})


def dispatch(most=2, num_groups=2):
    return Dispatch([job(f"g{g}/{i}") for g in range(num_groups) for i in range(2)], 1, most)


def test_a_stalled_sample_is_given_out_again_and_its_next_record_says_how_often():
    work = dispatch()
    new, stalls = work.take(0, [record("g0/0"), stalled("g0/1"), record("g9/9")])
    assert [r.uid for r in new] == ["g0/0"] and [s.uids for s in stalls] == [("g0/1",)]
    assert work.lost(0, ["g0/1"], "9 s in 'tool'") == (["g0/1"], [])
    assert [j.uid for j in work.next_jobs(0)] == ["g0/1", "g1/0", "g1/1"]
    new, _ = work.take(0, [record("g0/1"), record("g1/0"), record("g1/1"), record("g0/1")])
    assert [r.metadata for r in new] == [{REDISPATCHES: 1}, {}, {}]
    assert [r.uid for r in work.in_order()] == ["g0/0", "g0/1", "g1/0", "g1/1"]


def test_after_its_limit_a_sample_is_dropped_and_its_group_is_asked_for_no_more():
    work = dispatch(most=2)
    for _ in range(2):
        assert work.lost(0, ["g0/1"], "why") == (["g0/1"], [])
    assert work.lost(0, ["g0/1"], "9 s in 'tool'") == ([], ["g0/1"])
    assert [j.uid for j in work.next_jobs(0)] == ["g1/0", "g1/1"]
    work.take(0, [record("g1/0"), record("g1/1")])
    records = work.in_order()
    assert [r.metadata.get(DROPPED) for r in records] == ["9 s in 'tool'", "9 s in 'tool'", None, None]
    assert [r.metadata.get(REDISPATCHES) for r in records] == [0, 3, None, None]
    gone = records[1]
    assert (gone.finish, gone.outcome.kind, gone.reward) == (FinishReason.ABORT, OutcomeKind.INFRA, None)


def test_a_worker_lost_before_a_word_counts_against_each_of_its_samples():
    work = dispatch(most=0)
    assert work.lost(0, ["g0/0", "g1/1"], "died") == ([], ["g0/0", "g1/1"])
    assert work.next_jobs(0) == []
    with pytest.raises(EngineError, match=r"all 4 samples were given out 1 times .* died"):
        work.in_order()


def test_a_sample_that_has_its_record_is_not_lost_any_more():
    work = dispatch(most=0)
    work.take(0, [record("g0/0")])
    assert work.lost(0, ["g0/0"], "late") == ([], [])


def test_two_jobs_of_one_uid_are_refused():
    with pytest.raises(EngineError, match="share a uid"):
        Dispatch([job("a/0"), job("a/0")], 2, 1)


def test_a_group_with_a_dropped_sample_goes_as_a_whole():
    records = [record("g0/0"), record("g0/1", **{DROPPED: "why"}), record("g1/0")]
    kept, dropped = drop_groups(records)
    assert [r.uid for r in kept] == ["g1/0"]
    assert {why: [r.uid for r in those] for why, those in dropped.items()} == {
        "g0/1: never came back: why": ["g0/0", "g0/1"]
    }


def test_the_health_of_a_phase_by_hand():
    records = [
        record("g0/0", resumed_at=7),
        record("g0/1", **{DROPPED: "why"}),
        record("g1/0", resumed_at=5, log_fault="a hole"),
    ]
    facts = {"host": "h", "pid": 1, "time": 1.0}
    stalls = [
        Stall("stream", 9, 5, "w", ("g0/0", "g1/0", "other/1"), REDISPATCHED, **facts),
        Stall("stream", 9, 5, "w", ("g0/1",), DROPPED_ACTION, **facts),
        Stall("tool", 9, 5, "w", ("elsewhere/0",), REDISPATCHED, **facts),
    ]
    assert phase_health(records, stalls) == dict(zip(HEALTH, (1, 2, 2, 1, 2, 12, 1)))
    assert phase_health([record("g0/0")], []) == dict.fromkeys(HEALTH, 0.0)
