"""The rollout engine, transformers' `generate` and vLLM with equal weights; publication; the token log.

    python bench/rollout.py [--quick] [--tables speed publication log] [--out FOLDER] [--vllm-python PYTHON]

speed        batches of 1 to 256 rows, sampled at temperature 1. Every arm is a process of its own
             (rollout_arms.py) that loads one checkpoint and digests the values it then holds: unequal digests
             end the run. Arms take turns batch by batch, in reversed order every other round; medians with
             ranges; "native again" is the A/A arm. Timed from behind the fourth token of every row.
publication  publish.py: seconds from a trainer's weights to loaded workers, by each transport (needs Ray)
log          token_log.py: the token log's share of decoding, goal under 3 %

On a CPU vLLM cannot serve V4, so it has a dense checkpoint (a Qwen3 of 5 M parameters) and `generate` on that
one; the native engine has V4 (`--model`) and `generate` on that. On a GPU all arms have one V4 checkpoint in
the released FP8/FP4 layout: 4 layers at Flash's width, 2.4 B parameters, made anew or given (`--checkpoint`).
There the native engine and transformers hold its values in bf16; vLLM computes with the codes, with FP8
activations and an FP8 cache. vLLM's Python: `--vllm-python`, else .venv-vllm (make vllm), else this one if it
has vLLM.
Goals on one H100: 12 x `generate` at batch 8, 0.8 x vLLM with CUDA graphs at batch 8 and 64.

Memory of an arm: on a CPU, peak of what is resident beyond its libraries; on a GPU, peak of what is
allocated; vLLM's includes the cache that it reserves.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_timing import median_text
from rollout_arms import SKIPPED, write_dense, write_v4

ROOT = Path(__file__).parents[1]
START_LIMIT_S, BATCH_LIMIT_S, TABLE_LIMIT_S = (
    400,
    240,
    240,
)  # vLLM compiles kernels on a GPU where none are cached
IS_GPU = torch.cuda.is_available()
BEGAN = time.perf_counter()
QUICK = {"batches": [1, 4], "rounds": 2, "prompt": 8, "tokens": 12}
TABLES = {"publication": ["publish.py", "30", "2", "7"], "log": ["token_log.py"]}
QUICK_TABLES = {"publication": ["publish.py", "0.5", "1", "2"], "log": ["token_log.py", "8", "16"]}


# ---- arms -----------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(f"{time.perf_counter() - BEGAN:5.0f} s  {text}", file=sys.stderr, flush=True)


@dataclass
class Arm:
    """The parent's end of an arm's process. `ready`: what it said when it had started, or {"failed": why}."""

    model: str
    name: str
    process: subprocess.Popen[str]
    errors: Path
    ready: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, model: str, name: str, python: str, order: dict[str, Any], errors: Path) -> Arm:
        threads = str(order["threads"])
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        settings = {"OMP_NUM_THREADS": threads, "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        if order["device"] == "cpu":
            settings["TORCH_COMPILE_DISABLE"] = (
                "1"  # compiled, vLLM starts two minutes later and is no faster
            )
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("rollout_arms.py")), json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors.open("w"),
            text=True,
            env={**os.environ, **settings, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        )
        return cls(model, name, process, errors)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None and "failed" not in self.ready

    def await_ready(self) -> None:
        if not self.ready:
            self.ready = self.hear(START_LIMIT_S)
            started = f"ready after {self.ready.get('start_s', 0):.0f} s"
            note(f"{self.model}, {self.name}: {self.ready.get('failed', started)}")

    def sample(self, **wanted: int) -> dict[str, Any]:
        """What a batch took (`Marks.measured`, peak), or {"failed": why}."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return self.hear(BATCH_LIMIT_S)

    def hear(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(limit_s) else None
        if line:
            return json.loads(line)
        self.process.kill()
        last = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
        return {"failed": f"over {limit_s:g} s" if line is None else " ".join(last)[:300] or "it died"}

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)


def start_arms(given: argparse.Namespace, folder: Path) -> Iterator[Arm]:
    """All arms of this machine, at once; vLLM last on a GPU: it takes a share of the memory that is free."""
    v4, dense = given.checkpoint or folder / "v4", folder / "dense"
    if given.checkpoint is None:
        note(f"writing {given.model} with random weights")
        write_v4(v4, given.model)
    wanted = [("V4", name, name.split()[0], v4) for name in ("native", "native again", "transformers")]
    if given.vllm_python and not IS_GPU:
        write_dense(dense)
        wanted += [("dense", name, name, dense) for name in ("vllm", "transformers")]
    elif given.vllm_python:
        wanted.append(("V4", "vllm", "vllm", v4))
    order: dict[str, Any] = {"threads": given.threads, "device": "cuda" if IS_GPU else "cpu"}
    order["dtype"] = "bfloat16" if IS_GPU else "float32"
    order |= {"batches": given.batches, "length": given.prompt + given.tokens}
    started: list[Arm] = []
    for number, (model, name, kind, checkpoint) in enumerate(wanted):
        python = given.vllm_python if kind == "vllm" else sys.executable
        mine = {**order, "kind": kind, "folder": str(checkpoint)}
        if IS_GPU and kind == "vllm":
            for arm in started:
                arm.await_ready()
        started.append(Arm.start(model, name, python, mine, folder / f"{number}.err"))
        yield started[-1]


