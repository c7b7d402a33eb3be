"""Rollout workers over a real vLLM, each in a process of its own that ends itself by `kill -9`.

A death lies between two steps of the engine, whose number comes from a seed: so it looks at no token, and a
second run has the same deaths.
"""

import itertools
import multiprocessing
import os
import random
import signal
from dataclasses import replace

import torch
from tiny_qwen import SETTINGS, build_engine, read_checkpoint

from consilience.model.digest import weights_digest
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.worker import RolloutWorker

MOST_TOKENS, MEAN_TOKENS = 120, 27  # of a sample; the second is what the model below gives
STOPS = tuple(range(100, 108))  # eight of 272 ids end a sample
MAX_ROWS = 2500
SILENCE_S = 240.0  # a start of vLLM takes 17 s on an idle core
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["transformers", "vllm", "vllm.v1.engine.llm_engine"])  # 9 s of each start


def jobs(num, first_seed):
    """`num` samples of one short prompt, hot enough that all of them differ."""
    sampling = SamplingParams(max_tokens=MOST_TOKENS, temperature=2.0, stop_ids=STOPS)
    return [
        RolloutJob(
            f"s/{i}",
            "s",
            "d",
            "chat",
            ({"role": "user", "content": "x"},),
            max_tokens=MOST_TOKENS,
            sampling=replace(sampling, seed=first_seed + i),
        )
        for i in range(num)
    ]


def lengths(checkpoint, folder, wanted, rng, *, life, renew=None):
    """Sampled tokens of every job, over as many processes as it takes, and how many of them died.

    rng    decides when they die, every `life` steps on average; None: nobody does
    renew  None: the next one goes on from the log. Else it starts what is missing from the prompt, on the job
           that renew(job, attempt) makes of it: another draw, as in a framework whose seeds are not kept
    """
    done: dict[str, int] = {}
    for attempt in itertools.count():
        missing = [job for job in wanted if job.uid not in done]
        if not missing:
            return [done[job.uid] for job in wanted], attempt - 1
        fence(folder)
        if renew is not None:
            missing = [renew(job, attempt) for job in missing]
        steps = None if rng is None else int(rng.expovariate(1 / life)) + 1
        before = len(done)
        for batch in _life(checkpoint, folder if renew is None else None, missing, steps):
            done |= batch
        if steps is None and len(done) == before:
            raise RuntimeError("a worker ended without a record and nobody had killed it; its error is above")
    raise AssertionError("unreachable")


def _life(checkpoint, folder, missing, steps):
    """What one process sends, until its end: uid -> sampled tokens."""
    ours, theirs = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_work, args=(theirs, checkpoint, folder, missing, steps))
    process.start()
    theirs.close()
    try:
        while ours.poll(SILENCE_S):
            yield ours.recv()  # no limit: poll has said that something is there
        raise RuntimeError(f"a worker said nothing for {SILENCE_S:.0f} s")
    except EOFError:
        process.join(SILENCE_S)
    finally:
        process.kill()
        ours.close()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a worker ended with exit code {process.exitcode}; its error stands above")


def _work(pipe, checkpoint, folder, missing, steps):
    """(worker process)"""
    torch.set_num_threads(1)
    settings = SETTINGS | {"kv_cache_memory_bytes": 256 << 20}
    engine = build_engine(checkpoint, max_rows=MAX_ROWS, settings=settings)
    weights = read_checkpoint(checkpoint)
    engine.publish(weights, weights_digest(weights), 1)
    if steps is not None:
        engine.step = _mortal(engine.step, steps)
    worker = RolloutWorker(engine, byte_tokenizer(), None, FakeGrader(), flush_s=0.0)
    lease = None if folder is None else take_lease(folder, "w")
    for batch in worker.stream(missing, lease):
        pipe.send({record.uid: record.num_sampled for record in batch})
    worker.close()
    engine.close()


def _mortal(step, steps):
    left = iter(range(steps))

    def step_or_die():
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return step()

    return step_or_die


def anew(job, attempt):
    """The job with the seed of another draw."""
    seed = random.Random(f"{job.sampling.seed}/{attempt}").getrandbits(62)
    return replace(job, sampling=replace(job.sampling, seed=seed))
