"""Attention on one GPU: sliding, HCA and CSA, forward and backward, beside the floors of the same run.

    PYTHONPATH=. python bench/attention_gpu.py [--arms triton,gluon] [--ways] [--sweep] [--only CSA]

Arms: `gluon`, forward and the backward's weights with hand-placed copies (the default on Hopper); `triton`,
what all others get. `--ways`: other ways of reading entries, packed samples and small widths, by Triton.

Flash's widths: 64 heads of 512, window 128, 512 picks of entries of 4 tokens, entries of 128 tokens; `small`:
16 heads of 128, 256 picks. bf16, random normal data (picks at random or leaning to recent entries). First the
errors to fp64; then arms in turns. TFLOP/s count 4 (forward) and 10 (backward) · H · C a key that a query
sees, bytes Q, O (and dO, dQ) and the keys once. "of floor" is the larger of FLOP over this run's matrix rate
and bytes over its copy rate, over the time; "of copy" is bytes over the time, over the copy rate.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from attention_cudnn import cudnn_backward
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
    triton_attention_gluon,
    triton_attention_keys,
    triton_attention_parts_gluon,
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


# ---- arms ---------------------------------------------------------------------------------------

ARMS = ["triton", "gluon"]
CUDNN = "cuDNN (atomics)"


def choose(arm: str) -> None:
    attention_problem.HAND_PLACED = arm != "triton"


def serves(arm: str, call: Call) -> bool:
    return arm == "triton" or triton_attention_parts_gluon.is_available(problem(call))


def forward(arm: str, given: Problem) -> tuple[Tensor, Tensor]:
    choose(arm)
    kernels = triton_attention if arm == "triton" else triton_attention_gluon
    return kernels.forward(given)


def backward(arm: str, given: Problem, out: Tensor, lse: Tensor, grad: Tensor) -> object:
    choose(arm)
    return triton_attention_backward.backward(given, out, lse, grad)


def cudnn_arm(given: Problem, out: Tensor, lse: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """cuDNN's backward of a call with gathered picks, where it loads; how far its results are from ours."""
    if given.mode != attention_problem.GATHER or given.query.shape[2:] != (64, 512):
        return {}
    try:
        run = cudnn_backward(given, out, lse, grad)
        found = run()
    except Exception as fault:  # a library that does not load, or does not take the call, loses its arm only
        print(f"  cuDNN's arm is left out: {type(fault).__name__}: {str(fault)[:300]}")
        return {}
    ours = dict(zip(("dQ", "d window", "d entries", "d sink"), backward("gluon", given, out, lse, grad)))
    errors = (f"{n} {relative_errors(found[n], ours[n].reshape(found[n].shape))[1]:.1e}" for n in found)
    print(f"  cuDNN beside ours, RMS of the difference over the RMS: {', '.join(errors)}")
    return {CUDNN: run}


# ---- correctness --------------------------------------------------------------------------------


def correctness(arms: list[str]) -> None:
    print("\nErrors to fp64 on the same bf16 inputs: RMS / largest, over the exact RMS / largest\n")
    table = Table("case", "what", *arms, "bf16 twin (fp32 softmax)", "same bits twice")
    cases = {
        "sliding 777": draw(FLASH, "sliding", 777, 3),
        "HCA 1,500": draw(FLASH, "HCA", 1500, 2),
        "CSA 1,000 by range": draw(FLASH, "CSA", 1000, 2),
        "CSA 1,000 by mask": draw(FLASH, "CSA", 1000, count=96),
        "CSA 1,300 gathered": draw(FLASH, "CSA", 1300, 2, count=80),
        "CSA 900 gathered, small": draw(SMALL, "CSA", 900, 2, count=50),
        "CSA 900 by mask, small": draw(SMALL, "CSA", 900, 1, count=100),
    }
    for name, call in cases.items():
        grad = torch.randn_like(call[0])
        wide = lambda x: None if x is None else x.detach().double().requires_grad_()
        exact = replace(call[1], window=wide(call[1].window), entries=wide(call[1].entries))
        truth = results(sink_attention_dense, (wide(call[0]), exact, wide(call[2])), grad)
        found, same = {"twin": results(twin, call, grad)}, True
        for arm in arms:
            if serves(arm, call):
                choose(arm)
                found[arm], again = (results(gpu_attention.sink_attention, call, grad) for _ in "ab")
                same &= all(torch.equal(found[arm][what], again[what]) for what in again)
        for what, right in truth.items():
            cells = []
            for arm in (*arms, "twin"):
                if arm in found:
                    largest, rms = relative_errors(found[arm][what], right)
                cells.append(f"{rms:.1e} / {largest:.1e}" if arm in found else "")
            table.add(name, what, *cells, same)


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


