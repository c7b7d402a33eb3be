"""A training step and batched decoding on the CPU, ours and transformers' eager deepseek_v4, equal weights.

    python bench/against_transformers.py [--quick] [--config wide] [--threads 2] [--recompute mhc]
    python bench/against_transformers.py --slope       peak memory of our step, 4k to 131k tokens

A training step is forward, cross-entropy, backward: theirs on the logits that their model returns, ours as
our trainers do it, from hidden states and the head by chunks (linear_logprob), with `engine.recompute` as
`--recompute` says; speed and memory are of the same steps. Decoding is 32 rows of equal prompts,
sampled at temperature 1: our engine's steps, their `generate`; the prompts' forward is not counted. Every arm
of a measurement is a process of its own, with its own peak memory; the arms take turns, one step each, so
that a machine which others use too treats both alike. Medians; `by CPU s` is the ratio of tokens per second
of processor time. Memory is the peak of resident memory above what the process held with its weights after a
warm-up step of 8 tokens, whose gradients are dropped: gradients count. Linux only (/proc).

Targets: training 2 x faster at 8 x 512 tokens, 10 x at 4,096, with a quarter of the memory; decoding 4 x;
a slope of at most 1.05.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import resource
import selectors
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORKS: dict[str, dict[str, Any]] = {
    "train 8 x 512": {"do": "train", "rows": 8, "tokens": 512, "speed": 2.0, "memory": 4.0},
    "train 1 x 4096": {"do": "train", "rows": 1, "tokens": 4096, "speed": 10.0, "memory": 4.0},
    "decode 32 rows": {"do": "decode", "rows": 32, "prompt": 192, "tokens": 64, "speed": 4.0},
}
QUICK = {"decode 32 rows": {"tokens": 24}}
SLOPE_TOKENS = [4096 * 2**i for i in range(6)]
START_LIMIT_S = 90
Step = dict[str, float]
"""s, cpu_s (processor seconds of all threads), tokens; of a training step its loss."""


def config_of(name: str):
    """tiny: the demo's model; wide: width 256, 8 layers, 31 M parameters. All layer kinds."""
    from consilience.model.config import MINI, TINY

    wide = replace(
        MINI,
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        q_lora_rank=128,
        o_lora_rank=128,
        compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
        moe_intermediate_size=256,
    )
    return {"tiny": TINY, "wide": wide}[name]


# ---- an arm: a process that does as it is told, one JSON line in, one out ----


def make_arm(who: str, config, recompute: list[str]):
    """Functions train(rows, tokens) and decode(rows, prompt, tokens) -> Step, of one side."""
    import torch

    from consilience.model.initialize import initialize
    from consilience.model.kernels.linear_logprob import linear_logprob
    from consilience.model.recompute import recompute_policy, set_recompute
    from consilience.model.transformer import Transformer

    model = initialize(Transformer(config), seed=0)
    set_recompute(model, recompute_policy(recompute))
    if who == "transformers":
        sys.path.insert(0, str(ROOT / "tests" / "model"))
        from transformers_oracle import hf_twin

        model = hf_twin(model)
    generator = torch.Generator().manual_seed(1)
    draw = lambda rows, tokens: torch.randint(config.vocab_size, (rows, tokens), generator=generator)

    def train(rows: int, tokens: int) -> Step:
        ids, targets = draw(rows, tokens), draw(rows, tokens).flatten()
        model.requires_grad_(True).train()
        began = clock()
        if who == "ours":
            hidden = model.hidden(ids).flatten(0, 1)
            loss = -linear_logprob(hidden, model.head.weight, targets).logprob.mean()
        else:
            logits = model(ids, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        taken = since(began, rows * tokens)
        model.zero_grad(set_to_none=True)
        return {**taken, "loss": loss.item()}

    def decode(rows: int, prompt: int, tokens: int) -> Step:
        model.requires_grad_(False).eval()
        work = decode_ours if who == "ours" else decode_theirs
        return work(model, draw(rows, prompt), tokens)

    return train, decode


def clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(began: tuple[float, float], tokens: int) -> Step:
    now = clock()
    return {"s": now[0] - began[0], "cpu_s": now[1] - began[1], "tokens": tokens}


def decode_ours(model, ids, tokens: int) -> Step:
    """All tokens but those of the engine's first step, which has the prompts' forward in it."""
    from consilience.rollout.engine import Request, SamplingParams
    from consilience.rollout.native_engine import NativeEngine

    engine = NativeEngine(model, max_rows=len(ids), max_length=ids.shape[1] + tokens)
    requests = [
        Request(f"r{i}", tuple(row), SamplingParams(1.0, max_tokens=tokens, seed=i))
        for i, row in enumerate(ids.tolist())
    ]
    engine.submit(requests)
    engine.step()
    assert not engine.state().num_waiting
    began, before = clock(), engine.state().sampled_tokens
    while engine.state().num_running:
        engine.step()
    assert engine.state().sampled_tokens == len(ids) * tokens
    return since(began, len(ids) * tokens - before)


def decode_theirs(model, ids, tokens: int) -> Step:
    """All tokens but the first two."""
    import torch
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def __call__(self, input_ids, scores, **kwargs):
            self.times.append(clock())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    watch = Clock()
    model.generation_config.eos_token_id = None
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": tokens}
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, stopping_criteria=[watch], **sampling
    )
    assert out.shape[1] == ids.shape[1] + tokens == ids.shape[1] + len(watch.times)
    return since(watch.times[1], len(ids) * (tokens - 2))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(field))
    return 1024 * int(line.split()[1])


