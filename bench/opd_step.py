"""Where the time of an on-policy-distillation step goes, and what it holds, with 2, 6 and 12 teachers.

    python bench/opd_step.py [--preset tiny|small] [--device cpu|cuda] [--teachers 2 6 12] [--rounds 3]

A step is what the stage does after sampling: every sample scored by its teacher, hidden states through the
store on disk, two mini-batches, student forward and backward, loss, update. Same student, same samples, as
many teachers as the row says (random weights of distinct seeds, checkpoints on disk). The samples are drawn
from the student by the native engine; their rate is reported beside. One process a row, one step to warm up.

compute  the device works on the model: student, loss, update, teacher
waiting  all of the step's other seconds: whatever loading, reading and writing is not hidden, and bookkeeping
I/O      seconds that all threads together spent on files; most of it beside compute, or it would be waiting
memory   on a GPU the most bytes of tensors, on a CPU the process's largest resident set, during the steps

On a GPU the clock waits for the device whenever it changes phase, which hides less than a run without it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from opd_timing import FILES, PARTS, Accounts, TimedEngine, TimedStore, TimedTeachers
from torch import Tensor

from consilience.distill.balance import UpdateBalance
from consilience.distill.samples import score_request
from consilience.distill.train import DistillSettings, TeacherSide, train_phase
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Completed, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.teachers.heads import HeadCache, read_head
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.scheduler import TeacherScheduler
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, save_checkpoint
from consilience.training.torch_engine import OptimizerSettings

SIZES = {"tiny": (96, 32, 192), "small": (72, 128, 1024)}  # samples, tokens of a prompt, of all
MOST_TEACHERS = 12
ARM_LIMIT_S = 170
WAITING_AIM, MEMORY_AIM = 0.10, 0.02


def make_checkpoints(preset: str, folder: Path, num: int) -> None:
    """The student and `num` teachers, each of a seed of its own, in the type that the preset computes in."""
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": {}}))
    dtype = getattr(torch, PRESETS[preset].torch_dtype)

    def make(seed: int) -> None:
        model = initialize(Transformer(PRESETS[preset], dtype), seed)
        meta = CheckpointMeta(stage="bench", seed=seed, step=0)
        save_checkpoint(folder / f"t{seed:02d}", model, folder / "tokenizer.json", meta)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        list(threads.map(make, range(num + 1)))


def read_student(folder: Path, device: torch.device | str) -> Transformer:
    return cast(Transformer, load_checkpoint(folder / "t00")[0].to(device))


def random_prompts(preset: str) -> list[tuple[int, ...]]:
    num, prompt, _ = SIZES[preset]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(PRESETS[preset].vocab_size, (num, prompt), generator=generator)
    return [tuple(row) for row in ids.tolist()]


@torch.no_grad()
def sample(engine: NativeEngine, prompts: Sequence[tuple[int, ...]], step: int = 0) -> list[RolloutRecord]:
    """What the engine's model draws on the prompts, each as long as the engine's streams may be."""
    num = len(prompts)
    params = [
        SamplingParams(max_tokens=engine.max_length - len(ids), seed=num * step + i)
        for i, ids in enumerate(prompts)
    ]
    engine.submit([Request(f"s{step}/{i}", ids, params[i]) for i, ids in enumerate(prompts)])
    done: dict[str, Completed] = {}
    while len(done) < num:
        done |= {found.uid: found for found in engine.step()}
    return [
        RolloutRecord(
            uid=f"s{step}/{i}",
            group=f"s{step}/{i}",
            domain="d1",
            effort="chat",
            teacher="t01",
            prompt_ids=ids,
            token_ids=done[f"s{step}/{i}"].token_ids,
            logprobs=done[f"s{step}/{i}"].logprobs,
            loss_mask=(1,) * params[i].max_tokens,
            weight_version=done[f"s{step}/{i}"].weight_version,
            finish=FinishReason.LENGTH,
            outcome=Outcome(OutcomeKind.GRADED),
        )
        for i, ids in enumerate(prompts)
    ]


def teacher_side(
    folder: Path, num: int, accounts: Accounts, device: torch.device, store: Path, batch_tokens: int
) -> TeacherSide:
    """The stage's own parts, with the clock at their seams."""
    registry = TeacherRegistry(
        [TeacherRecord(f"t{i:02d}", folder / f"t{i:02d}", (f"d{i}",)) for i in range(1, num + 1)]
    )

    def read(record: TeacherRecord) -> Tensor:
        with accounts.file("head"):
            return read_head(record.checkpoint)

    states = TimedStore(accounts, store)
    loader = TimedTeachers(accounts, device, batch_tokens)
    return TeacherSide(
        registry,
        TeacherScheduler(registry, loader, states, batch_tokens=batch_tokens),
        states,
        HeadCache(device, read=read),
    )


