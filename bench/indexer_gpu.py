"""The lightning indexer on one GPU: scores and exact top-k, our kernels and composed operations.

    python bench/indexer_gpu.py [--tokens 4096 32768] [--only picks loss] [--sweep]

Flash's sizes (64 heads of 128, 512 picks of T/4 entries), one sample of T tokens, bf16, random queries, keys
and weights. First the scores against fp64, and the picks against a stable sort of the same scores: none may
differ. `floor` is the product of what is visible, 2 · 64 · 128 FLOP a score, at the rate of an 8192³ product
of the same run; the issue's goal is twice that for scores and picks together. The index loss, forward and
backward, over the picks (attention of 64 heads of 512): its floor is the products with picked entries and
index keys, and the two over all visible keys for the keys' gradient. `--sweep` tries tiles.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from typing import Any

import torch
from gpu_timing import (
    Arm,
    Table,
    arguments,
    copy_rate,
    matrix_rate,
    median_text,
    peak_bytes,
    relative_errors,
    time_arms,
)

from consilience.model.config import PRESETS
from consilience.model.indexer import IndexQueries, index_loss
from consilience.model.kernels import (
    gpu_index_loss,
    gpu_indexer,
    triton_index_loss,
    triton_index_scores,
    triton_top_k,
)
from consilience.model.kernels.attention_keys import Keys
from consilience.model.layout import packed_layout
from consilience.model.top_k import top_k

HEADS, WIDTH, PICKS, RATIO = 64, 128, 512, 4
KEY_WIDTH = 512


def draw(tokens: int) -> list[torch.Tensor]:
    """query [T, H, C], weight [T, H], keys [M, C], first, stop [T]."""
    torch.manual_seed(0)
    query = torch.randn(tokens, HEADS, WIDTH, device="cuda").bfloat16()
    weight = torch.randn(tokens, HEADS, device="cuda") * (HEADS * WIDTH) ** -0.5
    keys = torch.randn(tokens // RATIO, WIDTH, device="cuda").bfloat16()
    stop = (torch.arange(tokens, device="cuda") + 1) // RATIO
    return [query, weight, keys, torch.zeros_like(stop), stop]


def pick(given: list[torch.Tensor]) -> torch.Tensor:
    query, weight, keys, first, stop = (x[None] for x in given)
    return gpu_indexer.pick(query, weight, keys, first, stop, PICKS, lambda t: t // RATIO)[0]


def composed(given: list[torch.Tensor], block: int = 128) -> torch.Tensor:
    """Batched product, ReLU, weights, mask and torch.topk, as large blocks of queries as memory likes."""
    query, weight, keys, _, stop = given
    picks, column = [], torch.arange(keys.shape[0], device="cuda")
    for begin in range(0, query.shape[0], block):
        here = slice(begin, begin + block)
        match = (query[here].flatten(0, 1) @ keys.t()).relu_().view(-1, HEADS, keys.shape[0])
        scores = torch.einsum("qhm,qh->qm", match, weight[here].to(match.dtype))
        scores = scores.masked_fill(column >= stop[here, None], float("-inf"))
        best = scores.topk(PICKS, dim=-1, sorted=False)
        picks.append(torch.where(best.values > float("-inf"), best.indices, -1))
    return torch.cat(picks)


def show_errors(tokens: int = 4096) -> None:
    table = Table("tokens", "what", "value")
    given = draw(tokens)
    query, weight, keys, _, stop = given
    scores = torch.full((tokens, keys.shape[0]), float("-inf"), device="cuda")
    triton_index_scores.scores(*given, 0, scores)
    seen = torch.arange(keys.shape[0], device="cuda") < stop[:, None]
    exact = torch.empty_like(scores, dtype=torch.float64)
    for begin in range(0, tokens, 256):
        here = slice(begin, begin + 256)
        match = torch.einsum("qhc,mc->qhm", query[here].double(), keys.double()).relu_()
        exact[here] = torch.einsum("qhm,qh->qm", match, weight[here].double())
    for name, error in zip(("max", "rms"), relative_errors(scores[seen], exact[seen])):
        table.add(tokens, f"scores, {name} relative error", f"{error:.1e}")
    picks = pick(given)
    scores = scores.masked_fill(~seen, float("-inf"))
    best = top_k(scores, PICKS)
    best = torch.where(scores.gather(1, best) > float("-inf"), best, keys.shape[0]).sort(1).values
    wanted = torch.where(best < keys.shape[0], best, -1)
    table.add(tokens, "picks that a stable sort does not make", int((picks != wanted).sum()))
    coarse = (scores * 8).round() / 8  # many ties
    found = triton_top_k.select(coarse, PICKS)
    best = top_k(coarse, PICKS)
    best = torch.where(coarse.gather(1, best) > float("-inf"), best, keys.shape[0]).sort(1).values
    table.add(
        tokens,
        "the same with ties everywhere",
        int((found != torch.where(best < keys.shape[0], best, -1)).sum()),
    )
    wide = torch.randn(64, 1 << 18, device="cuda")
    best = top_k(wide, PICKS).sort(1).values
    table.add(1 << 20, "the same of 262,144 columns", int((triton_top_k.select(wide, PICKS) != best).sum()))
    again = pick(given)
    table.add(tokens, "picks that a second run changes", int((again != picks).sum()))


def visible_flops(given: list[torch.Tensor]) -> float:
    return 2.0 * HEADS * WIDTH * float(given[4].sum())


def parts(given: list[torch.Tensor]) -> dict[str, Arm]:
    """Scores alone and top-k alone, over the same blocks of queries as `pick`."""
    tokens, columns = given[0].shape[0], given[2].shape[0]
    block = min(tokens, max(gpu_indexer.MIN_QUERIES, gpu_indexer.BUFFER_BYTES // (4 * columns)))
    buffer = torch.randn(block, columns, device="cuda")
    first, stop = given[3:]

    def scores() -> None:
        for begin in range(0, tokens, block):
            end = min(begin + block, tokens)
            triton_index_scores.scores(*given, begin, buffer[: end - begin, : end // RATIO])

    def chosen() -> None:
        for begin in range(0, tokens, block):
            end = min(begin + block, tokens)
            scores = buffer[: end - begin, : end // RATIO]
            triton_top_k.select(scores, PICKS, first[begin:end], stop[begin:end])

    def library() -> None:
        for begin in range(0, tokens, block):
            buffer[: min(block, tokens - begin)].topk(PICKS, dim=-1, sorted=False)

    return {"scores alone": scores, "top-k alone": chosen, "torch.topk alone, unsorted, any tie": library}


def show(tokens: int, rate: float, copied: float, table: Table) -> None:
    given = draw(tokens)
    floor = visible_flops(given) / rate * 1e3
    arms: dict[str, Arm] = {"ours": lambda: pick(given), "ours again (A/A)": lambda: pick(given)}
    arms |= parts(given)
    arms["composed, bf16 matches"] = lambda: composed(given)
    for name, ts in time_arms(arms, rounds=7).items():
        took = statistics.median(ts)
        memory = f"{peak_bytes(arms[name]) / 2**20:.0f}"
        table.add(tokens, name, median_text(ts, digits=3), f"{floor:.3f}", f"{took / floor:.2f}", memory)
    read = given[4].sum().item() * 4 / copied * 1e3
    table.add(tokens, "visible scores read at the copy rate", f"{read:.3f}", "", "", "")


def draw_loss(
    tokens: int, picks: int, dtype: torch.dtype
) -> tuple[IndexQueries, tuple[Any, ...], torch.Tensor]:
    """Arguments of `index_loss`: one sample, picks by our kernels."""
    config = replace(PRESETS["flash"], index_topk=picks)
    position = torch.arange(tokens, device="cuda")[None]
    layout = packed_layout(config, torch.zeros_like(position), position, None)
    windows, given = layout.windows[RATIO], draw(tokens)
    chosen = gpu_indexer.pick(*(x[None] for x in given), picks, windows.columns_before)
    shape = (1, tokens, HEADS, KEY_WIDTH)
    query, near, entries = (
        torch.randn(shape, device="cuda"),
        torch.randn(1, tokens, KEY_WIDTH, device="cuda"),
        torch.randn(1, windows.num_columns, KEY_WIDTH, device="cuda"),
    )
    query, near, entries = (x.bfloat16().to(dtype) for x in (query, near, entries))
    keys = Keys(layout, config.sliding_window, near, entries, windows, chosen)
    parts = (given[0].to(dtype), given[1], given[2].to(dtype))
    if dtype == torch.float64:
        parts = tuple(x.double() for x in parts)
    index = IndexQueries(*(x[None].requires_grad_() for x in parts))
    sink = torch.zeros(HEADS, device="cuda", dtype=dtype if dtype == torch.float64 else torch.float32)
    return index, (query, keys, sink, KEY_WIDTH**-0.5), layout.is_valid


def differentiate(call: tuple[IndexQueries, tuple[Any, ...], torch.Tensor]) -> tuple[torch.Tensor, ...]:
    loss, _ = index_loss(*call)
    index = call[0]
    return (loss, *torch.autograd.grad(loss, (index.query, index.weight, index.keys)))


def show_loss_errors(tokens: int = 1024, picks: int = 96) -> None:
    table = Table("tokens", "index loss", "max error", "rms error")
    calls = []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(5)
        calls.append(draw_loss(tokens, picks, dtype))
    labels = ("loss", "d_query", "d_weight", "d_keys")
    for label, a, b in zip(labels, differentiate(calls[0]), differentiate(calls[1])):
        table.add(tokens, label, *(f"{e:.1e}" for e in relative_errors(a.detach(), b.detach())))


def show_loss(tokens: int, rate: float, table: Table) -> None:
    call = draw_loss(tokens, PICKS, torch.bfloat16)
    index, (query, keys, sink, scale), is_valid = call
    stop = keys.windows.stop
    picked, seen = stop.clamp(max=PICKS).sum().item(), stop.sum().item()
    # Mass and scores; in the backward match and dq of the picks, match and dk of every visible key.
    flops = 2.0 * HEADS * (picked * (KEY_WIDTH + 3 * WIDTH) + 2 * seen * WIDTH)
    floor = flops / rate * 1e3
    denominator = gpu_index_loss.denominators(query, keys, sink, scale)
    teacher = gpu_index_loss.Teacher(query, keys.entries, denominator, scale, is_valid)
    leaves = (index.query, index.weight, index.keys)
    bounds = (keys.windows.first, stop)

    def forward() -> torch.Tensor:
        return gpu_index_loss.index_loss(leaves, teacher, keys.picks, bounds)[0]

    slots = triton_index_loss.Candidates(keys.picks[0], bounds[0][0], stop[0], PICKS)
    out = torch.empty(tokens, PICKS, device="cuda")
    mass = (query[0], denominator[0], keys.entries[0], slots, 0, out, scale)
    scores = (*(x.detach()[0] for x in leaves), slots, 0, out, None)
    arms: dict[str, Arm] = {
        "loss forward + backward": lambda: torch.autograd.grad(forward(), leaves),
        "the same again (A/A)": lambda: torch.autograd.grad(forward(), leaves),
        "loss forward": forward,
        "mass alone": lambda: triton_index_loss.match(*mass),
        "scores of the picks alone": lambda: triton_index_loss.match(*scores),
        "attention's denominators": lambda: gpu_index_loss.denominators(query, keys, sink, scale),
    }
    for name, ts in time_arms(arms, rounds=5).items():
        memory = f"{peak_bytes(arms[name]) / 2**20:.0f}"
        times = statistics.median(ts) / floor
        table.add(tokens, name, median_text(ts, digits=3), f"{floor:.3f}", f"{times:.2f}", memory)


def sweep_loss(tokens: int) -> None:
    home: Any = triton_index_loss
    call = draw_loss(tokens, PICKS, torch.bfloat16)
    index, (query, keys, sink, scale), _ = call
    denominator = gpu_index_loss.denominators(query, keys, sink, scale)
    leaves = tuple(x.detach()[0] for x in (index.query, index.weight, index.keys))
    stop = keys.windows.stop
    slots = home.Candidates(keys.picks[0], keys.windows.first[0], stop[0], PICKS)
    count = min(2048, tokens)
    out = torch.randn(tokens, PICKS, device="cuda")
    dense = torch.randn(count, keys.windows.num_columns, device="cuda")
    d_query, d_weight = (torch.empty_like(x) for x in leaves[:2])
    unit, sums = torch.ones((), device="cuda"), home.key_sums(leaves[0], keys.windows.num_columns)
    for keys_a_step, warps, stages in itertools.product((32, 64, 128), (4, 8), (1, 2, 3)):
        tile = home.Tile(keys_a_step, warps, stages)
        home.MATCH = {(2, True): tile, (2, False): tile}
        home.QUERY_GRADIENT, home.KEY_GRADIENT = {2: tile}, {2: tile}
        mass = (query[0], denominator[0], keys.entries[0], slots, 0, out, scale)
        arms: dict[str, Arm] = {
            "mass": lambda m=mass: home.match(*m),
            "scores": lambda: home.match(*leaves, slots, 0, out, None),
            "query gradient": lambda: home.query_gradient(leaves, slots, 0, out, unit, d_query, d_weight),
            "key gradient of the last queries": lambda: home.add_key_gradient(
                leaves, slots, tokens - count, dense, sums
            ),
        }
        for name, arm in arms.items():
            try:
                ts = time_arms({name: arm}, rounds=3, warm_up=1)[name]
            except Exception as fault:
                print(f"{name}: {tile}: {type(fault).__name__}", flush=True)
                continue
            print(f"{name}: {tile}: {median_text(ts, digits=3)} ms", flush=True)


def sweep(tokens: int) -> None:
    given = draw(tokens)
    rate = matrix_rate()
    floor = visible_flops(given) / rate * 1e3
    print(f"{tokens} tokens, floor {floor:.3f} ms at {rate / 1e12:.0f} TFLOP/s")
    scores: Any = triton_index_scores
    settings = itertools.product((64, 128, 256), (64, 128, 256), (4, 8), (2, 3, 4))
    for rows, keys, warps, stages in settings:
        if not 32 <= rows * keys // (32 * warps) <= 160:
            continue
        scores.TILES = {2: triton_index_scores.Tile(rows, keys, warps, stages)}
        measure("scores alone", given, f"rows {rows} keys {keys} warps {warps} stages {stages}", floor)
    scores.TILES = {2: triton_index_scores.Tile(256, 64, 8, 2)}
    home: Any = triton_top_k
    for block, per_thread in itertools.product((2048, 4096, 8192, 16384), (8, 16, 32, 64)):
        home.LAUNCH = triton_top_k.Launch(block, per_thread)
        measure("top-k alone", given, f"block {block} per thread {per_thread}", floor)


def measure(name: str, given: list[torch.Tensor], label: str, floor: float) -> None:
    try:
        ts = time_arms({name: parts(given)[name]}, rounds=5)[name]
    except Exception as fault:
        print(f"{name}: {label}: {type(fault).__name__} {str(fault)[:80]}", flush=True)
        return
    print(
        f"{name}: {label}: {median_text(ts, digits=3)} ms, {statistics.median(ts) / floor:.2f} x floor",
        flush=True,
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--only", nargs="+", choices=["picks", "loss"], default=["picks", "loss"])
    given = parser.parse_args()
    if given.sweep:
        for tokens in given.tokens:
            for part in given.only:
                {"picks": sweep, "loss": sweep_loss}[part](tokens)
        return
    for part in given.only:
        {"picks": show_errors, "loss": show_loss_errors}[part]()
    rate, copied = matrix_rate(), copy_rate()
    table = Table("tokens", "arm", "ms", "matrix floor", "x floor", "MiB beyond inputs")
    for tokens in given.tokens:
        if "picks" in given.only:
            show(tokens, rate, copied, table)
        if "loss" in given.only:
            show_loss(tokens, rate, table)
        torch.cuda.empty_cache()
    table.note(f"8192³ bf16 product {rate / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s.")


if __name__ == "__main__":
    main()
