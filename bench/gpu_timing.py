"""What every GPU table here shares: arms that take turns, ceilings measured beside them, a table to print.

Method (kernel notes 7): CUDA events around each call, arms interleaved with their order reversed every other
round, medians with the range, one arm twice (A/A), random data, peak memory in a round of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

Arm = Callable[[], Any]


def time_arms(arms: Mapping[str, Arm], rounds: int = 7, warm_up: int = 2) -> dict[str, list[float]]:
    """Milliseconds of each call of each arm. An arm that runs out of memory is left out, and said so."""
    alive = dict(arms)
    for name, arm in arms.items():
        try:
            for _ in range(warm_up):
                arm()
            torch.cuda.synchronize()
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory", flush=True)
            del alive[name]
        torch.cuda.empty_cache()
    found: dict[str, list[float]] = {name: [] for name in alive}
    for i in range(rounds):
        for name in list(alive) if i % 2 == 0 else list(alive)[::-1]:
            found[name].append(time_once(alive[name]))
    return found


def time_once(arm: Arm) -> float:
    """Milliseconds of one call."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in "ab")
    torch.cuda.synchronize()
    began.record()
    arm()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended)


def peak_bytes(arm: Arm) -> int:
    """Most bytes that a call holds beyond what was there before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arm()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def median_text(times: list[float], scale: float = 1.0, digits: int = 2) -> str:
    """median (min–max), each times `scale`."""
    low, mid, high = min(times) * scale, statistics.median(times) * scale, max(times) * scale
    return f"{mid:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def copy_rate(num_bytes: int = 2**31) -> float:
    """Bytes per second read and written by a device copy of `num_bytes`."""
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = time_arms({"copy": lambda: target.copy_(source)}, rounds=9)["copy"]
    return 2 * num_bytes / (statistics.median(times) / 1e3)


def matrix_rate(size: int = 8192) -> float:
    """FLOP per second of a bf16 product of two [size, size] random matrices."""
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in "ab")
    times = time_arms({"mm": lambda: a @ b}, rounds=9)["mm"]
    return 2 * size**3 / (statistics.median(times) / 1e3)


def relative_errors(found: torch.Tensor, exact: torch.Tensor) -> tuple[float, float]:
    """(largest, root mean square) error over the exact values' largest and root mean square."""
    error = found.double() - exact.double()
    return (
        (error.abs().max() / exact.abs().max()).item(),
        math.sqrt((error.square().mean() / exact.double().square().mean()).item()),
    )


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """--sweep; a bench adds its own."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", action="store_true", help="try the kernels' launch settings instead")
    return parser


class Table:
    """A Markdown table, each row printed as it comes; `note` adds a line below."""

    def __init__(self, *columns: str):
        self.add(*columns)
        self.add(*["---"] * len(columns))

    def add(self, *cells: Any) -> None:
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)

    def note(self, text: str) -> None:
        print(f"\n{text}\n", flush=True)
