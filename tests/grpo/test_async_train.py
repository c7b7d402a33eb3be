"""Sampling ahead of the trainer: the synchronous run at age 0, one version back, or a bounded age."""

import json
import os
import signal
import sys
import traceback

import pytest
import torch
from ahead_run import STEPS, jobs_of, run, small_model

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.frame_file import read_frames
from consilience.rollout.store import RolloutStore
from consilience.training.checkpoint import load_checkpoint
from consilience.training.metrics import MemorySink

torch.set_num_threads(1)


def digest(model):
    return weights_digest(to_official(model))


def stored(folder):
    store = RolloutStore(folder / "rollouts")
    return [list(store.read(phase)) for phase in store.phases()]


def versions(record):
    return [v for v, m in zip(record.weight_version, record.loss_mask) if m]


@pytest.fixture(scope="module")
def synchronous(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sync")
    return folder, *run(folder, "sync")


@pytest.fixture(scope="module")
def one_step_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return folder, *run(folder, "one_step_off")


def test_answers_have_many_lengths_and_training_moves_the_weights(synchronous):
    folder, model, rows, result = synchronous
    lengths = {r.num_sampled for phase in stored(folder) for r in phase}
    assert len(lengths) > 3 and min(lengths) < 24
    assert len({row["reward"] for row in rows}) > 1 and digest(model) != digest(small_model())
    assert result["mismatch_max"] == 0.0 and [row["age_max"] for row in rows] == [0.0] * STEPS


@pytest.mark.parametrize("mode", ["async", "one_step_off"])
def test_nothing_ahead_gives_the_synchronous_runs_weights_to_the_bit(tmp_path, synchronous, mode):
    folder, model, rows, result = synchronous
    again, its_rows, its_result = run(tmp_path, mode, max_age=0)
    assert digest(again) == digest(model) and its_result == result and its_rows == rows
    for ours, theirs in zip(stored(tmp_path), stored(folder), strict=True):
        assert [r.to_json() for r in ours] == [r.to_json() for r in theirs]


def test_one_step_off_samples_each_step_by_one_version_the_one_before(tmp_path, one_step_off, synchronous):
    folder, model, rows, result = one_step_off
    for step, records in enumerate(stored(folder)):
        assert {v for r in records for v in versions(r)} == {max(step - 1, 0)}
    assert [(row["age_max"], row["age_mean"]) for row in rows] == [(0.0, 0.0)] + [(1.0, 1.0)] * (STEPS - 1)
    assert rows[2]["tokens_by_version"] == {"1": sum(len(versions(r)) for r in stored(folder)[2])}
    assert ["mismatch_max" in row for row in rows] == [True] + [False] * (STEPS - 1)
    assert all(row["drift_max"] > 0 for row in rows[1:]) and result["mismatch_max"] == 0.0
    again, its_rows, _ = run(tmp_path, "one_step_off")
    assert digest(again) == digest(model) and its_rows == rows
    assert digest(model) != digest(synchronous[1])


@pytest.mark.parametrize("recompute", [False, True])
def test_weights_change_between_two_tokens_and_no_token_is_too_old(tmp_path, recompute):
    _, rows, _ = run(tmp_path, "async", max_age=2, recompute=recompute, step_s=0.02)
    phases = stored(tmp_path)
    assert max(row["age_max"] for row in rows) == 2.0
    for step, records in enumerate(phases):
        assert [r.uid for r in records] == [job.uid for job in jobs_of(step)]
        for record in records:
            assert versions(record) == sorted(versions(record))
            assert step - 2 <= min(versions(record)) and max(versions(record)) <= step
    mixed = [r for records in phases for r in records if len(set(versions(r))) > 1]
    assert mixed  # requests were interrupted, and went on
    counts = {}
    for records in phases:
        for r in records:
            for v in versions(r):
                counts[v] = counts.get(v, 0) + 1
    told = {}
    for row in rows:
        for v, n in row["tokens_by_version"].items():
            told[int(v)] = told.get(int(v), 0) + n
    assert told == counts


@pytest.mark.parametrize("recompute", [False, True])
def test_at_learning_rate_zero_old_and_new_log_probabilities_are_the_same_bits(tmp_path, recompute):
    """The loss's old log-probabilities are the sampler's, wherever weights arrived in between."""
    _, rows, _ = run(tmp_path, "async", max_age=2, recompute=recompute, lr=0.0, step_s=0.005)
    assert max(row["age_max"] for row in rows) > 0
    assert [row["max_abs_log_ratio"] for row in rows] == [0.0] * STEPS


class Deadly:
    """Streams whose driver dies in the middle of the n-th call of a verb."""

    def __init__(self, streams, verb, left):
        self._streams, self._verb, self._left = streams, verb, left

    def __getattr__(self, name):
        do = getattr(self._streams, name)
        if name != self._verb:
            return do

        def die(*args):
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
            return do(*args)

        return die


class DeadlySink(MemorySink):
    def __init__(self, at):
        super().__init__()
        self.at = at

    def scalars(self, step, values):
        if step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().scalars(step, values)


def kill_at(point, at):
    """Arguments of `run` that end the process at the n-th event of a kind."""
    if point == "note":  # trained on and published, not in a checkpoint
        return {"log": DeadlySink(at)}
    if point == "step":
        left = iter(range(at))
        return {"hooks": {"step": lambda: next(left, None) is None and os.kill(os.getpid(), signal.SIGKILL)}}
    return {"hooks": {"streams": lambda streams: Deadly(streams, point, at)}}


def in_a_process(folder, mode, **options):
    """Exit code of a forked driver, negative: the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(folder, mode, **options)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def trainings(folder):
    """uid -> times the surviving weights have seen it, from the ledger's bytes alone."""
    events: list[tuple[int, str]] = []
    for payload in read_frames(folder / "rollouts" / "ledger.log").payloads:
        row = json.loads(payload)
        if row["event"] == "trained":
            events += [(row["step"], uid) for uid in row["uids"]]
        elif row["event"] == "resumed":
            events = [event for event in events if event[0] < row["step"]]
    seen = {}
    for _, uid in events:
        seen[uid] = seen.get(uid, 0) + 1
    return seen


POINTS = [("hand_over", 2), ("hear", 5), ("publish", 2), ("note", 3), ("step", 9), ("step", 40), ("note", 1)]


@pytest.mark.parametrize("every_s", [0.0, pytest.param(1e9, marks=pytest.mark.slow)], ids=["saved", "never"])
@pytest.mark.parametrize("mode", ["one_step_off", "async"])
def test_a_driver_that_is_killed_anywhere_loses_nothing_and_trains_on_each_sample_once(
    tmp_path, one_step_off, mode, every_s
):
    options = {"max_age": 2 if mode == "async" else 1, "every_s": every_s, "step_s": 0.001}
    killed = [in_a_process(tmp_path, mode, **options, **kill_at(*point)) for point in POINTS]
    assert killed.count(-signal.SIGKILL) >= 4 and set(killed) <= {0, -signal.SIGKILL}
    assert in_a_process(tmp_path, mode, **options) == 0
    assert trainings(tmp_path) == {job.uid: 1 for step in range(STEPS) for job in jobs_of(step)}
    for step, records in enumerate(stored(tmp_path)):
        ages = [step - v for r in records for v in versions(r)]
        assert min(ages) >= 0 and max(ages) <= options["max_age"]
    assert not list((tmp_path / "rollouts").glob("*.partial")) and sorted(
        p.name for p in tmp_path.rglob("*.log")
    ) == ["ledger.log", "publications.log"]
    if mode == "one_step_off":
        model, _ = load_checkpoint(tmp_path / "checkpoints" / f"step-{STEPS:06d}")
        assert digest(model) == digest(one_step_off[1])
        theirs, ours = stored(one_step_off[0]), stored(tmp_path)
        plain = lambda r: (r.uid, r.token_ids, r.logprobs, r.weight_version, r.reward)
        assert [[plain(r) for r in p] for p in ours] == [[plain(r) for r in p] for p in theirs]
