"""The distillation stage from end to end: one student, twelve teachers, every part but Ray.

    python bench/opd_end_to_end.py [--preset tiny|small] [--device cpu|cuda] [--phases 4] [--folder FOLDER]

What runs is the stage's own loop (`distill/train.py`): admission of twelve checkpoints with random weights of
distinct seeds, publication, sampling by the rollout worker in this process with its token log, scoring one
teacher at a time from disk, the hidden-state store, sorted mini-batches with one head on the device, the
update, a checkpoint after every phase. Says "ok" or "MISSED" for what must hold, and ends with status 1 if
something is missed. Called again with the folder of a run that was killed it goes on from there. Needs torch,
triton on a GPU, numpy, safetensors and tokenizers; no Ray, Hydra or wandb.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from opd_step import peak, reset_peak, verdict

from consilience.distill.train import DistillSettings, TeacherSide, train_distill
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.phases import Durable
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.worker import RolloutWorker
from consilience.teachers.admission import admit, check_loaded
from consilience.teachers.heads import HeadCache
from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.host_teachers import HostTeachers
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import META, CheckpointMeta, load_checkpoint, save_checkpoint
from consilience.training.metrics import MemorySink
from consilience.training.progress import SilentProgress
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

SIZES = {"tiny": (4, 96), "small": (8, 512)}  # prompts of a domain in a phase, sampled tokens of each
NAMES = [f"t{i:02d}" for i in range(1, 13)]
CARD = CheckpointMeta(stage="bench", seed=0, step=0, special_tokens={}, family="official")


def make_checkpoints(preset: str, folder: Path) -> None:
    """The student "t00" and the teachers, those that are not there yet."""
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        Tokenizer.train([f"{a} + {b} = {a + b}" for a in range(30) for b in range(30)], 400).save(tokenizer)
    dtype = getattr(torch, PRESETS[preset].torch_dtype)

    def make(seed: int) -> None:
        target = folder / f"t{seed:02d}"
        if not (target / META).is_file():
            save_checkpoint(target, initialize(Transformer(PRESETS[preset], dtype), seed), tokenizer, CARD)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(make, range(len(NAMES) + 1)))


class InProcess:
    """`Sampler` over one worker in this process."""

    def __init__(self, worker: RolloutWorker) -> None:
        self._worker = worker

    def publish(self, weights: Mapping[str, torch.Tensor], announced: Any, version: int) -> None:
        self._worker.publish(weights, announced, version)

    @torch.no_grad()
    def generate(
        self, jobs: Sequence[RolloutJob], on_progress: Any = None, *, durable: Durable | None = None
    ) -> list[RolloutRecord]:
        assert durable is not None
        records: dict[str, RolloutRecord] = {}
        for batch in self._worker.stream(jobs, durable.take_lease("worker")):
            durable.keep(batch)
            records |= {record.uid: record for record in batch}
        return [records[job.uid] for job in jobs]


class PrintedRows(MemorySink):
    """Says a line a phase as it ends."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device, self._began = device, time.perf_counter()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        super().scalars(step, values)
        took, self._began = time.perf_counter() - self._began, time.perf_counter()
        heads = values["head_loads"]
        print(
            f"phase {step}: {took:.1f} s, {values['train_tokens']:,} tokens, KL "
            f"{statistics.mean(values['kl'].values()):.4f} (largest of a token "
            f"{max(values['kl_max'].values()):.2f}), head loads {[row['loads'] for row in heads]} of "
            f"{[row['distinct'] for row in heads]}, teachers loaded {values['teacher_loads']}, masked "
            f"{values['masked_bad_states']}, peak {peak(self._device) / 2**20:,.0f} MiB",
            flush=True,
        )


def jobs_of(preset: str, step: int) -> list[RolloutJob]:
    """Sums, the same number for each domain."""
    prompts, length = SIZES[preset]
    made = []
    for number, name in enumerate(NAMES):
        for i in range(prompts):
            uid = f"{step}/{name}/{i}"
            message = {"role": "user", "content": f"{1000 * number + 10 * step + i} + {number} = "}
            sampling = SamplingParams(max_tokens=length, seed=len(made) + 1000 * step)
            made.append(
                RolloutJob(uid, uid, name, "chat", (message,), name, max_tokens=length, sampling=sampling)
            )
    return made