# ---- speed ----------------------------------------------------------------------------------------


def check_digests(arms: Sequence[Arm]) -> None:
    """SystemExit if two arms of one model hold different values."""
    for model in {arm.model for arm in arms}:
        held = {arm.name: arm.ready["digest"] for arm in arms if arm.model == model and arm.is_alive}
        if len(set(held.values())) > 1:
            raise SystemExit(f"FAIL: the weights of {model} differ between arms: {held}")


def take_turns(arms: Sequence[Arm], given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every arm and batch: what each round measured, or why not."""
    rows = []
    for batch in given.batches:
        cells = {id(arm): {"arm": arm, "batch": batch, "found": []} for arm in arms}
        for turn in range(given.rounds + 1):
            for arm in arms if turn % 2 else arms[::-1]:
                cell = cells[id(arm)]
                if "failed" in cell or not arm.is_alive:
                    continue
                tokens = given.tokens if turn else SKIPPED + 1  # the first round makes what is made once
                found = arm.sample(rows=batch, prompt=given.prompt, tokens=tokens, seed=turn)
                if "failed" in found:
                    cell["failed"] = found["failed"]
                elif turn:
                    cell["found"].append(found)
        rows += cells.values()
        for cell in cells.values():
            found = (
                f"{statistics.median(rates(cell)):.0f} tokens/s" if cell["found"] else cell.get("failed", "–")
            )
            note(f"{batch} rows, {cell['arm'].model}, {cell['arm'].name}: {found}")
    return rows


def rates(row: dict[str, Any], tokens: str = "tokens", time_: str = "s") -> list[float]:
    return [found[tokens] / found[time_] for found in row["found"]]


def ratelines(arms: Sequence[Arm], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "| model | arm | digest of the values it holds | `publish` into it, s | ready after, s |"
    yield "|---|---|---|---|---|"
    for arm in arms:
        ready = arm.ready
        published = ready.get("published_s")
        told = [ready.get("digest", ready.get("failed", ""))[:64], f"{published:.2f}" if published else "–"]
        yield f"| {arm.model} | {arm.name} | {told[0]} | {told[1]} | {ready.get('start_s', 0):.0f} |"
    yield ""
    unit = "GiB" if IS_GPU else "MiB"
    ratios = "× generate | × vLLM | tokens a CPU s | × generate by it"
    yield f"| model | batch | arm | tokens/s | {ratios} | with prompts, tokens/s | {unit} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        arm, batch = row["arm"], row["batch"]
        head = f"| {arm.model} | {batch} | {arm.name} |"
        if not row["found"]:
            yield f"{head} {row.get('failed', 'did not start')} | | | | | | |"
            continue
        beside = {r["arm"].name: r for r in rows if r["arm"].model == arm.model and r["batch"] == batch}
        generate, vllm = beside.get("transformers"), beside.get("vllm")
        by_cpu = [median_text(rates(row, time_="cpu_s"), digits=0), ratio(row, generate, "cpu_s")]
        times = [ratio(row, generate), ratio(row, vllm), *by_cpu]
        whole = median_text(rates(row, "all_tokens", "all_s"), digits=0)
        peak = max(found["peak"] for found in row["found"]) / 2 ** (30 if IS_GPU else 20)
        shown = [median_text(rates(row), digits=0), *times, whole, f"{peak:.{1 if IS_GPU else 0}f}"]
        yield f"{head} {' | '.join(shown)} |"


def ratio(row: dict[str, Any], other: dict[str, Any] | None, time_: str = "s") -> str:
    """Medians over medians; nothing where the other arm has none or is this one."""
    if other is None or other is row or not other["found"]:
        return ""
    mine, theirs = (statistics.median(rates(r, time_=time_)) for r in (row, other))
    return f"{mine / theirs:.2f}"


def plot(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Tokens/s against rows, both logarithmic, a panel a model; the bars are the range of the rounds."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["arm"].model for row in rows))
    figure = Figure(figsize=(5.2 * len(models) + 0.4, 4.2), facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for panel, model in zip(panels, models):
        for name in dict.fromkeys(row["arm"].name for row in rows if row["arm"].model == model):
            if name == "native again":
                continue
            mine = [r for r in rows if r["arm"].model == model and r["arm"].name == name and r["found"]]
            middle = [statistics.median(rates(r)) for r in mine]
            low, high = [min(rates(r)) for r in mine], [max(rates(r)) for r in mine]
            span = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
            panel.errorbar([r["batch"] for r in mine], middle, span, marker="o", capsize=3, label=name)
        panel.set(xscale="log", yscale="log", xlabel="rows decoded together", title=f"{model} checkpoint")
        batches = sorted({row["batch"] for row in rows})
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.grid(True, color="#dddddd")
        panel.legend(frameon=False)
    panels[0].set_ylabel("sampled tokens a second")
    figure.savefig(path, dpi=130)


def speed(given: argparse.Namespace, picture: Path | None) -> Iterator[str]:
    yield CAPTION.format(
        rounds=given.rounds, prompt=given.prompt, tokens=given.tokens, model=given.checkpoint or given.model
    )
    arms: list[Arm] = []
    with tempfile.TemporaryDirectory(prefix="rollout-bench-") as folder:
        try:
            arms += start_arms(given, Path(folder))
            for arm in arms:
                arm.await_ready()
            check_digests(arms)
            rows = take_turns(arms, given)
        finally:
            for arm in arms:
                arm.close()
    yield from ratelines(arms, rows)
    if not given.vllm_python:
        yield "\nvLLM is not here (`make vllm`, or `--vllm-python`)."
    if picture:
        plot(picture, [row for row in rows if row["found"]])
        yield f"\n![tokens a second against rows decoded together]({picture.name})"


CAPTION = """Sampled at temperature 1, prompts of {prompt} random tokens, {tokens} new ones a row,
median (range) of {rounds} rounds; V4 is `{model}`. Equal digests: the arms of a model hold equal values. On a
CPU the vLLM arm serves a dense checkpoint, because its CPU build cannot serve V4, and is to be compared with
`generate` of that one only; "× generate" is each arm's ratio to transformers on the same checkpoint.
`publish` verifies the digest and loads; vLLM's also exports and scores the probes that prove the update.
"""


# ---- the page -------------------------------------------------------------------------------------


def other_table(command: Sequence[str]) -> str:
    """What another bench prints; why it does not, where it fails."""
    try:
        done = subprocess.run(
            [sys.executable, str(ROOT / "bench" / command[0]), *command[1:]],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
            capture_output=True,
            text=True,
            timeout=TABLE_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return f"over {TABLE_LIMIT_S} s"
    last = " ".join(done.stderr.strip().splitlines()[-1:])
    return f"not measured: {last[:300]}" if done.returncode else done.stdout.strip()


def sections(given: argparse.Namespace, picture: Path | None) -> Iterator[str]:
    cores, load = os.cpu_count(), os.getloadavg()[0]  # before any arm of ours
    yield f"# Rollouts, {date.today()}\n"
    threads = f"{given.threads} threads of {cores} cores, load {load:.1f}"
    yield f"{device_name()}, {threads}, torch {torch.__version__}\n"
    if load > 1:
        yield "Others were computing here: of wall times believe nothing that A/A does not bear out.\n"
    for table in given.tables:
        yield f"## {table}\n"
        if table == "speed":
            yield from speed(given, picture)
        else:
            command = (QUICK_TABLES if given.quick else TABLES)[table]
            text = "not measured: needs Ray" if table == "publication" and not find_spec("ray") else ""
            yield f"`python bench/{' '.join(command)}`\n\n" + (text or other_table(command))
        yield ""


def device_name() -> str:
    return torch.cuda.get_device_name() if IS_GPU else f"{os.cpu_count()} CPU cores"


def find_vllm() -> str | None:
    beside = ROOT / ".venv-vllm" / "bin" / "python"
    return str(beside) if beside.exists() else sys.executable if find_spec("vllm") else None


def parse() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help="smallest sizes: under a minute, says little")
    parser.add_argument("--tables", nargs="+", choices=["speed", *TABLES], default=["speed", *TABLES])
    parser.add_argument("--model", default="flash4" if IS_GPU else "tiny", help="a preset of model/config.py")
    parser.add_argument("--checkpoint", type=Path, help="V4 in a released layout, instead of random weights")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64 if IS_GPU else 32)
    parser.add_argument("--tokens", type=int, default=128 if IS_GPU else 32)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--vllm-python", default=find_vllm(), help="interpreter with vLLM; '' leaves it out")
    parser.add_argument("--out", type=Path, help="folder for <date>-<device>-rollout.md and .png")
    given = parser.parse_args()
    if given.quick:
        vars(given).update(QUICK)
    return given


def main() -> None:
    given, began = parse(), time.monotonic()
    page = picture = None
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        page = given.out / f"{date.today()}-{device_name().replace(' ', '-')}-rollout.md"
        picture = page.with_suffix(".png") if find_spec("matplotlib") and "speed" in given.tables else None
    lines = []
    for line in sections(given, picture):
        print(line, flush=True)
        lines.append(line)
    lines.append(f"Taken in {time.monotonic() - began:.0f} s.\n")
    print(lines[-1])
    if page:
        page.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
