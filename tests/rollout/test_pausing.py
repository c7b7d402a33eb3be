"""A worker that is paused between two steps: who goes on with its jobs computes nothing again."""

import time
from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG

from consilience.conf.errors import EngineError
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.continuous import Inbox, serve
from consilience.rollout.deadlines import Limits
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import ask_to_pause, fence, take_lease
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.worker import RolloutWorker

torch.set_num_threads(1)

TOKENIZER = byte_tokenizer()
MODEL = initialize(Transformer(replace(CONFIG, vocab_size=TOKENIZER.vocab_size)), 0)


def job(uid, num_tokens, group=None, **fields):
    sampling = SamplingParams(max_tokens=num_tokens, seed=sum(map(ord, uid)))
    messages = ({"role": "user", "content": f"Say {group or uid}."},)
    return RolloutJob(
        uid, group or uid, "d", "chat", messages, max_tokens=num_tokens, sampling=sampling, **fields
    )


JOBS = [job("a", 30), job("b", 12), job("c", 26), *(job(f"g{n}", 20 + n, "g") for n in range(3))]


def worker(**options):
    engine = NativeEngine(MODEL, max_rows=8, max_length=256, exact=True)
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.0, heartbeat_s=0.0, **options)


def plain(record):
    metadata = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
    return replace(record, metadata=metadata).to_json()


def undisturbed():
    whole = worker()
    try:
        return whole.run(JOBS)
    finally:
        whole.close()


def start_and_pause(folder, how, steps=16, **options):
    """Records that were final when a worker paused after `steps` steps; its lease."""
    first, lease, records = worker(**options), take_lease(folder, "one"), []
    stream = first.stream(JOBS, lease)
    for _ in range(steps):
        records += next(stream)
    if how == "driver":
        ask_to_pause([lease])
        time.sleep(0.3)  # the disk is looked at four times a second
    else:
        first.pause()
    for batch in stream:
        records += batch
    first.close()
    return records, lease


@pytest.mark.parametrize("how", ["driver", "signal"])
def test_a_paused_worker_ends_and_the_next_one_goes_on_without_a_prefill(how, tmp_path):
    expected = undisturbed()
    done, lease = start_and_pause(tmp_path, how)
    assert {r.uid for r in done} == {"b"} and lease.streams_folder.is_dir()
    fence(tmp_path)
    second = worker()
    rest = [j for j in JOBS if j.uid not in {r.uid for r in done}]
    records = {r.uid: r for r in done}
    for batch in second.stream(rest, take_lease(tmp_path, "two")):
        records |= {r.uid: r for r in batch}
    state = second.engine.state()
    second.close()
    assert [plain(records[j.uid]) for j in JOBS] == [plain(r) for r in expected]
    assert all(records[j.uid].metadata["resumed_at"] > 0 for j in rest)
    resumed = [records[j.uid] for j in rest]
    assert state.prefill_tokens == 0
    assert state.saved_tokens == sum(len(r.prompt_ids) + r.metadata["resumed_at"] - 1 for r in resumed)
    assert not lease.streams_folder.exists()


@pytest.mark.parametrize("what", ["limit", "lost"])
def test_what_was_not_saved_in_time_or_was_lost_is_computed_again(what, tmp_path):
    expected = undisturbed()
    limits = Limits(pause_s=0.0 if what == "limit" else 8.0)
    done, lease = start_and_pause(tmp_path, "signal", limits=limits)
    if what == "limit":
        assert not lease.streams_folder.exists()
    else:
        for path in lease.streams_folder.glob("*/*.stream"):
            path.write_bytes(path.read_bytes()[:100])
    fence(tmp_path)
    second = worker()
    records = {r.uid: r for r in done}
    rest = [j for j in JOBS if j.uid not in records]
    for batch in second.stream(rest, take_lease(tmp_path, "two")):
        records |= {r.uid: r for r in batch}
    assert second.engine.state().prefill_tokens > 0 and second.engine.state().saved_tokens == 0
    second.close()
    assert [plain(records[j.uid]) for j in JOBS] == [plain(r) for r in expected]


def test_the_pause_of_one_lease_is_no_pause_of_the_next(tmp_path):
    one = worker()
    lease = take_lease(tmp_path, "one")
    ask_to_pause([lease])
    assert [r for batch in one.stream(JOBS, lease) for r in batch] == []
    fence(tmp_path)
    records = {r.uid: r for batch in one.stream(JOBS, take_lease(tmp_path, "two")) for r in batch}
    one.close()
    assert [plain(records[j.uid]) for j in JOBS] == [plain(r) for r in undisturbed()]


def test_an_owner_that_was_fenced_saves_nothing(tmp_path):
    first, lease = worker(), take_lease(tmp_path, "one")
    stream = first.stream(JOBS, lease)
    for _ in range(3):
        next(stream)
    fence(tmp_path)
    first.pause()
    with pytest.raises(EngineError, match="taken over"):
        list(stream)
    first.close()
    assert not lease.streams_folder.exists()


def test_a_worker_that_takes_jobs_while_it_runs_saves_those_of_every_phase(tmp_path):
    expected = undisturbed()
    first, inbox, leases = worker(), Inbox(), []
    for number, jobs in enumerate((JOBS[:3], JOBS[3:])):
        leases.append(take_lease(tmp_path / str(number), "one"))
        inbox.submit(jobs, leases[-1])
    records = {}
    for step, batch in enumerate(serve(first, inbox)):
        records |= {r.uid: r for r in batch}
        if step == 15:
            ask_to_pause(leases)
            inbox.end()
    first.close()
    assert len(records) < 6 and all(lease.streams_folder.is_dir() for lease in leases)
    second, inbox = worker(), Inbox()
    for lease, jobs in zip(leases, (JOBS[:3], JOBS[3:])):
        fence(lease.folder)
        inbox.submit([j for j in jobs if j.uid not in records], take_lease(lease.folder, "two"))
    for batch in serve(second, inbox):
        records |= {r.uid: r for r in batch}
        if len(records) == 6:
            inbox.end()
    assert second.engine.state().prefill_tokens == 0
    second.close()
    assert [plain(records[j.uid]) for j in JOBS] == [plain(r) for r in expected]
    assert not any(lease.streams_folder.exists() for lease in leases)


def test_an_engine_that_cannot_save_ends_its_stream_all_the_same(tmp_path):
    engine = FakeRolloutEngine(lambda request, context: TOKENIZER.encode("x" * 50))
    fake = RolloutWorker(engine, TOKENIZER, FakeBoxes(1), FakeGrader(), flush_s=0.0, heartbeat_s=0.0)
    lease = take_lease(tmp_path, "one")
    stream = fake.stream(JOBS, lease)
    next(stream)
    fake.pause()
    assert [r for batch in stream for r in batch] == []
    fake.close()
    assert not lease.streams_folder.exists()
