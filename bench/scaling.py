"""Training steps on 1 and R ranks: weak scaling, what the exchange costs, what each rank holds.

    PYTHONPATH=. python bench/scaling.py [--ranks 2] [--engines torch sharded zero1 zero2 zero3]
    PYTHONPATH=. python bench/scaling.py --device cpu          (tiny, gloo, one thread a rank)

Steps of SFT, GRPO and distillation through the stages' own step functions, on samples made here (prompts of
128 and answers of 896 tokens, on a CPU 16 and 48), `--tokens` of them a rank: 16,384 of the preset `small` in
bf16 on GPUs, 2,048 of `tiny` in fp32 on CPUs. One rank first, alone on the machine, then all. Per arm the
slowest rank's time, median and range of `--rounds` steps behind two that warm up:

    scaling    one rank's time over R ranks' time; at least 90 % is asked for
    again      the same arm once more (A/A)
    exposed    1 - (the same ranks, whose tensors stay at home: each keeps its own sums) / with them

Bytes a rank holds behind a step: weights, gradients (in the step), optimiser state with masters; predicted
from shapes: `training/shards.py`; ZeRO with AdamW 12 bytes a parameter over R, in stage 3 16, a bucket of 4 a
parameter, and the trunk's weights over R. At most 15 % off is asked for. ZeRO engines need DeepSpeed.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from consilience.distill.train import DistillSettings
from consilience.distill.train import train_phase as distill_phase
from consilience.grpo.advantage import Advantages
from consilience.grpo.sft import SupervisedSettings, train_supervised
from consilience.grpo.supervised_batches import Example
from consilience.grpo.train import GrpoSettings
from consilience.grpo.train import train_phase as grpo_phase
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.ranks import Ranks, open_ranks
from consilience.model.transformer import Transformer
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.teachers.heads import HeadLoads
from consilience.training.deepspeed_setup import BUCKET_ELEMENTS
from consilience.training.engine import TrainEngine
from consilience.training.metrics import MemorySink
from consilience.training.optimizers import parameter_groups
from consilience.training.progress import SilentProgress
from consilience.training.shards import state_bytes
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

LIMIT_S = 300.0
STAGES = ("sft", "grpo", "distillation")
ENGINES = ("torch", "sharded", "zero1", "zero2", "zero3")
SIZES = {"cuda": ("small", 128, 896, 16_384), "cpu": ("tiny", 16, 48, 2_048)}  # prompt, answer, of a rank
WARM = 2
SCALING_AIM, BYTES_AIM = 0.90, 0.15


@dataclass(frozen=True)
class Hushable(Ranks):
    """Ranks whose tensors can be kept at home: each goes on with its own sums. Python values still travel."""

    silence: list[bool] = field(default_factory=lambda: [False])

    @property
    def is_silent(self) -> bool:
        return self.silence[0]

    def sum_(self, tensors: Any) -> None:
        if not self.is_silent:
            super().sum_(tensors)

    def stack(self, tensor: Tensor) -> Tensor:
        return tensor.expand(self.size, *tensor.shape).clone() if self.is_silent else super().stack(tensor)

    def spread_(self, tensor: Tensor, source: int) -> None:
        if not self.is_silent:
            super().spread_(tensor, source)

    def start_exchange(
        self, found: Tensor, given: Tensor, found_rows: Sequence[int], given_rows: Sequence[int]
    ) -> Callable[[], object]:
        if not self.is_silent:
            return super().start_exchange(found, given, found_rows, given_rows)
        count = min(len(found), len(given))
        found[:count].copy_(given[:count])
        found[count:].zero_()
        return lambda: None


# ---- the stages' steps ----------------------------------------------------------------------------


class StoredStates:
    """A `TeacherSide` of one teacher whose states are random and in memory: the trainer's part alone."""

    def __init__(self, width: int, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self._draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype) / width**0.5
        self._head = self._draw(vocab_size, width)
        teacher = SimpleNamespace(name="teacher", weight=1.0)
        self.registry = cast(Any, Teachers([teacher]))
        self.scheduler = SimpleNamespace(digests=lambda name: SimpleNamespace(head="head"))
        self.heads = SimpleNamespace(
            begin=lambda heads: None,
            take=lambda teacher, digest: self._head,
            finish=lambda: HeadLoads(distinct=1, loads=1),
        )
        self._states: dict[str, Tensor] = {}
        self._width = width
        self.store = SimpleNamespace(take=lambda key: self._states[key], free_taken=lambda: None)

    def scored(self, records: Sequence[RolloutRecord]) -> Any:
        for record in records:
            self._states[record.uid] = self._draw(record.num_sampled, self._width)
        return SimpleNamespace(keys={record.uid: record.uid for record in records})


