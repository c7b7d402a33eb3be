"""Memory against time of a training step under each policy of activation checkpointing.

    PYTHONPATH=. python bench/recompute.py [tiny|wide] [ROWSxTOKENS …] [rounds=2] [plot=FILE] [bytes] [cuda]

Default: tiny at 8x512, in about a minute. A step is forward, cross-entropy, backward, on one
thread. "in use" and "resident" are peaks of resident memory above what a process held after a warm-up step
of one short row (weights and gradients), every arm forked with the weights in place: the first with an
allocator that gives every large block back at once, the second as malloc is. Time is the processor seconds
of the fastest step; the arms take turns, a step each. On a GPU "in use" is the tensors' peak, "resident" the
allocator's, time the wall clock's. `bytes` prints what a token leaves behind in a block, by name. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from consilience.model.config import PRESETS, TINY, ModelConfig
from consilience.model.initialize import initialize
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.recompute import NAMES, POLICIES, name_of, recompute_policy, set_recompute
from consilience.model.transformer import Transformer

ARMS = ["none", *POLICIES]
WIDE = replace(
    PRESETS["mini"],
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    q_lora_rank=128,
    o_lora_rank=128,
    compress_ratios=(0, 0, 4, 128, 4, 128, 4, 128),
    moe_intermediate_size=256,
)
CONFIGS = {"tiny": TINY, "wide": WIDE, "small": PRESETS["small"]}
M_MMAP_THRESHOLD = -3  # of mallopt(3): larger blocks are mapped, and unmapped when they are freed


@dataclass(frozen=True)
class Point:
    """Peak bytes above weights and gradients; seconds of the fastest step."""

    in_use: float
    resident: float
    seconds: float


def train(model: Transformer, ids: Tensor) -> None:
    """Forward and backward; the gradients stay allocated."""
    hidden = model.hidden(ids).flatten(0, 1)
    (-linear_logprob(hidden, model.head.weight, ids.flatten()).logprob.mean()).backward()
    torch._foreach_zero_([p.grad for p in model.parameters() if p.grad is not None])  # pyright: ignore[reportPrivateImportUsage]


def draw(config: ModelConfig, rows: int, tokens: int) -> Tensor:
    return torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))


# ---- measuring ----


def resident(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def peak_cpu(model: Transformer, ids: Tensor, *, is_mapped: bool) -> int:
    """Bytes by which one step raises this process's resident memory, at most."""
    if is_mapped:
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    train(model, ids[:1, :128])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    train(model, ids)
    return resident("VmHWM") - before


def in_child(work: Callable[[], Any]) -> Any:
    """The result of `work` in a fork of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, json.dumps(work()).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = stream.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("an arm failed")
    return json.loads(told)


def peaks_gpu(model: Transformer, ids: Tensor) -> tuple[int, int]:
    """Bytes above weights and gradients that tensors take, and that the allocator takes for them."""
    train(model, ids)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    train(model, ids)
    return (
        torch.cuda.max_memory_allocated() - before[0],
        torch.cuda.max_memory_reserved() - before[1],
    )


def seconds_of(model: Transformer, ids: Tensor) -> float:
    """Of one step: the processor's on a CPU, the wall clock's on a GPU."""
    if not ids.is_cuda:
        began = time.process_time()
        train(model, ids)
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    train(model, ids)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def fastest(model: Transformer, ids: Tensor, rounds: int) -> dict[str, float]:
    """Every arm's seconds a step; the arms take turns."""
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(rounds + 1):
        for arm in ARMS if turn else ARMS[:2]:  # to get warm; the first recomputation imports for seconds
            set_recompute(model, recompute_policy(arm))
            times[arm].append(seconds_of(model, ids))
    return {arm: min(found) for arm, found in times.items()}


def curve(model: Transformer, ids: Tensor, rounds: int) -> dict[str, Point]:
    """Every arm's memory and time. This process itself makes no step on the CPU: its heap stays clean."""
    peaks = {}
    for arm in ARMS:
        set_recompute(model, recompute_policy(arm))
        if ids.is_cuda:
            peaks[arm] = peaks_gpu(model, ids)
        else:
            peaks[arm] = [
                in_child(partial(peak_cpu, model, ids, is_mapped=mapped)) for mapped in (True, False)
            ]
    times = fastest(model, ids, rounds) if ids.is_cuda else in_child(partial(fastest, model, ids, rounds))
    return {arm: Point(*peaks[arm], times[arm]) for arm in ARMS}


# ---- what a token leaves behind ----


class Tally(TorchDispatchMode):
    """Bytes that the operations of each name make."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if name := name_of(func, args):
            self.bytes[name] += sum(t.nbytes for t in (made if isinstance(made, list) else [made]))
        return made


def bytes_by_name(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Bytes per token and block: what each name saves, and `all` that autograd keeps without a policy."""
    model = initialize(Transformer(config, torch.float32), 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(draw(config, 1, tokens))
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)
    set_recompute(model, recompute_policy("cheap"))
    with Tally() as tally:
        model.hidden(draw(config, 1, tokens))
    count = tokens * config.num_hidden_layers
    return {name: tally.bytes[name] / count for name in NAMES} | {"all": total / count}


# ---- what is shown ----


def table(title: str, found: dict[str, Point]) -> None:
    none = found["none"]
    print(f"{title}\n{'policy':>12s}  in use MiB   of none  resident MiB   step ms   of none")
    for arm, own in found.items():
        print(
            f"{arm:>12s}  {own.in_use / 2**20:10.1f}  {own.in_use / none.in_use:8.2f}"
            f"  {own.resident / 2**20:12.1f}  {1e3 * own.seconds:8.1f}  {own.seconds / none.seconds:8.2f}"
        )


def plot(path: str, curves: dict[str, dict[str, Point]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for axis, (title, found) in zip(axes[0], curves.items()):
        for arm, point in found.items():
            axis.plot(point.in_use / 2**20, 1e3 * point.seconds, "o", markersize=9, label=arm)
        axis.set(title=title, xlabel="peak memory in use, MiB", ylabel="training step, ms")
        axis.set_xlim(left=0, right=1.2 * max(point.in_use for point in found.values()) / 2**20)
        axis.set_ylim(bottom=0, top=1.15e3 * max(point.seconds for point in found.values()))
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: Iterable[str]) -> None:
    settings = dict(word.split("=", 1) for word in arguments if "=" in word)
    words = [word for word in arguments if "=" not in word]
    name = next((word for word in words if word in CONFIGS), "tiny")
    shapes = [word for word in words if word[0].isdigit()] or ["8x512"]
    torch.set_num_threads(1)
    if "bytes" in words:
        for preset in ("tiny", "small"):
            found = bytes_by_name(PRESETS[preset], 2048)
            print(f"{preset}: bytes per token and block, fp32, 2,048 tokens")
            print("\n".join(f"{key:>20s} {value:9.0f}" for key, value in found.items()))
        return
    curves = {}
    for shape in shapes:
        rows, tokens = map(int, shape.split("x"))
        is_gpu = "cuda" in words
        device = torch.device("cuda" if is_gpu else "cpu")
        model = initialize(Transformer(CONFIGS[name], torch.bfloat16 if is_gpu else None), 0).to(device)
        title = f"{name}, {rows} x {tokens:,} tokens"
        ids = draw(model.config, rows, tokens).to(device)
        curves[title] = curve(model, ids, int(settings.get("rounds", 2)))
        table(title, curves[title])
    if "plot" in settings:
        plot(settings["plot"], curves)


if __name__ == "__main__":
    main(sys.argv[1:])
