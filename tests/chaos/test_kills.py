"""kill -9 at random: driver, worker, both; workers frozen and woken. Then every sample was trained on exactly
once, and every token and log-probability is that of the run nobody disturbed.

    CHAOS_KILLS=100 python -m pytest tests/chaos        (`make chaos`)
"""

import hashlib
import json
import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked_pool import ForkedPool
from small_policy import CONFIG

from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.frame_file import read_frames
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.phases import sample_phase
from consilience.rollout.store import RolloutStore
from consilience.rollout.worker import RolloutWorker

NUM_KILLS = int(os.environ.get("CHAOS_KILLS", "12"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
STEPS, SAMPLES, GROUP, TOKENS = 5, 6, 2, 30
MEAN_BYTES = 4000  # logged between two kills; a step of all samples is 140, taking over up to 3,000

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
MODEL = initialize(Transformer(replace(CONFIG, vocab_size=272)), 0)


def build(version):
    engine = NativeEngine(MODEL, max_rows=SAMPLES, max_length=90, exact=True, version=version)
    options = {"max_context": 90, "flush_s": 0.01, "heartbeat_s": 0.2}
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), **options)


def jobs_of(step):
    jobs = []
    for i in range(SAMPLES):
        group = f"chaos/{step}/{i // GROUP}"
        messages = ({"role": "user", "content": group},)
        sampling = SamplingParams(1.0, TOKENS, (), 1000 * step + i)
        jobs.append(
            RolloutJob(
                f"{group}/{i % GROUP}",
                group,
                "math",
                "chat",
                messages,
                reward="x",
                max_tokens=TOKENS,
                sampling=sampling,
            )
        )
    return jobs


def live(folder):
    """A driver's life: resume, sample, "train" (weights are a chain of hashes), checkpoint at times."""
    checkpoint, store = folder / "checkpoint.json", RolloutStore(folder / "rollouts")
    state = (
        json.loads(checkpoint.read_text())
        if checkpoint.exists()
        else {"step": 0, "weights": "", "resumed": 0}
    )
    store.ledger.resumed(state["step"])
    pool = ForkedPool(build, folder / "workers")
    while state["step"] < STEPS:
        pool.version = state["step"]
        records = sample_phase(store, state["step"], pool, jobs_of)
        for record in records:
            facts = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
            state["resumed"] += "resumed_at" in record.metadata
            line = replace(record, metadata=facts).to_json()
            state["weights"] = hashlib.sha256(
                (state["weights"] + line).encode("utf-8", "surrogatepass")
            ).hexdigest()
        store.ledger.trained(state["step"], [r.uid for r in records])
        state["step"] += 1
        if state["step"] % 2 == 0 or state["step"] == STEPS:
            checkpoint.with_suffix(".new").write_text(json.dumps(state))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    store.ledger.check()


def driver(folder):
    """Process id of a forked driver."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            live(folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def has_ended(pid):
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"a driver failed: {status}"
    return bool(found)


def workers(folder):
    path = folder / "workers"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def send(pid, number):
    """Whether the process was there. Workers are grandchildren; an ended one of a dead driver is nobody's."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def logged_bytes(folder):
    total = 0
    for path in (folder / "rollouts").rglob("*.log"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def wait(folder, rng, pid, deadline):
    """Until the next kill: mostly some logged bytes on, at the machine's own pace, at times at once."""
    if rng.random() < 0.2:
        time.sleep(rng.uniform(0, 0.1))
        return
    last, left = logged_bytes(folder), rng.expovariate(1 / MEAN_BYTES)
    while left > 0 and time.monotonic() < deadline:
        time.sleep(0.005)
        now = logged_bytes(folder)
        left, last = left - max(0, now - last), now
        if _command(pid) == b"":  # it has ended
            return


def disturb(folder, rng, limit_s):
    """Run the driver to its end through random kills; how many there were."""
    kills, frozen = {"driver": 0, "worker": 0, "both": 0, "freeze": 0}, []
    pid, deadline = driver(folder), time.monotonic() + limit_s
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"stuck after {kills}"
        wait(folder, rng, pid, deadline)
        for worker in frozen:
            send(worker, signal.SIGCONT)
        frozen.clear()
        if has_ended(pid):
            break
        kind = rng.choices(list(kills), (4, 4, 1, 2))[0]
        newest = workers(folder)[-1:]
        if kind in ("worker", "both"):
            kills[kind] += any(send(worker, signal.SIGKILL) for worker in newest)
        elif kind == "freeze" and any(send(worker, signal.SIGSTOP) for worker in newest):
            kills[kind] += 1
            frozen = newest
        if kind in ("driver", "both"):
            send(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills[kind] += kind == "driver"
            pid = driver(folder)
    return sum(kills.values())


def end_workers(folder):
    for pid in workers(folder):
        if b"pytest" in _command(
            pid
        ):  # a forked worker has our command line; its number may be another's by now
            send(pid, signal.SIGKILL)


def _command(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    os.waitpid(driver(folder), 0)
    return json.loads((folder / "checkpoint.json").read_text())


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


@pytest.mark.timeout(300 + 30 * NUM_KILLS)
def test_every_sample_is_trained_on_once_and_is_the_undisturbed_one(tmp_path, undisturbed):
    assert undisturbed["step"] == STEPS and undisturbed["resumed"] == 0
    rng, num_kills, num_resumed, run = random.Random(SEED), 0, 0, 0
    while num_kills < NUM_KILLS:
        folder = tmp_path / str(run)
        folder.mkdir()
        try:
            num_kills += disturb(folder, rng, limit_s=600)
        finally:
            end_workers(folder)
        state = json.loads((folder / "checkpoint.json").read_text())
        assert state["weights"] == undisturbed["weights"], f"run {run} of seed {SEED}"
        assert trainings(folder) == {job.uid: 1 for step in range(STEPS) for job in jobs_of(step)}
        assert not list((folder / "rollouts").glob("*.partial")) and len(list(folder.rglob("*.log"))) == 1
        num_resumed, run = num_resumed + state["resumed"], run + 1
    print(f"{num_kills} kills in {run} runs; {num_resumed} samples went on from a log")
    assert num_resumed > 0
