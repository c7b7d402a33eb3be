"""On-policy distillation, one teacher: ours against TRL's DistillationTrainer. Tokens a second and memory.

    .venv/bin/pip install --no-deps --target .venv-trl trl accelerate
    .venv/bin/python bench/opd_against_trl.py [--preset tiny|small] [--device cpu|cuda]

Both run a V4 model of the preset, TRL transformers' `deepseek_v4` with our student's and teacher's weights:
same prompts, same lengths, same tokens in a step and in a micro-batch, exact reverse KL over the vocabulary,
AdamW, one update a step. Not equal: our step loads its teacher from disk, keeps states there and does the
whole stage's bookkeeping; TRL's teacher stays in memory. TRL's default is to recompute activations, ours is
not to; TRL is run both ways. Two kinds of step:

given    the same sampled texts are trained on in every step: scoring, forward, backward, update
sampled  each step samples its own texts first: ours by the native engine, TRL by transformers' generate

First the losses are compared on the same tokens (for that run TRL's index top-k breaks ties as ours does).
A process a row, the first step does not count. Memory: on a GPU the most bytes of tensors, on a CPU the
largest resident set beyond what it was before the first step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

ROOT = Path(__file__).parents[1]
MICRO_SAMPLES = 8
ARM_LIMIT_S = 300
SPEED_AIM = 2.0
LEARNING_RATE = 1e-5
ARMS = ("ours", "trl", "trl, recomputing")


def ours(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The stage's own scoring and training; `loss` of the first step is the mean KL of a token."""
    from opd_step import SIZES, peak, random_prompts, read_student, reset_peak, sample, teacher_side
    from opd_timing import Accounts, TimedEngine

    from consilience.distill.balance import UpdateBalance
    from consilience.distill.samples import score_request
    from consilience.distill.train import DistillSettings, train_phase
    from consilience.rollout.native_engine import NativeEngine
    from consilience.training.torch_engine import OptimizerSettings

    device = torch.device(given.device)
    num, _, length = SIZES[given.preset]
    model = read_student(folder, device)
    sampler = NativeEngine(model, max_rows=num, max_length=length)
    prompts = random_prompts(given.preset)
    fixed = [
        replace(r, token_ids=tuple(ids)) for r, ids in zip(sample(sampler, prompts), completions(folder))
    ]
    model.train().requires_grad_(True)
    accounts = Accounts(
        torch.device("cpu")
    )  # only wall time is wanted: its clock does not wait for the device
    engine = TimedEngine(model, OptimizerSettings(lr=LEARNING_RATE, kind="adamw", weight_decay=0.0))
    engine.clock = accounts.clock
    settings = DistillSettings(
        steps=given.rounds + 1,
        mini_batches=1,
        row_tokens=length,
        micro_tokens=MICRO_SAMPLES * length,
        warmup=0,
    )
    times, losses = [], []
    with tempfile.TemporaryDirectory(dir=folder) as store:
        side = teacher_side(folder, 1, accounts, device, Path(store), MICRO_SAMPLES * length)
        base = begin(device, reset_peak, peak)
        for step in range(given.rounds + 1):
            began = now(device)
            records = fixed if given.kind == "given" else sample(sampler, prompts, step + 1)
            scored = side.scheduler.score([score_request(r) for r in records])
            balance = UpdateBalance({"t01": 1.0})
            report = train_phase(engine, records, scored, side, settings, step, balance)
            times.append(now(device) - began)
            losses.append(report["kl"]["t01"])
    return {"times": times, "loss": losses[0], "memory": peak(device) - base}


