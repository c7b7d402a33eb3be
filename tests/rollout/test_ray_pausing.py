"""Real Ray workers with the native engine: a call that is interrupted, a node that is taken away."""

import contextlib
import os
import signal
from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.phases import Durable
from consilience.rollout.ray_streams import ray_streams
from consilience.rollout.ray_workers import RolloutPool, ray_cluster
from consilience.rollout.worker import RolloutWorker

torch.set_num_threads(1)

TOKENIZER = byte_tokenizer()
MODEL = initialize(Transformer(replace(CONFIG, vocab_size=TOKENIZER.vocab_size)), 0)
WEIGHTS = to_official(MODEL)
DIGEST = weights_digest(WEIGHTS)

FACTORY = """
import json, time
from consilience.model.config import ModelConfig
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.worker import RolloutWorker


class Slow(NativeEngine):
    def step(self):
        time.sleep(0.02)
        return super().step()


def build(config):
    model = initialize(Transformer(ModelConfig.from_json_dict(config)), 7)
    engine = Slow(model, max_rows=8, max_length=256, exact=True)
    return RolloutWorker(engine, byte_tokenizer(), flush_s=0.0, heartbeat_s=0.1)
"""


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """One worker each, of a pool that samples phase by phase, and of one that samples ahead."""
    folder = tmp_path_factory.mktemp("factory")
    (folder / "native_factory.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        stack.enter_context(ray_cluster(2, object_store_bytes=100 << 20))
        kwargs = {"config": MODEL.config.to_json_dict()}
        opened = {}
        for mode in ("sync", "ahead"):
            pool = RolloutPool(1, "native_factory:build", kwargs, is_continuous=mode == "ahead")
            opened[mode] = stack.enter_context(pool)
            pool.publish(WEIGHTS, DIGEST, 0)
        yield opened


def jobs():
    messages = ({"role": "user", "content": "Count."},)
    return [
        RolloutJob(f"j{n}", f"j{n}", "d", "chat", messages, max_tokens=60, sampling=SamplingParams(seed=n))
        for n in range(6)
    ]


def plain(records):
    facts = ({k: v for k, v in r.metadata.items() if k != "resumed_at"} for r in records)
    return [replace(r, metadata=fact).to_json() for r, fact in zip(records, facts)]


@pytest.fixture(scope="module")
def undisturbed():
    engine = NativeEngine(MODEL, max_rows=8, max_length=256, exact=True)
    worker = RolloutWorker(engine, TOKENIZER)
    try:
        return plain(worker.run(jobs()))
    finally:
        worker.close()


@contextlib.contextmanager
def once_begun(folder, act):
    """Do `act` in the main thread once, when tokens of about ten steps are in the log."""

    def look(*_):
        if sum(path.stat().st_size for path in folder.glob("*.log")) > 2500:
            signal.setitimer(signal.ITIMER_REAL, 0)
            act()

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def interrupt():
    raise KeyboardInterrupt


def sample(pool, mode, missing, durable, kept):
    if mode == "sync":
        pool.generate(missing, durable=durable)
        return
    with ray_streams(pool) as streams:
        streams.hand_over(missing, durable)
        while len(kept) < 6:
            streams.hear()


def begin(folder):
    kept = {}
    return Durable(folder, lambda records: kept.update({r.uid: r for r in records})), kept


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["sync", "ahead"])
def test_an_interrupted_call_leaves_states_from_which_the_next_one_goes_on(
    pools, undisturbed, mode, tmp_path
):
    folder, pool = tmp_path / "log", pools[mode]
    durable, kept = begin(folder)
    with pytest.raises(KeyboardInterrupt), once_begun(folder, interrupt):
        sample(pool, mode, jobs(), durable, kept)
    missing = [job for job in jobs() if job.uid not in kept]
    # Who had just sampled its last token has no state any more, and needs none.
    assert 0 < len(list((folder / "streams").glob("*/*.stream"))) <= len(missing)
    (before,) = pool.states()
    sample(pool, mode, missing, durable, kept)
    (after,) = pool.states()
    assert plain([kept[job.uid] for job in jobs()]) == undisturbed
    assert after.prefill_tokens == before.prefill_tokens and after.saved_tokens > before.saved_tokens
    assert not (folder / "streams").exists()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["sync", "ahead"])
def test_a_worker_whose_node_is_taken_away_saves_its_streams_and_another_one_goes_on(
    pools, undisturbed, mode, tmp_path
):
    folder, pool = tmp_path / "log", pools[mode]
    durable, kept = begin(folder)
    (pid,) = pool.pids
    with once_begun(folder, lambda: os.kill(pid, signal.SIGTERM)):
        sample(pool, mode, jobs(), durable, kept)
    assert pool.num_replaced == 1 and pool.pids != [pid] and not pool.stalls
    (state,) = pool.states()
    assert plain([kept[job.uid] for job in jobs()]) == undisturbed
    assert state.prefill_tokens == 0 and state.saved_tokens > 0
    assert not (folder / "streams").exists()
