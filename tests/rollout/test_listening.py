"""Whom a listener hears, and whom it ends, on processes of which a test says when they are ready."""

import time
from itertools import cycle

import pytest

from consilience.rollout.deadlines import DROPPED, REDISPATCHED, REPLACED, Stall, StallLog
from consilience.rollout.dispatch import Dispatch
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.listening import Listener, Share, WorkerDied


class Scripted:
    """looks: what each call of `ready` finds, of the slots it asks for; dead: slots whose read says so."""

    def __init__(self, looks, dead=()):
        self.looks, self.dead, self.ended = iter(looks), dead, []

    def ready(self, streams, limit_s):
        return [slot for slot in next(self.looks) if slot in streams]

    def read(self, stream, limit_s):
        if stream in self.dead:
            raise WorkerDied(f"{stream} is gone")
        return []

    def end_process(self, slot, stage, waited_s, limit_s, uids=()):
        self.ended.append(slot)
        return Stall(stage, waited_s, limit_s, f"worker {slot}", uids, REPLACED)

    def died(self, slot, waited_s, uids):
        return Stall("death", waited_s, 0.0, f"worker {slot}", uids, REPLACED)


def job(uid):
    return RolloutJob(f"s/{uid}", f"s/{uid}", "d", "chat", ({"role": "user", "content": "x"},), reward="x")


def listening(processes, *silent_s, stall_s=5.0, has_spoken=True, most_redispatches=0):
    """(hear, shares, stalls, dispatch): one worker for each time of silence, with one sample each."""
    now, log = time.monotonic(), StallLog()
    shares = [Share(f"stream {i}", None, now - s, has_spoken) for i, s in enumerate(silent_s)]
    dispatch = Dispatch([job(i) for i in range(len(shares))], len(shares), most_redispatches)
    listener = Listener(processes, log, stall_s)
    return lambda: listener.hear(shares, dispatch), shares, log.stalls, dispatch


def test_one_that_was_heard_least_recently_is_heard_first():
    hear, *_ = listening(Scripted(cycle([[0, 1, 2]])), 1.0, 3.0, 2.0)
    assert [hear()[0] for _ in range(5)] == [1, 2, 0, 1, 2]


def test_a_silent_one_is_ended_though_another_one_speaks():
    processes = Scripted([[0], []])
    hear, _, stalls, dispatch = listening(processes, 0.0, 9.0)
    slot, batch, why = hear()
    assert (slot, batch, processes.ended) == (1, None, [1]) and "silent in 'stream' for 9.0 s" in why
    assert [(s.uids, s.action) for s in stalls] == [(tuple(dispatch.pending[1]), REDISPATCHED)]


def test_who_is_ready_when_it_alone_is_asked_was_not_silent():
    """The driver was stopped for an hour: what workers said meanwhile may reach it one after the other."""
    processes = Scripted([[], [0], [1]])
    hear, _, stalls, _ = listening(processes, 3600.0, 3601.0)
    assert hear() == (1, [], "") and (processes.ended, stalls) == ([], [])


@pytest.mark.parametrize(("most", "action"), [(1, REDISPATCHED), (0, DROPPED)])
def test_a_death_before_the_first_word_counts_against_its_samples(most, action):
    processes = Scripted([[0]], dead=("stream 0",))
    hear, _, stalls, dispatch = listening(processes, 1.0, has_spoken=False, most_redispatches=most)
    assert hear() == (0, None, "stream 0 is gone")
    assert [(s.stage, s.uids, s.action) for s in stalls] == [("death", ("s/0",), action)]
    assert (dispatch.num_dropped, list(dispatch.pending[0])) == (1 - most, ["s/0"] * most)


def test_nobody_speaks_and_all_are_within_their_time():
    assert listening(Scripted([[]]), 1.0, 4.0)[0]() == (None, None, "")
