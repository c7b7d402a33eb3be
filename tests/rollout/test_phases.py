"""A phase that is cut short goes on with what has no record yet; nothing is asked for twice."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from consilience.conf.errors import EngineError
from consilience.rollout.dispatch import DROPPED
from consilience.rollout.phases import sample_phase
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore


def record(uid):
    return RolloutRecord(
        uid, uid, "math", "chat", None, (1,), (5, 1), (-0.5, -0.25), (1, 1), (0, 0), FinishReason.STOP,
        Outcome(OutcomeKind.GRADED, "text \udcff"), 1.0,
    )  # fmt: skip


def jobs_of(step):
    return [SimpleNamespace(uid=f"{step}/{i}") for i in range(6)]


class Dropping:
    """Gives up `uids`, whose groups are `uid // 2`, and hands out records of the others."""

    def __init__(self, uids):
        self.uids, self.asked = uids, []

    def generate(self, jobs, on_progress=None, *, durable=None):
        self.asked = [job.uid for job in jobs]
        records = []
        for job in jobs:
            group = str(int(job.uid.split("/")[1]) // 2)
            lost = {DROPPED: "why"} if job.uid in self.uids else {}
            records.append(replace(record(job.uid), group=group, metadata=lost))
        durable.keep([r for r in records if not r.metadata])
        return records


class Sampler:
    """Hands out records two by two; breaks off after `num_calls` of `keep`."""

    def __init__(self, num_calls=99):
        self.num_calls, self.asked = num_calls, []

    def generate(self, jobs, on_progress=None, *, durable=None):
        self.asked, self.durable = [job.uid for job in jobs], durable
        durable.log_folder.mkdir(parents=True, exist_ok=True)
        records = [record(job.uid) for job in reversed(jobs)]
        for first in range(0, len(records), 2):
            if first // 2 == self.num_calls:
                raise KeyboardInterrupt
            durable.keep(records[first : first + 2])
        return records


def test_records_are_kept_as_they_arrive_and_a_cut_phase_goes_on_with_the_rest(tmp_path):
    cut, rest, never = Sampler(2), Sampler(), Sampler()
    with pytest.raises(KeyboardInterrupt):
        sample_phase(RolloutStore(tmp_path), 4, cut, jobs_of)
    store = RolloutStore(tmp_path)
    assert store.phases() == [] and store.log_folder("000004").exists()
    records = sample_phase(store, 4, rest, jobs_of)
    assert (cut.asked, rest.asked) == ([f"4/{i}" for i in range(6)], ["4/0", "4/1"])
    assert records == [record(f"4/{i}") for i in range(6)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000004.jsonl", "ledger.log", "token_log"]
    assert not store.log_folder("000004").exists()
    assert sample_phase(RolloutStore(tmp_path), 4, never, jobs_of) == records and never.asked == []
    assert RolloutStore(tmp_path).ledger.missing() == [f"4/{i}" for i in range(6)]


def test_a_phase_of_a_folder_without_a_ledger_enters_it(tmp_path):
    store = RolloutStore(tmp_path)
    store.append("000002", [record("2/0")])
    sample_phase(store, 2, Sampler(), jobs_of)
    store.ledger.trained(2, ["2/0"])
    store.ledger.check()


def test_a_record_that_was_kept_just_before_the_crash_is_stored_in_the_ledger_too(tmp_path):
    store = RolloutStore(tmp_path)
    store.ledger.issued(1, [f"1/{i}" for i in range(6)])
    partial = store.partial("000001")
    partial.add([record("1/3")])
    partial.add([record("1/3")])
    partial.close()
    sampler = Sampler()
    sample_phase(RolloutStore(tmp_path), 1, sampler, jobs_of)
    assert "1/3" not in sampler.asked and len(sampler.asked) == 5
    ledger = RolloutStore(tmp_path).ledger
    ledger.trained(1, ledger.missing())


@pytest.mark.parametrize("survives_power", [False, True])
def test_workers_are_told_what_their_logs_must_survive(tmp_path, survives_power):
    sampler = Sampler()
    sample_phase(RolloutStore(tmp_path, survives_power=survives_power), 0, sampler, jobs_of)
    assert sampler.durable.survives_power is survives_power


def test_a_dropped_sample_takes_its_group_along_and_the_phase_goes_on_with_the_rest(tmp_path):
    store = RolloutStore(tmp_path)
    records = sample_phase(store, 3, Dropping({"3/2"}), jobs_of)
    assert [r.uid for r in records] == ["3/0", "3/1", "3/4", "3/5"]
    assert (store.health[3]["dropped_samples"], store.health[3]["dropped_groups"]) == (2, 1)
    assert len(list(store.read("000003"))) == 6
    store.ledger.trained(3, [r.uid for r in records])
    store.ledger.check()
    again = RolloutStore(tmp_path)  # after a resume the same ones are left out, from the file alone
    again.ledger.resumed(3)
    assert sample_phase(again, 3, Sampler(), jobs_of) == records and again.health == store.health
    again.ledger.trained(3, [r.uid for r in records])
    again.ledger.check()


def test_a_phase_of_which_nothing_is_left_is_an_error_and_its_lost_samples_are_tried_anew(tmp_path):
    store = RolloutStore(tmp_path)
    with pytest.raises(EngineError, match="step 1: every group"):
        sample_phase(store, 1, Dropping({"1/0", "1/2", "1/4"}), jobs_of)
    assert store.phases() == []
    again = Dropping(set())
    records = sample_phase(RolloutStore(tmp_path), 1, again, jobs_of)
    assert again.asked == ["1/0", "1/2", "1/4"] and len(records) == 6