def speed_cases() -> Iterator[tuple[str, Callable[[], Call]]]:
    """What the goals are about."""
    for kind, lengths in {"sliding": (4096, 32768), "HCA": (4096, 32768), "CSA": (4096, 8192, 32768)}.items():
        for length in lengths:
            yield f"{kind} {length}", partial(draw, FLASH, kind, length)
    for length in (8192, 32768):
        yield f"CSA {length}, 1,024 picks", partial(draw, FLASH, "CSA", length, count=1024)


def other_cases() -> Iterator[tuple[str, Callable[[], Call], float | None]]:
    """Name, call, and up to how many entries a pick they are masked."""
    usual = attention_problem.MASK_BELOW
    for length, below in ((4096, 0), (6144, 0), (6144, 3), (8192, 4)):
        yield f"CSA {length}, the way forced", partial(draw, FLASH, "CSA", length), below
    yield "CSA 32768, recent picks", partial(draw, FLASH, "CSA", 32768, is_recent=True), usual
    yield "CSA 32768, 8 samples", partial(draw, FLASH, "CSA", 32768, samples=8), usual
    for kind in ("sliding", "HCA", "CSA"):
        yield f"small: {kind} 16384", partial(draw, SMALL, kind, 16384), usual
    yield "small: CSA 4096, the way forced", partial(draw, SMALL, "CSA", 4096), 0
    yield "small: CSA 4096, the way forced", partial(draw, SMALL, "CSA", 4096), 4


def speed(arms: list[str], has_ways: bool, only: str) -> None:
    matrix, copy = matrix_rate(), copy_rate()
    print(f"\nThis run: matrices {matrix / 1e12:.0f} TFLOP/s, copies {copy / 1e12:.2f} TB/s\n")
    columns = ["case", "way", "pass", "arm", "ms", "TFLOP/s", "of copy", "floor ms", "of floor", "beyond GiB"]
    table = Table(*columns)
    if has_ways:
        for name, make, attention_problem.MASK_BELOW in other_cases():
            time_case(table, name, make(), ["triton"], matrix, copy)
    else:
        for name, make in speed_cases():
            if only not in name:
                continue
            time_case(table, name, make(), arms, matrix, copy)


def time_case(table: Table, name: str, call: Call, arms: list[str], matrix: float, copy: float) -> None:
    given, arms = problem(call), [arm for arm in arms if serves(arm, call)]
    out, lse = forward(arms[0], given)
    grad = torch.randn_like(out)
    library = cudnn_arm(given, out, lse, grad)
    works: dict[str, dict[str, Callable[[], object]]] = {
        "forward": {arm: partial(forward, arm, given) for arm in arms},
        "backward": {arm: partial(backward, arm, given, out, lse, grad) for arm in arms} | library,
    }
    seen, query_bytes, key_bytes = cost(call)
    flop = seen * call[0].shape[2] * call[0].shape[3]
    way = ("none", "range", "mask", "gather")[given.mode]
    for what, factor, num_bytes in (
        ("forward", 4, 2 * query_bytes + key_bytes),
        ("backward", 10, 4 * query_bytes + 2 * key_bytes),
    ):
        timed = dict(works[what])
        if timed:
            timed[f"{next(iter(timed))} again"] = next(iter(timed.values()))
        for arm, times in time_arms(timed, rounds=7).items():
            seconds = statistics.median(times) / 1e3
            floor = max(factor * flop / matrix, num_bytes / copy)
            rates = f"{factor * flop / seconds / 1e12:.0f}", f"{num_bytes / seconds / copy:.0%}"
            peak = f"{peak_bytes(timed[arm]) / 2**30:.2f}"
            floors = f"{floor * 1e3:.3f}", f"{floor / seconds:.0%}"
            table.add(name, way, what, arm, median_text(times, digits=3), *rates, *floors, peak)
    if name in ("sliding 4096", "CSA 8192", "CSA 32768"):
        for arm, work in works["backward"].items():
            if arm == CUDNN:
                continue
            profile(f"{name}, {arm}", work)


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
    attention_problem.HAND_PLACED = False
    try:
        out, lse = triton_attention.forward(given)
        if kernel == "_forward":
            return f"{kernel_ms(lambda: triton_attention.forward(given), kernel):.3f}"
        backward = lambda: triton_attention_backward.backward(given, out, lse, out)
        return f"{kernel_ms(backward, kernel):.3f}"
    except Exception as error:
        return type(error).__name__


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--arms", default=",".join(ARMS), help="of those, the ones to run")
    parser.add_argument(
        "--ways", action="store_true", help="time other ways, samples and small widths instead"
    )
    parser.add_argument("--only", default="", help="time the cases with this in their names, check nothing")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    if chosen.sweep:
        sweep()
        return
    arms = [arm for arm in ARMS if arm in chosen.arms.split(",")]
    if not (chosen.ways or chosen.only):
        correctness(arms)
    speed(arms, chosen.ways, chosen.only)


if __name__ == "__main__":
    main()
