"""A phase that is cut short goes on with what has no record yet; nothing is asked for twice."""

from types import SimpleNamespace

import pytest

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
