"""Attention on one GPU: sliding, HCA and CSA, forward and backward, beside the floors of the same run.

    PYTHONPATH=. python bench/attention_gpu.py [--sweep]

Flash's widths: 64 heads of 512, window 128, 512 picks of entries of 4 tokens, entries of 128 tokens; `small`:
16 heads of 128, 256 picks. bf16, random normal data (picks at random or leaning to recent entries). First the
errors to fp64; then arms in turns. TFLOP/s count 4 (forward) and 10 (backward) · H · C a key that a query
sees, bytes Q, O (and dO, dQ) and the keys once. "of floor" is the larger of FLOP over this run's matrix rate
and bytes over its copy rate, over the time.

Predicted for Flash: forward of CSA, a tile of 64 keys takes 2,560 cycles of matrix units and shared memory;
it took 6,000, of which loads that begin behind the second product are the largest part. Sliding by halves:
bytes ask for 6 µs a query and SM, products of two programs for 5: 0.27 ms at 4k where one program took 0.42.
Backward at 32k CSA: weights 6 ms (2,048 cycles of products a tile of 64 keys, 1,400 of softmax and stores),
dQ 4.6, rows and their sums move 38 GB in 15.8 (measured), ranges 3.5, sorting 2: 32 ms (210 TFLOP/s).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from gpu_timing import (
    Table,
    arguments,
    copy_rate,
    matrix_rate,
    median_text,
    peak_bytes,
    relative_errors,
    time_arms,
)
from torch import Tensor

from consilience.model.config import PRESETS, ModelConfig
from consilience.model.kernels import (
    attention_problem,
    gpu_attention,
    triton_attention,
    triton_attention_backward,
    triton_attention_keys,
)
from consilience.model.kernels.attention_keys import Keys
from consilience.model.kernels.attention_problem import Problem, problem_of
from consilience.model.kernels.sink_attention import _SinkAttention, sink_attention_dense
from consilience.model.layout import Windows, packed_layout
from consilience.model.top_k import top_k

FLASH, SMALL = PRESETS["flash"], PRESETS["small"]
Call = tuple[Tensor, Keys, Tensor]


def draw_picks(windows: Windows, count: int, is_recent: bool) -> Tensor:
    """[1, T, K]: that many visible columns of each query, ascending, -1 behind them."""
    parts = []
    column = torch.arange(windows.num_columns, device="cuda")
    for first, stop in zip(windows.first[0].split(1024), windows.stop[0].split(1024)):
        seen = (column >= first[:, None]) & (column < stop[:, None])
        scores = torch.rand(seen.shape, device="cuda")
        if is_recent:
            scores += 2 * (column - stop[:, None]) / windows.num_columns
        best = top_k(scores.masked_fill_(~seen, float("-inf")), min(count, windows.num_columns))
        best = torch.where(seen.gather(1, best), best, windows.num_columns).sort(dim=-1).values
        best = torch.where(best < windows.num_columns, best, -1)
        parts.append(torch.nn.functional.pad(best, (0, count - best.shape[1]), value=-1))
    return torch.cat(parts)[None]


def draw(
    config: ModelConfig, kind: str, length: int, samples: int = 1, is_recent: bool = False, count: int = 0
) -> Call:
    """query, keys, sink of one packed row of equal samples."""
    owner = torch.arange(length, device="cuda") * samples // length
    position = torch.arange(length, device="cuda") % (length // samples)
    layout = packed_layout(config, owner[None], position[None], None)
    normal = lambda *shape: torch.randn(*shape, device="cuda").bfloat16().requires_grad_()
    keys = Keys(layout, config.sliding_window, normal(1, length, config.head_dim))
    if kind != "sliding":
        windows = layout.windows[4 if kind == "CSA" else 128]
        keys = replace(keys, entries=normal(1, windows.num_columns, config.head_dim), windows=windows)
        count = count or config.index_topk
        if kind == "CSA" and windows.num_columns > count:
            keys = replace(keys, picks=draw_picks(windows, count, is_recent))
    query = normal(1, length, config.num_attention_heads, config.head_dim)
    return query, keys, torch.randn(config.num_attention_heads, device="cuda").requires_grad_()


def leaves(call: Call) -> dict[str, Tensor]:
    query, keys, sink = call
    given = {"dQ": query, "d window": keys.window, "d entries": keys.entries, "d sink": sink}
    return {name: x for name, x in given.items() if x is not None}


def problem(call: Call) -> Problem:
    query, keys, sink = call
    return problem_of(query.detach(), keys, sink.detach(), query.shape[3] ** -0.5)


def cost(call: Call) -> tuple[float, float, float]:
    """Keys that all queries see; bytes of Q, O and the keys; both for one pass of H heads."""
    query, keys, _ = call
    token = torch.arange(query.shape[1], device="cuda")
    seen = (token + 1 - keys.layout.oldest).sum()
    windows = keys.windows
    if windows is not None:
        visible = windows.stop - windows.first
        seen += (visible if keys.picks is None else visible.clamp(max=keys.picks.shape[2])).sum()
    width = query.shape[3]
    rows = query.shape[1] + (0 if keys.entries is None else keys.entries.shape[1])
    return float(seen), 2.0 * query.numel(), 2.0 * rows * width


# ---- correctness --------------------------------------------------------------------------------


def correctness() -> None:
    print("\nErrors to fp64 on the same bf16 inputs: RMS / largest, over the exact RMS / largest\n")
    table = Table("case", "what", "ours", "bf16 twin (fp32 softmax)")
    cases = {
        "sliding 777": draw(FLASH, "sliding", 777, 3),
        "HCA 1,500": draw(FLASH, "HCA", 1500, 2),
        "CSA 1,000 by range": draw(FLASH, "CSA", 1000, 2),
        "CSA 1,000 by mask": draw(FLASH, "CSA", 1000, count=96),
        "CSA 1,300 gathered": draw(FLASH, "CSA", 1300, 2, count=80),
        "CSA 900 gathered, small": draw(SMALL, "CSA", 900, 2, count=50),
        "CSA 900 by mask, small": draw(SMALL, "CSA", 900, 1, count=100),
    }
    same = True
    for name, call in cases.items():
        grad = torch.randn_like(call[0])
        wide = lambda x: None if x is None else x.detach().double().requires_grad_()
        exact = replace(call[1], window=wide(call[1].window), entries=wide(call[1].entries))
        truth = results(sink_attention_dense, (wide(call[0]), exact, wide(call[2])), grad)
        ours, again = (results(gpu_attention.sink_attention, call, grad) for _ in "ab")
        plain = results(twin, call, grad)
        for what, right in truth.items():
            errors = (relative_errors(found[what], right) for found in (ours, plain))
            table.add(name, what, *(f"{rms:.1e} / {largest:.1e}" for largest, rms in errors))
        same &= all(torch.equal(ours[what], again[what]) for what in ours)
    print(f"\nTwo runs give the same bits in every case: {same}")


def results(attention: Callable[..., Tensor], call: Call, grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients."""
    made, names = attention(*call, call[0].shape[3] ** -0.5), leaves(call)
    grads = torch.autograd.grad(made, list(names.values()), grad.to(made.dtype))
    return {"output": made.detach()} | dict(zip(names, grads))