def trl(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TRL's trainer over transformers' twins of our checkpoints."""
    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from opd_step import SIZES, peak, random_prompts, reset_peak
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from transformers_oracle import hf_twin, take_lowest_of_equals
    from trl import DistillationConfig, DistillationTrainer

    from consilience.model.transformer import Transformer
    from consilience.training.checkpoint import load_checkpoint

    device = torch.device(given.device)
    num, prompt, length = SIZES[given.preset]
    prompts, texts = random_prompts(given.preset), completions(folder)

    class Trainer(DistillationTrainer):
        """Prompts are given as token ids, by number; for steps of kind "given", so are the completions."""

        def _tokenize_prompts(self, prompts_: list) -> Any:
            return [list(prompts[int(number)]) for number in prompts_], None, {}

        def _generate_single_turn(self, prompt_ids: list, *others: Any, **more: Any) -> list:
            if given.kind == "sampled":
                return super()._generate_single_turn(prompt_ids, *others, **more)
            return [texts[prompts.index(tuple(ids))] for ids in prompt_ids]

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = now(device)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.times.append(now(device) - self.began)

    def twin(name: str) -> Any:
        model = cast(Transformer, load_checkpoint(folder / name)[0])
        hf_twin(model).save_pretrained(folder / f"hf-{name}")
        # By from_pretrained, which keeps in fp32 what transformers wants there.
        made = DeepseekV4ForCausalLM.from_pretrained(
            folder / f"hf-{name}", dtype=model.head.weight.dtype, attn_implementation="eager"
        ).to(device)
        if given.check:
            take_lowest_of_equals(made)
        return made

    words = {f"<{i}>": i for i in range(prompt)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "<0>")),
        pad_token="<0>",
        eos_token="<1>",
        padding_side="left",
    )
    settings = DistillationConfig(
        output_dir=str(folder / "trl"),
        beta=1.0,
        max_completion_length=length - prompt,
        generation_kwargs={"min_new_tokens": length - prompt},  # as ours: no text ends early
        per_device_train_batch_size=MICRO_SAMPLES,
        gradient_accumulation_steps=num // MICRO_SAMPLES,
        max_steps=1 if given.check else given.rounds + 1,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        gradient_checkpointing=given.arm == "trl, recomputing",
        shuffle_dataset=False,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    # Without a fingerprint its bytes are hashed by dill, which takes all of pyarrow along where that is
    # installed in a folder that is neither Python's nor called site-packages, and cannot.
    numbers = InMemoryTable.from_pydict({"prompt": [str(i) for i in range(num)]})
    clock = Clock()
    trainer = Trainer(
        twin("t00").train(),
        twin("t01"),
        settings,
        train_dataset=Dataset(numbers, fingerprint="numbers"),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    base = begin(device, reset_peak, peak)
    trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return {"times": clock.times, "loss": loss, "memory": peak(device) - base}


def begin(device: torch.device, reset_peak: Any, peak: Any) -> int:
    """From here on the peak counts. What it counts from: nothing on a GPU, where weights are in it."""
    reset_peak(device)
    return peak(device) if device.type == "cpu" else 0


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def completions(folder: Path) -> list[list[int]]:
    return json.loads((folder / "completions.json").read_text())


def prepare(given: argparse.Namespace, folder: Path) -> None:
    """Both models, and what the student says on the prompts."""
    from opd_step import SIZES, make_checkpoints, random_prompts, read_student, sample

    from consilience.rollout.native_engine import NativeEngine

    make_checkpoints(given.preset, folder, 1)
    model = read_student(folder, given.device)
    num, _, length = SIZES[given.preset]
    records = sample(NativeEngine(model, max_rows=num, max_length=length), random_prompts(given.preset))
    (folder / "completions.json").write_text(json.dumps([list(r.token_ids) for r in records]))


def run(given: argparse.Namespace, folder: Path, arm: str, kind: str, check: bool = False) -> dict[str, Any]:
    """One arm in a process of its own. What it wrote on stderr if it fails."""
    command = [sys.executable, __file__, "--arm", arm, "--kind", kind, "--folder", str(folder)]
    for name in ("preset", "device", "rounds", "threads"):
        command += [f"--{name}", str(getattr(given, name))]
    path = os.pathsep.join(map(str, [ROOT, given.trl, os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(given.threads)}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command += ["--check"] if check else []
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=ARM_LIMIT_S)
    if done.returncode:
        sys.exit(f"{arm}, {kind}: failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(given: argparse.Namespace, folder: Path) -> None:
    from opd_step import SIZES

    num, _, length = SIZES[given.preset]
    prepare(given, folder)
    theirs = run(given, folder, "trl", "given", check=True)["loss"]
    print(f"{given.preset}, {given.device}, {given.threads} threads; {num} samples of {length} tokens a step")
    rows: dict[tuple[str, str], tuple[float, int]] = {}
    lines = []
    for kind in given.kinds:
        for arm in ARMS:
            found = run(given, folder, arm, kind)
            times = found["times"][1:]
            rate = num * length / statistics.median(times)
            rows[kind, arm] = rate, found["memory"]
            if (kind, arm) == ("given", "ours"):
                error = abs(found["loss"] - theirs) / abs(theirs)
                print(
                    f"loss on the same tokens: ours {found['loss']:.6f}, TRL {theirs:.6f}, "
                    f"differ by {error:.1e}\n"
                )
                print("| step | arm | s a step | tokens/s | MiB |\n|---|---|---|---|---|")
            seconds = f"{statistics.median(times):.2f} ({min(times):.2f}–{max(times):.2f})"
            print(
                f"| {kind} | {arm} | {seconds} | {rate:,.0f} | {found['memory'] / 2**20:,.0f} |", flush=True
            )
        speed = rows[kind, "ours"][0] / max(rows[kind, arm][0] for arm in ARMS[1:])
        least = min(rows[kind, arm][1] for arm in ARMS[1:])
        memory = rows[kind, "ours"][1] / least
        is_met = speed >= SPEED_AIM and memory < 1
        lines.append(
            f"{'ok' if is_met else 'MISSED'}: {kind}: {speed:.1f} x the tokens a second of TRL's faster row, "
            f"{memory:.2f} x the memory of its leaner; the aim is {SPEED_AIM:g} x and less than 1"
        )
    print("\n" + "\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, choices=("cpu", "cuda"))
    parser.add_argument("--preset", choices=("tiny", "small"), help="default: small on a GPU, tiny on a CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, on a CPU")
    parser.add_argument("--kinds", nargs="+", choices=("given", "sampled"), default=["given", "sampled"])
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv-trl", help="folder with trl and accelerate")
    parser.add_argument("--folder", type=Path, help="for checkpoints and states; default: a temporary one")
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.preset = given.preset or ("small" if given.device == "cuda" else "tiny")
    torch.set_num_threads(given.threads)
    if given.arm:
        work = ours if given.arm == "ours" else trl
        print(json.dumps(work(given, given.folder)))
        return
    if not (given.trl / "trl").is_dir():
        print(f"no TRL in {given.trl}: the first line of `{Path(__file__).name} --help` installs it")
        return
    if given.folder:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        compare(given, Path(folder))


if __name__ == "__main__":
    main()