class Teachers(list[Any]):
    def get(self, name: str) -> Any:
        return self[0]


def records_of(num: int, prompt: int, answer: int, vocab_size: int) -> list[RolloutRecord]:
    """Random samples, groups of four."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab_size, (num, prompt + answer), generator=generator).tolist()
    return [
        RolloutRecord(
            uid=str(number),
            group=str(number // 4),
            domain="d",
            effort="chat",
            teacher="teacher",
            prompt_ids=tuple(row[:prompt]),
            token_ids=tuple(row[prompt:]),
            logprobs=(-math.log(vocab_size),) * answer,
            loss_mask=(1,) * answer,
            weight_version=(0,) * answer,
            finish=FinishReason.LENGTH,
            outcome=Outcome(OutcomeKind.GRADED),
        )
        for number, row in enumerate(ids)
    ]


def steps_of(engine: TrainEngine, device: str, ranks: Ranks, tokens: int) -> dict[str, Callable[[int], Any]]:
    """stage -> its step by number, with `tokens` for each rank."""
    preset, prompt, answer, _ = SIZES[device]
    config, model = PRESETS[preset], cast(Any, engine.model)
    length, num = prompt + answer, tokens // (prompt + answer) * ranks.size
    where, dtype = model.head.weight.device, model.head.weight.dtype
    records = records_of(num, prompt, answer, config.vocab_size)
    cut = {"row_tokens": length, "micro_tokens": tokens // 2, "warmup": 0}
    example = [Example((*r.prompt_ids, *r.token_ids), (0.0,) * prompt + (1.0,) * answer) for r in records]
    kept: Any = SimpleNamespace(points_every=0, save_if_due=lambda *given: None)
    parts: Any = {"log": MemorySink(), "clock": StageClock(), "progress": SilentProgress()}

    def sft(step: int) -> None:
        settings = SupervisedSettings(step + 1, length * num, balance_weight=0.01, **cut)
        train_supervised(engine, [example], settings, checkpoints=kept, start=step, **parts)

    reference = initialize(Transformer(config, dtype), 1).to(where).requires_grad_(False)
    worth = np.tile([1.0, -1.0], (num + 1) // 2)[:num]
    all_ = np.ones(num, bool)
    advantages = Advantages(worth, all_, ~all_, num // 4, 0, 0)
    grpo_settings = GrpoSettings(10**6, mini_batches=1, **cut)
    side = StoredStates(config.hidden_size, config.vocab_size, where, dtype)
    scored = side.scored(records)
    distill_settings = DistillSettings(10**6, mini_batches=1, chunk_tokens=2048, **cut)
    return {
        "sft": sft,
        "grpo": lambda step: grpo_phase(engine, reference, records, advantages, grpo_settings, step),
        "distillation": lambda step: distill_phase(
            engine, records, scored, cast(Any, side), distill_settings, step
        ),
    }


# ---- engines, and what they hold ------------------------------------------------------------------


def build(name: str, model: Transformer, ranks: Ranks) -> TrainEngine:
    if not name.startswith("zero"):
        return TorchEngine(model, OptimizerSettings(lr=1e-6, is_sharded=name == "sharded"), ranks=ranks)
    from consilience.training.deepspeed_engine import DeepSpeedEngine

    settings = OptimizerSettings(lr=1e-6, kind="adamw")
    return DeepSpeedEngine(model, settings, ranks=ranks, zero_stage=int(name[-1]))


def predicted(name: str, model: Transformer, size: int) -> dict[str, list[int]]:
    """kind -> bytes of each rank."""
    weights = sum(p.nbytes for p in model.parameters())
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not name.startswith("zero"):
        state = state_bytes(parameter_groups(model), size if name == "sharded" else 1)
        return {"weights": [weights] * size, "state": state if name == "sharded" else state * size}
    if name != "zero3":
        return {"weights": [weights] * size, "state": [12 * count // size] * size}
    trunk = sum(p.nbytes for layer in model.layers for p in layer.parameters())
    own = weights if size == 1 else weights - trunk + weights // size  # embedding and head stay whole too
    bucket = 4 * min(BUCKET_ELEMENTS, count)
    return {"weights": [own] * size, "state": [16 * count // size + bucket] * size}


def tensors_below(root: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, by what the garbage collector sees."""
    seen, front = {id(root)}, [root]
    while front:
        for item in gc.get_referents(front.pop()):
            if id(item) in seen or isinstance(item, type | ModuleType | FunctionType):
                continue
            seen.add(id(item))
            if isinstance(item, Tensor):
                yield item
            else:
                front.append(item)