def twin(query: Tensor, keys: Keys, sink: Tensor, scale: float) -> Tensor:
    """The path that the kernels replace: batched products over blocks of queries."""
    place = replace(keys, window=None, entries=None, picks=None)
    tensors = (query, keys.window, keys.entries, keys.picks, sink)
    return _SinkAttention.apply(*tensors, scale, place, 1 << 26)  # type: ignore[return-value]


# ---- speed --------------------------------------------------------------------------------------


def speed_cases() -> Iterator[tuple[str, Callable[[], Call], float | None]]:
    """Name, call, and up to how many entries a pick they are masked."""
    usual = attention_problem.MASK_BELOW
    for kind, lengths in {"sliding": (4096, 32768), "HCA": (4096, 32768), "CSA": (4096, 8192, 32768)}.items():
        for length in lengths:
            yield f"{kind} {length}", partial(draw, FLASH, kind, length), usual
    for length, below in ((4096, 0), (6144, 0), (6144, 3), (8192, 4)):
        yield f"CSA {length}, the way forced", partial(draw, FLASH, "CSA", length), below
    yield "CSA 32768, 1,024 picks", partial(draw, FLASH, "CSA", 32768, count=1024), usual
    yield "CSA 32768, recent picks", partial(draw, FLASH, "CSA", 32768, is_recent=True), usual
    yield "CSA 32768, 8 samples", partial(draw, FLASH, "CSA", 32768, samples=8), usual
    for kind in ("sliding", "HCA", "CSA"):
        yield f"small: {kind} 16384", partial(draw, SMALL, kind, 16384), usual
    yield "small: CSA 4096, the way forced", partial(draw, SMALL, "CSA", 4096), 0
    yield "small: CSA 4096, the way forced", partial(draw, SMALL, "CSA", 4096), 4


def speed() -> None:
    matrix, copy = matrix_rate(), copy_rate()
    print(f"\nThis run: matrices {matrix / 1e12:.0f} TFLOP/s, copies {copy / 1e12:.2f} TB/s\n")
    columns = ["case", "way", "pass", "ms", "again", "TFLOP/s", "TB/s", "floor ms", "of floor", "beyond GiB"]
    table = Table(*columns)
    for name, make, attention_problem.MASK_BELOW in speed_cases():
        time_case(table, name, make(), matrix, copy)