def one_step(
    engine: TimedEngine,
    records: Sequence[RolloutRecord],
    side: TeacherSide,
    settings: DistillSettings,
    accounts: Accounts,
    number: int,
) -> dict[str, Any]:
    """Seconds of one step by part, and the KL that it reports."""
    before, files = accounts.clock.state()["phases"], dict(accounts.files)
    balance = UpdateBalance({record.name: record.weight for record in side.registry})
    with accounts.clock.phase("score"):
        scored = side.scheduler.score([score_request(r) for r in records])
    with accounts.clock.phase("train"):
        report = train_phase(engine, records, scored, side, settings, number, balance)
    assert not scored.num_reused and report["skipped_updates"] == 0
    after = accounts.clock.state()["phases"]
    seconds = {name: value - before.get(name, 0.0) for name, value in after.items() if name != "other"}
    return {
        "seconds": seconds,
        "files": {kind: value - files[kind] for kind, value in accounts.files.items()},
        "kl": statistics.mean(report["kl"].values()),
    }


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak resident set begins anew


def peak(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(preset: str, device: torch.device, folder: Path, num: int, rounds: int) -> dict[str, Any]:
    """One row of the table."""
    model = read_student(folder, device)
    engine = NativeEngine(model, max_rows=SIZES[preset][0], max_length=SIZES[preset][2])
    began = time.perf_counter()
    records = sample(engine, random_prompts(preset))
    rate = sum(len(r.token_ids) for r in records) / (time.perf_counter() - began)
    del engine
    model.train().requires_grad_(True)
    reset_peak(device)
    records = [
        replace(r, teacher=f"t{1 + i % num:02d}", domain=f"d{1 + i % num}") for i, r in enumerate(records)
    ]
    accounts = Accounts(device)
    engine = TimedEngine(model, OptimizerSettings(lr=1e-5))
    engine.clock = accounts.clock
    samples, _, length = SIZES[preset]
    batch_tokens = samples * length // MOST_TEACHERS  # the same batches, whatever the row
    settings = DistillSettings(
        steps=rounds + 1, row_tokens=length, micro_tokens=2 * length, chunk_tokens=1024
    )
    with tempfile.TemporaryDirectory(dir=folder) as store:
        side = teacher_side(folder, num, accounts, device, Path(store), batch_tokens)
        steps = []
        for number in range(rounds + 1):
            if number == 1:
                reset_peak(device)
            steps.append(one_step(engine, records, side, settings, accounts, number))
            took = sum(steps[-1]["seconds"].values())
            print(f"{num} teachers, step {number}: {took:.2f} s", file=sys.stderr, flush=True)
    return {
        "steps": steps[1:],
        "peak": peak(device),
        "sampled_tokens_per_s": rate,
        "tokens": sum(len(r.prompt_ids) + len(r.token_ids) for r in records),
    }


def row(num: int, found: dict[str, Any]) -> dict[str, float]:
    """Prints the row of medians; what the aims are checked by."""
    walls = [sum(step["seconds"].values()) for step in found["steps"]]
    share = {
        part: statistics.median(
            step["seconds"].get(part, 0.0) / wall for step, wall in zip(found["steps"], walls)
        )
        for part in PARTS
    }
    waits = [
        1 - sum(s["seconds"].get(p, 0.0) for p in PARTS) / wall for s, wall in zip(found["steps"], walls)
    ]
    files = {kind: statistics.median(step["files"][kind] for step in found["steps"]) for kind in FILES}
    wall, waiting = statistics.median(walls), statistics.median(waits)
    cells = [
        num,
        f"{wall:.2f} ({min(walls):.2f}–{max(walls):.2f})",
        f"{found['tokens'] / wall:,.0f}",
        *(f"{share[part]:.1%}" for part in PARTS),
        f"**{waiting:.1%}**",
        f"{sum(files.values()) / wall:.1%}",
        f"{found['peak'] / 2**20:,.1f}",
        f"{found['sampled_tokens_per_s']:,.0f}",
    ]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return {"waiting": waiting, "peak": found["peak"]}


def detail(num: int, found: dict[str, Any]) -> str:
    """Where the waiting is, and which files the I/O was, in ms of a step."""
    steps = found["steps"]
    names = sorted({name for s in steps for name in s["seconds"]} - set(PARTS))
    rest = ", ".join(
        f"{n} {1e3 * statistics.median(s['seconds'].get(n, 0.0) for s in steps):.1f}" for n in names
    )
    files = ", ".join(f"{k} {1e3 * statistics.median(s['files'][k] for s in steps):.1f}" for k in FILES)
    return f"{num} teachers, ms: waiting: {rest}; files, all threads: {files}; KL {steps[-1]['kl']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=tuple(SIZES), help="default: small on a GPU, tiny on a CPU")
    parser.add_argument("--teachers", type=int, nargs="+", default=[2, 6, 12])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    parser.add_argument(
        "--folder", type=Path, help="for checkpoints and hidden states; default: a temporary one"
    )
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    preset = given.preset or ("small" if given.device == "cuda" else "tiny")
    if given.device == "cpu":
        torch.set_num_threads(given.threads)
    if given.arm:
        found = measure(preset, torch.device(given.device), given.folder, given.arm, given.rounds)
        print(json.dumps(found))
        return
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        compare(given, preset, Path(folder))


def compare(given: argparse.Namespace, preset: str, folder: Path) -> None:
    """All rows, each in a process of its own."""
    num, prompt, length = SIZES[preset]
    began = time.perf_counter()
    make_checkpoints(preset, folder, max(given.teachers))
    print(
        f"{preset}, {given.device}, {num} samples of {length} tokens ({prompt} of them prompt), "
        f"2 mini-batches; load {os.getloadavg()[0]:.1f}; "
        f"checkpoints made in {time.perf_counter() - began:.0f} s\n"
    )
    print(
        "| teachers | s a step | tokens/s | "
        + " | ".join(PARTS)
        + " | waiting | I/O | peak MiB | sampled/s |"
    )
    print("|" + "---|" * (len(PARTS) + 7), flush=True)
    rows, details = {}, []
    for teachers in given.teachers:
        command = [
            sys.executable,
            __file__,
            "--arm",
            str(teachers),
            "--preset",
            preset,
            "--device",
            given.device,
        ]
        command += ["--folder", str(folder), "--rounds", str(given.rounds), "--threads", str(given.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=ARM_LIMIT_S)
        found = json.loads(done.stdout.splitlines()[-1])
        rows[teachers] = row(teachers, found)
        details.append(detail(teachers, found))
    print("\n" + "\n".join(details) + "\n")
    waiting = max(r["waiting"] for r in rows.values())
    peaks = [r["peak"] for r in rows.values()]
    spread = max(peaks) / min(peaks) - 1
    verdict(f"waiting {waiting:.1%} at most", f"under {WAITING_AIM:.0%}", waiting < WAITING_AIM)
    verdict(f"peak memory within {spread:.1%}", f"within {MEMORY_AIM:.0%}", spread <= MEMORY_AIM)


def verdict(found: str, aim: str, is_met: bool) -> None:
    print(f"{'ok' if is_met else 'MISSED'}: {found}; the aim is {aim}", flush=True)


if __name__ == "__main__":
    main()
