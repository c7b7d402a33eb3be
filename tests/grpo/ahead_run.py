"""A whole GRPO stage in one process, on a native engine in exact mode; for test_async_train.py."""

import time
from dataclasses import replace

import torch
from small_trainer import CONFIG

from consilience.grpo.async_train import train_grpo_ahead
from consilience.grpo.train import GrpoSettings, GrpoStage, train_grpo
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.local_streams import LocalStreams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.store import RolloutStore
from consilience.rollout.worker import RolloutWorker
from consilience.training.checkpoint import CheckpointMeta
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

TOKENIZER = byte_tokenizer()
META = CheckpointMeta(stage="grpo", seed=3, step=0, special_tokens={"<bos>": 0})
STEPS, GROUPS, GROUP, TOKENS = 4, 2, 3, 24


def small_model(seed=0):
    """Its end-of-sentence is likely enough for answers of many lengths."""
    model = initialize(Transformer(replace(CONFIG, vocab_size=272)), seed)
    with torch.no_grad():
        model.head.weight[TOKENIZER.eos_id] *= 3
    return model


def jobs_of(step):
    jobs = []
    for i in range(GROUPS * GROUP):
        group = f"s/{step}/{i // GROUP}"
        sampling = SamplingParams(1.0, TOKENS, (), 1000 * step + i)
        messages = ({"role": "user", "content": group},)
        uid = f"{group}/{i % GROUP}"
        jobs.append(
            RolloutJob(uid, group, "d", "chat", messages, reward="x", max_tokens=TOKENS, sampling=sampling)
        )
    return jobs


class SlowEngine(NativeEngine):
    """Takes `step_s` longer a step, and tells `on_step` of it."""

    step_s, on_step = 0.0, staticmethod(lambda: None)

    def step(self):
        time.sleep(self.step_s)
        self.on_step()
        return super().step()


def worker(step_s=0.0, on_step=lambda: None):
    engine = SlowEngine(small_model(9), max_rows=32, max_length=90, exact=True)
    engine.step_s, engine.on_step = step_s, on_step
    score = lambda item: float(sum(item.token_ids) % 7)
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(score), max_context=90, flush_s=0.0)


class Direct:
    """The synchronous driver's sampler: the worker itself."""

    def __init__(self, worker):
        self.worker, self.publish = worker, worker.publish

    def generate(self, jobs, on_progress=None, *, durable=None):
        fence(durable.log_folder)
        records = {}
        for batch in self.worker.stream(jobs, take_lease(durable.log_folder, "direct")):
            durable.keep(batch)
            records |= {r.uid: r for r in batch}
        return [records[job.uid] for job in jobs]


def run(folder, mode, *, max_age=1, recompute=False, lr=3e-3, every_s=1e9, log=None, step_s=0.0, hooks=None):
    """(model, rows, records by step) of a stage in `folder`, which goes on where it was cut short.

    hooks  {"step": function of a decoding step, "streams": what to put around the streams}
    """
    torch.set_num_threads(1)
    hooks = hooks or {}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer-source.json").write_text("{}")
    engine = TorchEngine(
        small_model(), OptimizerSettings(lr=lr, weight_decay=0.0, bias_speed=1e-3 if lr else 0.0), exact=True
    )
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer-source.json", META, every_s=every_s
    )
    start, cursor = checkpoints.resume()
    log = log or MemorySink()
    stage = GrpoStage(
        engine,
        small_model(),
        GrpoSettings(STEPS, seed=2),
        store=RolloutStore(folder / "rollouts"),
        decode=str,
        checkpoints=checkpoints,
        log=log,
        clock=StageClock(earlier=cursor.get("clock")),
        progress=SilentProgress(),
    )
    own = worker(step_s, hooks.get("step", lambda: None))
    try:
        if mode == "sync":
            result = train_grpo(stage, Direct(own), jobs_of, start=start)
        else:
            with LocalStreams(own, recompute=recompute) as streams:
                result = train_grpo_ahead(
                    stage,
                    hooks.get("streams", lambda s: s)(streams),
                    jobs_of,
                    max_age=max_age,
                    is_whole=mode == "one_step_off",
                    start=start,
                )
    finally:
        own.close()
    checkpoints.save(STEPS, {"clock": stage.clock.state()})
    return engine.model, log.rows, result