def time_case(table: Table, name: str, call: Call, matrix: float, copy: float) -> None:
    given = problem(call)
    out, lse = triton_attention.forward(given)
    grad = torch.randn_like(out)
    forward = lambda: triton_attention.forward(given)
    backward = lambda: triton_attention_backward.backward(given, out, lse, grad)
    arms = {"forward": forward, "backward": backward, "forward again": forward, "backward again": backward}
    times = time_arms(arms, rounds=7)
    seen, query_bytes, key_bytes = cost(call)
    flop = seen * call[0].shape[2] * call[0].shape[3]
    way = ("none", "range", "mask", "gather")[given.mode]
    for what, factor, num_bytes in (
        ("forward", 4, 2 * query_bytes + key_bytes),
        ("backward", 10, 4 * query_bytes + 2 * key_bytes),
    ):
        seconds = statistics.median(times[what]) / 1e3
        floor = max(factor * flop / matrix, num_bytes / copy)
        again = f"{statistics.median(times[f'{what} again']):.3f}"
        rates = f"{factor * flop / seconds / 1e12:.0f}", f"{num_bytes / seconds / 1e12:.2f}"
        peak = f"{peak_bytes(arms[what]) / 2**30:.2f}"
        floors = f"{floor * 1e3:.3f}", f"{floor / seconds:.0%}"
        table.add(name, way, what, median_text(times[what], digits=3), again, *rates, *floors, peak)
    if name in ("sliding 4096", "CSA 8192", "CSA 32768"):
        profile(name, backward)


def profile(name: str, work: Callable[[], object]) -> None:
    """Where one call's device time goes."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        work()
        torch.cuda.synchronize()
    events = [e for e in run.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    parts = [f"{e.key[:40]} {e.self_device_time_total / 1e3:.3f} ms ({e.count})" for e in events[:9]]
    print(f"  backward of {name}: " + "; ".join(parts), flush=True)


# ---- launch settings ----------------------------------------------------------------------------

TILE, KEYS = triton_attention.Tile, triton_attention_keys.KeyTile
SWEEP = [
    (triton_attention.FORWARD, "_forward", [
        TILE(64, 64, 8, 2), TILE(64, 64, 8, 3), TILE(64, 32, 4, 1, 256), TILE(64, 32, 4, 2, 256),
        TILE(64, 16, 4, 2, 256), TILE(64, 64, 4, 1, 256)]),
    (triton_attention_backward.WEIGHTS, "_weights", [
        TILE(64, 64, 8, 1), TILE(64, 32, 8, 1), TILE(64, 16, 8, 1)]),
    (triton_attention_backward.D_QUERY, "_d_query", [
        TILE(64, 64, 4, 2, 256), TILE(64, 64, 4, 3, 256), TILE(64, 32, 4, 3, 256), TILE(64, 32, 4, 5, 256),
        TILE(64, 32, 4, 4, 256), TILE(64, 64, 8, 2), TILE(64, 64, 8, 3), TILE(64, 32, 8, 5)]),
    (triton_attention_keys.RANGES, "_ranges", [
        KEYS(128, 256, 64, 8, 2), KEYS(128, 256, 32, 8, 3), KEYS(128, 256, 32, 8, 4), KEYS(64, 256, 32, 8, 4),
        KEYS(64, 256, 64, 8, 2), KEYS(128, 128, 64, 8, 3), KEYS(128, 128, 32, 8, 4)]),
    (triton_attention_keys.ROWS, "_rows", [
        KEYS(64, 256, 0, 8, 2), KEYS(64, 256, 0, 4, 2), KEYS(64, 256, 0, 8, 4), KEYS(128, 256, 0, 8, 2),
        KEYS(64, 128, 0, 4, 3), KEYS(128, 128, 0, 4, 3)]),
]  # fmt: skip


def kernel_ms(work: Callable[[], object], kernel: str) -> float:
    """Device time of one call's launches of `kernel`: the median of five calls."""
    from torch.profiler import ProfilerActivity

    work()
    times = []
    for _ in range(5):
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as run:
            work()
            torch.cuda.synchronize()
        times.append(sum(e.self_device_time_total for e in run.key_averages() if kernel in e.key) / 1e3)
    return statistics.median(times)


def sweep() -> None:
    """Flash's widths; a setting that does not fit the chip says so."""
    cases = {"sliding 4096": draw(FLASH, "sliding", 4096), "HCA 8192": draw(FLASH, "HCA", 8192)}
    cases |= {"CSA 4096": draw(FLASH, "CSA", 4096), "CSA 8192": draw(FLASH, "CSA", 8192)}
    table = Table("kernel", "setting", *cases)
    for settings, kernel, choices in SWEEP:
        kept = dict(settings)
        for choice in choices:
            settings.update(dict.fromkeys((key for key in kept if key[:2] == (2, True)), choice))
            table.add(kernel, choice, *(setting_ms(problem(call), kernel) for call in cases.values()))
        settings.update(kept)


def setting_ms(given: Problem, kernel: str) -> str:
    try:
        out, lse = triton_attention.forward(given)
        if kernel == "_forward":
            return f"{kernel_ms(lambda: triton_attention.forward(given), kernel):.3f}"
        backward = lambda: triton_attention_backward.backward(given, out, lse, out)
        return f"{kernel_ms(backward, kernel):.3f}"
    except Exception as error:
        return type(error).__name__


def main() -> None:
    chosen = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    if chosen.sweep:
        sweep()
        return
    correctness()
    speed()


if __name__ == "__main__":
    main()