def held(engine: Any, model: Transformer) -> dict[str, int]:
    """Bytes by kind; state is what the optimiser holds that is neither a weight nor a gradient."""
    own = list(model.parameters())
    shards = [p.ds_tensor for p in own if hasattr(p, "ds_tensor")]  # of ZeRO-3
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*own, *shards)}
    roots = (engine.optimizer,) if isinstance(engine, TorchEngine) else (engine._zero, engine._optimizer)
    state: dict[int, int] = {}
    for tensor in (t for root in roots for t in tensors_below(root)):
        storage = tensor.untyped_storage()
        if tensor.device.type != "meta" and storage.data_ptr() not in weights:
            state[storage.data_ptr()] = storage.nbytes()
    return {"weights": sum(weights.values()), "state": sum(state.values())}


# ---- one rank -------------------------------------------------------------------------------------


def took(step: Callable[[], Any], ranks: Ranks, device: torch.device) -> float:
    """Milliseconds of the slowest rank."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    ranks.barrier()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    own = 1e3 * (time.perf_counter() - began)
    return max(ranks.gather(own))


def measure(name: str, options: argparse.Namespace, ranks: Hushable, device: torch.device) -> None:
    preset, _, _, _ = SIZES[options.device]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = cast(Transformer, initialize(Transformer(PRESETS[preset], dtype), 0).to(device))
    wanted = predicted(name, model, ranks.size)
    engine = build(name, model, ranks)
    for stage, step in steps_of(engine, options.device, ranks, options.tokens).items():
        if stage not in options.stages:
            continue
        number = 0
        arms = ("ranks", "again", "silent") if ranks.size > 1 and not name.startswith("zero") else ("ranks",)
        for arm in arms:
            found = []
            ranks.silence[0] = arm == "silent"
            for turn in range(options.rounds + (WARM if arm == "ranks" else 0)):
                ms = took(lambda: step(number), ranks, device)  # noqa: B023
                number += 1
                if arm != "ranks" or turn >= WARM:
                    found.append(ms)
            if ranks.is_first:
                options.say(name, ranks.size, stage, arm, found)
        ranks.silence[0] = False
        if ranks.size > 1:
            for parameter in model.parameters():  # the silent arm left the ranks apart
                ranks.spread_(parameter.data, 0)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    bytes_of = ranks.gather({**held(engine, model), "peak": peak})
    if ranks.is_first:
        options.tell(name, ranks.size, bytes_of, wanted)
    del engine, model
    gc.collect()


def work(rank: int, size: int, address: str, options: argparse.Namespace) -> None:
    is_cpu = options.device == "cpu"
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed's calls of torch
    device = torch.device("cpu") if is_cpu else torch.device("cuda", rank)
    if is_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    opened = open_ranks(address, rank, size, backend="gloo" if is_cpu else "nccl", timeout_s=LIMIT_S)
    values = (opened.rank, opened.size, opened.group, opened.talk, device, opened.patient)
    ranks = Hushable(*values)
    table = Table(options.folder, size)
    options.say, options.tell = table.say, table.tell
    for name in options.engines:
        if name.startswith("zero") and find_spec("deepspeed") is None:
            continue
        if name != "torch" and size == 1 and not name.startswith("zero"):
            continue
        if not is_cpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        measure(name, options, ranks, device)
    opened.close()


# ---- what is said ---------------------------------------------------------------------------------


class Table:
    """Lines as they come, in a file that the next number of ranks reads one rank's times from."""

    def __init__(self, folder: str, size: int) -> None:
        self._path = Path(folder) / "alone"
        self._alone: dict[str, float] = {}
        self._own: dict[str, float] = {}
        if size > 1 and self._path.exists():
            pairs = (line.rsplit(" ", 1) for line in self._path.read_text().splitlines())
            self._alone = {key: float(ms) for key, ms in pairs}

    def say(self, engine: str, size: int, stage: str, arm: str, found: Sequence[float]) -> None:
        ms, note = statistics.median(found), ""
        if size == 1:
            with self._path.open("a") as file:
                file.write(f"{engine} {stage} {ms}\n")
        alone = self._alone.get(f"{engine} {stage}", self._alone.get(f"torch {stage}"))
        if arm == "ranks":
            self._own[stage] = ms
        if arm == "silent":
            note = f"exposed {100 * (1 - ms / self._own[stage]):.1f} %"
        elif alone:
            note = f"scaling {100 * alone / ms:.1f} % (aim {100 * SCALING_AIM:.0f})"
        spread = f"{min(found):.1f}–{max(found):.1f}"
        print(f"| {engine} | {size} | {stage} | {arm} | {ms:.1f} | {spread} | {note} |", flush=True)

    def tell(
        self, engine: str, size: int, found: Sequence[Mapping[str, int]], wanted: Mapping[str, Sequence[int]]
    ) -> None:
        for kind in ("weights", "state"):
            most, sought = max(row[kind] for row in found), max(wanted[kind])
            off = most / sought - 1
            verdict = "" if abs(off) <= BYTES_AIM else " MISSED"
            shown = f"{most / 2**20:.1f} MiB, predicted {sought / 2**20:.1f}"
            print(
                f"| {engine} | {size} | {kind} | bytes | {shown} | {100 * off:+.1f} %{verdict} | |",
                flush=True,
            )
        if found[0]["peak"]:
            peak = max(row["peak"] for row in found) / 2**30
            print(f"| {engine} | {size} | peak | bytes | {peak:.1f} GiB | | |", flush=True)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--tokens", type=int, default=0, help="of a rank and step")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    options.tokens = options.tokens or SIZES[options.device][3]
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    if options.device == "cuda" and torch.cuda.device_count() < options.ranks:
        sys.exit(f"{options.ranks} ranks need as many GPUs; here are {torch.cuda.device_count()}")
    preset = SIZES[options.device][0]
    print(
        f"# Ranks, {date.today()}\n\n`python {' '.join(sys.argv)}`\n\n{name}, torch {torch.__version__}, ",
        end="",
    )
    print(f"`{preset}`, {options.tokens} tokens a rank and step\n")
    print("| engine | ranks | stage | arm | ms | range | |\n|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        for size in sorted({1, options.ranks}):
            given = (size, f"file://{folder}/meeting-{size}", options)
            torch.multiprocessing.spawn(work, args=given, nprocs=size)  # pyright: ignore[reportPrivateImportUsage]


if __name__ == "__main__":
    main()