def distill(preset: str, device: torch.device, folder: Path, phases: int) -> dict[str, Any]:
    """The stage, in `folder`; its result and the rows that it logged."""
    records = [TeacherRecord(name, folder / name, (name,)) for name in NAMES]
    for record in records:
        admit(folder / "t00", record.checkpoint, record.name)
    print(f"{len(records)} teachers admitted", flush=True)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    prompts, length = SIZES[preset]
    student, policy = (cast(Transformer, load_checkpoint(folder / "t00")[0].to(device)) for _ in range(2))
    engine = TorchEngine(student, OptimizerSettings(lr=1e-3))
    policy.eval().requires_grad_(False)
    row_tokens = length + 64  # with room for the prompt
    sampler = NativeEngine(policy, max_rows=prompts * len(NAMES), max_length=row_tokens)
    worker = RolloutWorker(sampler, tokenizer, max_context=row_tokens)
    store, registry = HiddenStore(folder / "hidden_states"), TeacherRegistry(records)
    scheduler = TeacherScheduler(registry, HostTeachers(device), store, check=check_loaded)
    checkpoints = StageCheckpoints(
        folder / "checkpoints", engine, folder / "tokenizer.json", CARD, every_s=0.0
    )
    start, cursor = checkpoints.resume()
    log, clock = PrintedRows(device), StageClock(earlier=cursor.get("clock"))
    try:
        result = train_distill(
            engine,
            InProcess(worker),
            lambda step: jobs_of(preset, step),
            TeacherSide(registry, scheduler, store, HeadCache(device)),
            DistillSettings(
                phases, warmup=0, row_tokens=row_tokens, micro_tokens=8 * row_tokens, chunk_tokens=1024
            ),
            store=RolloutStore(folder / "rollouts"),
            decode=tokenizer.decode,
            checkpoints=checkpoints,
            log=log,
            clock=clock,
            progress=SilentProgress(),
            start=start,
            earlier=cursor.get("rows", ()),
        )
    finally:
        worker.close()
    return {"result": result, "log": log.rows, "clock": clock.state(), "left": len(store)}


def say(found: Mapping[str, Any], phases: int) -> bool:
    """What must hold; whether it does."""
    result, rows = found["result"], found["result"]["rows"]
    seconds = {name: f"{value:.1f}" for name, value in found["clock"]["phases"].items()}
    print(f"seconds by phase of the stage: {seconds}")
    means = [statistics.mean(row["kl"].values()) for row in rows]
    checks = (
        (f"{len(rows)} phases", f"{phases}", len(rows) == phases),
        (
            f"{sum(h['loads'] for h in result['head_loads'])} head loads",
            f"{sum(h['distinct'] for h in result['head_loads'])}, the distinct heads of each mini-batch",
            all(h["loads"] == h["distinct"] for h in result["head_loads"]),
        ),
        (
            f"teachers loaded in a phase: {sorted({row['teacher_loads'] for row in found['log']})}",
            f"at most {len(NAMES)}",
            all(row["teacher_loads"] <= len(NAMES) for row in found["log"]),
        ),
        (f"mean KL {means[0]:.4f} → {means[-1]:.4f}", "below its start", means[-1] < means[0]),
        (f"{found['left']} stored states left", "0", found["left"] == 0),
    )
    for check in checks:
        verdict(*check)
    return all(is_met for _, _, is_met in checks)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", choices=tuple(SIZES), help="default: small on a GPU, tiny on a CPU")
    parser.add_argument("--phases", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="kept, and gone on from; default: a temporary one")
    given = parser.parse_args()
    device, began = torch.device(given.device), time.perf_counter()
    preset = given.preset or ("small" if device.type == "cuda" else "tiny")
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        make_checkpoints(preset, folder)
        took = time.perf_counter() - began
        print(f"{preset}, {device}, 1 student and {len(NAMES)} teachers made in {took:.0f} s", flush=True)
        reset_peak(device)
        is_met = say(distill(preset, device, folder, given.phases), given.phases)
    print(f"{time.perf_counter() - began:.0f} s in all")
    sys.exit(0 if is_met else 1)


if __name__ == "__main__":
    main()