def settle() -> int:
    """Hand freed memory back, start a new peak, and return what is resident, in bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def serve(order: dict[str, Any]) -> None:
    """The arm's process: make the model, then a step a line."""
    import torch

    ctypes.CDLL(None).prctl(1, 9)  # killed when the parent is gone
    torch.set_num_threads(order["threads"])
    limit = order["limit_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    work = order["work"]
    train, decode = make_arm(order["who"], config_of(order["config"]), order["recompute"])
    if work["do"] == "train":
        train(1, 8)
        step = lambda: train(work["rows"], work["tokens"])
    else:
        decode(1, 8, 3)
        step = lambda: decode(work["rows"], work["prompt"], work["tokens"])
    base = settle()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        try:
            told = step()
        except (MemoryError, RuntimeError) as error:
            if "memory" not in str(error) and not isinstance(error, MemoryError):
                raise
            print(json.dumps({"failed": f"needs more than {limit / 2**30:.0f} GiB"}), flush=True)
            return
        print(json.dumps({**told, "peak": resident("VmHWM") - base}), flush=True)


class Arm:
    """The parent's end of an arm; a reply that does not come in time ends it."""

    def __init__(self, who: str, config: str, work: dict[str, Any], options: argparse.Namespace) -> None:
        order = {"who": who, "config": config, "work": work, "threads": options.threads}
        order["recompute"] = options.recompute
        order["limit_bytes"] = int(min(options.memory_gib, 0.7 * available_gib()) * 2**30)
        command = [sys.executable, __file__, "--serve", json.dumps(order)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
        self.process = subprocess.Popen(command, **pipes)
        self.steps: list[Step] = []
        self.peak = 0
        self.failed = ""
        self._hear(START_LIMIT_S)

    def step(self, limit_s: float) -> None:
        """One step; what it took and the peak so far are kept."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        reply = self._hear(limit_s)
        if "s" in reply:
            self.steps.append(reply)
            self.peak = max(self.peak, reply["peak"])

    def _hear(self, limit_s: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(limit_s) else None
        if line is None:
            self.failed = f"over {limit_s:g} s"
        elif not line:
            self.failed = "killed (out of memory?)"
        else:
            reply = json.loads(line)
            self.failed = reply.get("failed", "")
            return reply
        return {}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def available_gib() -> float:
    (line,) = (
        row for row in Path("/proc/meminfo").read_text().splitlines() if row.startswith("MemAvailable")
    )
    return int(line.split()[1]) / 2**20


# ---- measurements ----


def compare(config: str, work: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Both arms by turns until the rounds or the time of a cell are used up; the first round warms up."""
    arms = {who: Arm(who, config, work, options) for who in ("ours", "transformers")}
    began = time.perf_counter()
    try:
        for turn in range(options.rounds + 1):
            for who in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
                if not arms[who].failed:
                    arms[who].step(options.step_limit_s)
            spent = time.perf_counter() - began
            if all(arm.failed for arm in arms.values()) or spent * (turn + 2) / (turn + 1) > options.cell_s:
                break
    finally:
        for arm in arms.values():
            arm.close()
    result: dict[str, Any] = {}
    for who, arm in arms.items():
        steps = arm.steps[1:] or arm.steps
        median = lambda key: statistics.median(s["tokens"] / s[key] for s in steps) if steps else None  # noqa: B023
        result[who] = {
            "tokens_per_s": median("s"),
            "tokens_per_cpu_s": median("cpu_s"),
            "peak_mib": arm.peak / 2**20 if arm.steps else None,
            "steps": len(steps),
            "failed": arm.failed,
        }
    return result


def ratio(result: dict[str, Any], key: str, invert: bool = False) -> float | None:
    ours, theirs = result["ours"][key], result["transformers"][key]
    if not ours or not theirs:
        return None
    return theirs / ours if invert else ours / theirs


def show(config: str, name: str, work: dict[str, Any], result: dict[str, Any]) -> None:
    def cell(who: str, key: str) -> str:
        value = result[who][key]
        return result[who]["failed"] or "-" if value is None else f"{value:,.0f}"

    def verdict(value: float | None, target: float | None) -> str:
        if target is None:
            return ""
        return f"of {target:.0f}" if value is None else f"{value:6.1f} x of {target:.0f}"

    by_cpu = ratio(result, "tokens_per_cpu_s")
    speed = verdict(ratio(result, "tokens_per_s"), work["speed"])
    memory = verdict(ratio(result, "peak_mib", invert=True), work.get("memory"))
    print(
        f"{config:6s} {name:15s}",
        f"{cell('ours', 'tokens_per_s'):>9s} {cell('transformers', 'tokens_per_s'):>12s} {speed:>15s}",
        f"{cell('ours', 'peak_mib'):>9s} {cell('transformers', 'peak_mib'):>12s} {memory:>15s}",
        f"{f'{by_cpu:.1f} x' if by_cpu else '-':>8s}",
        f"{result['ours']['steps']:>3d}/{result['transformers']['steps']}",
        flush=True,
    )


def table(options: argparse.Namespace) -> dict[str, Any]:
    print(f"{'':22s} {'tokens/s':>9s} {'transformers':>12s} {'':15s}", end=" ")
    print(f"{'peak MiB':>9s} {'transformers':>12s} {'':15s} by CPU s  steps")
    found: dict[str, Any] = {}
    for config in options.config or (["tiny"] if options.quick else ["tiny", "wide"]):
        for name, work in WORKS.items():
            if options.only not in name:
                continue
            work = {**work, **(QUICK.get(name, {}) if options.quick else {})}
            found[f"{config}, {name}"] = compare(config, work, options)
            show(config, name, work, found[f"{config}, {name}"])
    return found


def slope(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of our training step by length, until one does not fit the limits."""
    peaks: dict[int, float] = {}
    for tokens in SLOPE_TOKENS:
        arm = Arm("ours", "tiny", {"do": "train", "rows": 1, "tokens": tokens}, options)
        arm.step(options.step_limit_s)
        arm.close()
        if arm.failed:
            print(f"{tokens:7,d} tokens: {arm.failed}")
            break
        peaks[tokens] = arm.peak / 2**20
        print(f"{tokens:7,d} tokens: {peaks[tokens]:9,.0f} MiB, {arm.steps[0]['s']:7.1f} s", flush=True)
    if len(peaks) < 2:
        return {"peak_mib": peaks, "slope": None}
    logs = [(math.log(t), math.log(m)) for t, m in peaks.items()]
    steepness, _ = statistics.linear_regression(*zip(*logs))
    last = (logs[-1][1] - logs[-2][1]) / (logs[-1][0] - logs[-2][0])
    span = f"{min(peaks):,d} to {max(peaks):,d} tokens"
    print(f"log-log slope {steepness:.3f} over {span}, last doubling {last:.3f} (target: at most 1.05)")
    return {"peak_mib": peaks, "slope": steepness, "last_slope": last}


def main() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__
    )
    parser.add_argument("--quick", action="store_true", help="tiny only, one timed step each: under a minute")
    parser.add_argument("--slope", action="store_true", help="our memory by length instead of the comparison")
    parser.add_argument("--config", action="append", choices=["tiny", "wide"])
    parser.add_argument(
        "--recompute", nargs="+", default=["none"], metavar="NAME", help="engine.recompute of ours"
    )
    parser.add_argument("--only", default="", metavar="WORD", help="rows of the table that have it, as train")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument(
        "--rounds", type=int, default=5, help="timed steps of each arm, as the cell's time allows"
    )
    parser.add_argument("--cell-s", type=float, default=50.0, help="seconds of one row of the table")
    parser.add_argument("--step-limit-s", type=float, default=240.0)
    parser.add_argument("--memory-gib", type=float, default=16.0, help="limit of an arm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(json.loads(options.serve))
    if options.quick:
        options.rounds, options.cell_s = 1, 15.0
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{options.threads} threads of {cores} cores, load {load:.1f}, {available_gib():.0f} GiB free")
    found = slope(options) if options.slope else table(options)
    if options.json:
        about = {"threads": options.threads, "load": load}
        options.json.write_text(json.dumps({**about, "found": found}, indent=1))
    return None


if __name__ == "__main__":
    main()
