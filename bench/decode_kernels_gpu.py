"""The kernels of a decoding step on one GPU: attention, the indexer's picks, the sampler.

    PYTHONPATH=. python bench/decode_kernels_gpu.py [--sweep] [--rounds 7] [--quick]

Flash: 64 heads of 512, window 128, 512 picks of index keys of 128, 129,280 tokens; bf16, random data. First
errors to fp64, equal bits in any company and in a replayed CUDA graph; then medians with range over CUDA
graphs that walk through more sets of inputs than the L2 cache holds, arms in turns, the order reversed every
other round. "of copy": the bytes that must be read and written over the rate of a copy in the same run.

Predicted from the floor (2.9 TB/s, 70 % asked): CSA at batch 128 moves 640 KB of keys and 128 KB of queries
and output a row, 34 µs at the full rate, and that would be 310 TFLOP/s of attention: both limits meet, 50 µs
or 70 % is the aim. At batch 8 it is 6 MB or 2 µs, less than a launch and a chain of tiles take: about 12 µs.
Index scores at 1M tokens read 67 MB a row, 23 µs; each of three levels of selection takes about 5 µs.
"""

# ruff: noqa: B023 - closures over a loop's variables are called within the same turn

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from consilience.model.kernels import gpu_decode, triton_decode_attention, triton_decode_pick, triton_sampler
from consilience.rollout.sampling import draw, tempered

HEADS, WIDTH, WINDOW, TOPK, INDEX_HEADS, INDEX_WIDTH, VOCABULARY = 64, 512, 128, 512, 64, 128, 129280
SCALE = WIDTH**-0.5
COLD = 200e6  # bytes that the sets of inputs hold together, four times the L2 cache
Work = Callable[[], Any]


def graph_of(works: list[Work]) -> Work:
    """One replay runs all of `works`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [work() for work in works]
    return lambda: (graph.replay(), kept)


def measure(
    arms: dict[str, list[Work]], rounds: int, repeats: int = 5
) -> dict[str, tuple[float, float, float]]:
    """Median, least and most microseconds of one work of each arm."""
    graphs = {name: (graph_of(works), len(works) * repeats) for name, works in arms.items()}
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay, times = graphs[name]
            torch.cuda.synchronize()
            begin.record()
            for _ in range(repeats):
                replay()
            end.record()
            torch.cuda.synchronize()
            if number:
                found[name].append(1e3 * begin.elapsed_time(end) / times)
    return {name: (statistics.median(t), min(t), max(t)) for name, t in found.items()}


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class Rows:
    """Rows at one position: rings, pages in mixed order, and picks at random from what is seen."""

    def __init__(self, rows: int, length: int, ratio: int, tokens: int = 1, index: bool = False) -> None:
        self.ratio, per = ratio, max(1, 128 // ratio) if ratio else 1
        blocks = math.ceil(length / 128)
        self.position = (
            (length - tokens + torch.arange(tokens, device="cuda")).expand(rows, tokens).contiguous()
        )
        self.tables = (1 + torch.randperm(rows * blocks, device="cuda")).view(rows, blocks)
        width = INDEX_WIDTH if index else WIDTH
        self.pages = normal(rows * blocks + 1, per, width) if ratio else None
        heads = INDEX_HEADS if index else HEADS
        self.query = normal(rows, tokens, heads, width)
        self.window, self.sink = normal(rows, WINDOW + tokens - 1, WIDTH), torch.randn(HEADS, device="cuda")
        self.weight = torch.randn(rows, tokens, heads, device="cuda")
        self.columns = self.rows = None
        if ratio == 4 and not index:
            seen = length // 4
            chosen = torch.rand(rows, tokens, seen, device="cuda").argsort(-1)[..., :TOPK].sort(-1).values
            at = self.tables.gather(1, (chosen // per).flatten(1)).view_as(chosen) * per + chosen % per
            self.columns, self.rows = chosen, at.int()

    def attend(self, splits: int) -> Tensor:
        more = {} if not self.ratio else {"ratio": self.ratio, "pages": self.pages, "tables": self.tables}
        given = (self.query, self.window, self.position, self.sink, SCALE, WINDOW, splits)
        return triton_decode_attention.attend(*given, rows=self.rows, **more)  # type: ignore[arg-type]

    def keys(self) -> Tensor:
        """[B, n, C] of rows of one query: the twin's way, by copies."""
        ring = self.window[:, :WINDOW]
        if self.pages is None:
            return ring
        flat = self.pages.flatten(0, 1)
        if self.rows is not None:
            return torch.cat((ring, flat[self.rows[:, 0].long()]), 1)
        seen = (int(self.position[0, 0]) + 1) // self.ratio
        return torch.cat((ring, self.pages[self.tables].flatten(1, 2)[:, :seen]), 1)

    def twin(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        keys, sink = self.keys().to(dtype), self.sink.to(dtype).expand(len(self.query), -1)[..., None]
        logits = torch.cat((torch.bmm(self.query[:, 0].to(dtype), keys.transpose(1, 2)) * SCALE, sink), -1)
        weights = torch.softmax(logits.float() if dtype != torch.float64 else logits, -1).to(dtype)
        return torch.bmm(weights[..., :-1], keys)[:, None]

    def num_bytes(self) -> float:
        entries = (
            0
            if not self.ratio
            else TOPK
            if self.rows is not None
            else self.tables.shape[1] * 128 // self.ratio
        )
        return 2.0 * len(self.query) * WIDTH * (WINDOW + entries + 2 * HEADS)

    def pick(self, is_cut: bool = False) -> tuple[Tensor, Tensor]:
        assert self.pages is not None
        given = (self.query, self.weight, self.position, 4, self.pages, self.tables)
        scores = triton_decode_pick.index_scores(*given, is_cut=is_cut)
        return triton_decode_pick.select(scores, TOPK, self.position, 4, self.pages.shape[1], self.tables)


def splits_of(rows: int) -> int:
    return min(gpu_decode.MOST_SPLITS, max(1, gpu_decode.PROGRAMS // rows))


# ---- correctness --------------------------------------------------------------------------------


def correctness() -> None:
    print("\nAttention of 4 rows of 8,192 tokens: error to fp64; equal bits alone, and from a replayed graph")
    print("| | splits | RMS error | max error | alone | replayed |\n|---|---|---|---|---|---|")
    for (name, ratio), splits in itertools.product((("window", 0), ("HCA", 128), ("CSA", 4)), (1, 16)):
        rows = Rows(4, 8192, ratio)
        found, truth = rows.attend(splits), rows.twin(torch.float64)
        error = [float(f((found.double() - truth).abs()) / f(truth.abs())) for f in (torch.norm, torch.max)]
        replay = graph_of([lambda r=rows, s=splits: r.attend(s)])
        rows.position -= 1000
        again = rows.attend(splits)
        is_replayed = torch.equal(again, replay()[1][0])
        part = [rows.query, rows.window, rows.position, rows.tables, rows.rows]
        alone = Rows(1, 8192, ratio)
        alone.query, alone.window, alone.position, alone.tables, alone.rows = (
            t if t is None else t[2:3] for t in part
        )
        alone.pages, alone.sink = rows.pages, rows.sink
        is_same = torch.equal(alone.attend(splits)[0], again[2])
        print(f"| {name} | {splits} | {error[0]:.1e} | {error[1]:.1e} | {is_same} | {is_replayed} |")
    rows = Rows(4, 100_000, 4, index=True)
    scores = triton_decode_pick.index_scores(
        rows.query,
        rows.weight,
        rows.position,
        4,
        rows.pages,
        rows.tables,
        is_cut=False,  # type: ignore[arg-type]
    )
    seen = rows.pages[rows.tables].flatten(1, 2)[:, :25_000].double()  # type: ignore[index]
    truth = (
        torch.bmm(rows.query[:, 0].double(), seen.transpose(1, 2)).relu() * rows.weight[:, 0, :, None]
    ).sum(1)
    found = scores[:, 0, :25_000]
    order = found.sort(dim=-1, descending=True, stable=True).indices[:, :TOPK].sort(-1).values
    print(f"index scores: RMS error {float((found - truth).norm() / truth.norm()):.1e}; "
          f"picks equal a stable sort's: {torch.equal(rows.pick()[0][:, 0], order)}")  # fmt: skip
    tied = torch.randint(0, 40, found.shape, device="cuda").float()[:, None].contiguous()
    tied = torch.nn.functional.pad(tied, (0, scores.shape[2] - 25_000))
    picks = triton_decode_pick.select(tied, TOPK, rows.position, 4, 32, rows.tables)[0][:, 0]
    order = tied[:, 0, :25_000].sort(dim=-1, descending=True, stable=True).indices[:, :TOPK].sort(-1).values
    print(f"picks among ties equal a stable sort's: {torch.equal(picks, order)}")
    logits = 3 * torch.randn(512, VOCABULARY, device="cuda")
    heat, uniform = torch.rand(512, device="cuda") + 0.3, torch.rand(512, device="cuda", dtype=torch.float64)
    heat[:32] = 0.0
    tokens, logprobs = triton_sampler.sample(logits, heat, uniform)
    expected, probabilities = tempered(logits, heat.cpu())
    twin = draw(probabilities, uniform)
    worst = (logprobs - expected.gather(1, tokens[:, None])[:, 0]).abs().max()
    same = int((tokens == twin).sum())
    print(f"sampler: {same} of 512 tokens equal the twin's, log-probabilities within {float(worst):.1e}")


# ---- times --------------------------------------------------------------------------------------


def sets(make: Callable[[], Rows], num_bytes: float) -> list[Rows]:
    return [make() for _ in range(max(1, min(24, math.ceil(COLD / num_bytes))))]


def report(title: str, arms: dict[str, list[Work]], num_bytes: float, rounds: int, copy_rate: float) -> None:
    for name, (us, low, high) in measure(arms, rounds).items():
        rate = num_bytes / us / 1e3
        share = f"{100 * rate / copy_rate:.0f} %"
        print(f"| {title} | {name} | {us:.1f} | {low:.1f}–{high:.1f} | {rate:.0f} | {share} |")


def head(title: str) -> None:
    print(f"\n| {title} | arm | µs | range | GB/s | of copy |\n|---|---|---|---|---|---|")


def attention(cases: list[tuple[str, int, int, int]], rounds: int, copy_rate: float) -> None:
    head("attention")
    for name, ratio, rows, length in cases:
        make = lambda: Rows(rows, length, ratio)
        every = sets(make, make().num_bytes())
        ours = [lambda r=r: r.attend(splits_of(rows)) for r in every]
        arms = {f"ours, {splits_of(rows)} splits": ours, "ours again (A/A)": ours}
        if rows <= 64 and length <= 32768 and every[0].rows is not None:
            arms["gather and bmm"] = [r.twin for r in every]
        report(f"{name}, {rows} x {length}", arms, every[0].num_bytes(), rounds, copy_rate)
        del every, ours, arms
        torch.cuda.empty_cache()


def picks(cases: list[tuple[int, int]], rounds: int, copy_rate: float) -> None:
    head("index scores and top 512")
    for rows, length in cases:
        num_bytes = 2.0 * rows * (length // 4) * INDEX_WIDTH
        every = sets(lambda: Rows(rows, length, 4, index=True), num_bytes)
        given = [(r.query, r.weight, r.position, 4, r.pages, r.tables) for r in every]
        score = lambda g: triton_decode_pick.index_scores(*g, is_cut=False)
        scored = [score(g) for g in given]
        work = lambda r, s: triton_decode_pick.select(s, TOPK, r.position, 4, 32, r.tables)
        arms: dict[str, list[Work]] = {
            "scores": [lambda g=g: score(g) for g in given],
            "selection": [lambda r=r, s=s: work(r, s) for r, s in zip(every, scored)],
            "torch.topk of the scores": [lambda s=s: s.topk(TOPK) for s in scored],
        }
        report(f"{rows} x {length}", arms, num_bytes, rounds, copy_rate)
        del every, given, scored, arms
        torch.cuda.empty_cache()


def sampling(cases: list[int], rounds: int, copy_rate: float) -> None:
    head("sampler")
    for rows in cases:
        heat, uniform = torch.ones(rows, device="cuda"), torch.rand(rows, device="cuda", dtype=torch.float64)
        num = max(1, min(24, math.ceil(COLD / (4 * rows * VOCABULARY))))
        every = [torch.randn(rows, VOCABULARY, device="cuda") for _ in range(num)]
        arms: dict[str, list[Work]] = {
            "ours": [lambda x=x: triton_sampler.sample(x, heat, uniform) for x in every]
        }
        arms["softmax and argmax alone"] = [lambda x=x: (x.log_softmax(-1), x.argmax(-1)) for x in every]
        report(f"{rows} rows", arms, 4.0 * rows * VOCABULARY, rounds, copy_rate)


def sweep(rounds: int) -> None:
    """Other tiles, warps and splits, the fastest first."""
    tiles = [
        {"keys": k, "num_warps": w, "num_stages": s}
        for k, w, s in ((64, 8, 2), (32, 8, 3), (32, 8, 4), (64, 16, 2), (32, 16, 4))
    ]
    for name, ratio, rows, length in (("CSA", 4, 8, 8192), ("CSA", 4, 128, 8192), ("HCA", 128, 8, 2**20)):
        found = {}
        every = sets(lambda: Rows(rows, length, ratio), 2e6 * rows)
        shipped = dict(triton_decode_attention.ATTEND)
        for tile, splits in itertools.product(
            tiles, sorted({1, 2, 4, 8, splits_of(rows), 2 * splits_of(rows)})
        ):
            triton_decode_attention.ATTEND.update(tile)
            found[f"{tile}, {splits} splits"] = measure(
                {"": [lambda r=r: r.attend(splits) for r in every]}, rounds
            )[""]
        triton_decode_attention.ATTEND.update(shipped)
        print(f"\n{name}, {rows} rows of {length} tokens; shipped {shipped}, {splits_of(rows)} splits")
        for text, (us, low, high) in sorted(found.items(), key=lambda x: x[1])[:10]:
            print(f"  {us:8.1f} µs ({low:.1f}–{high:.1f})  {text}")
        del every
        torch.cuda.empty_cache()
    selecting = Rows(8, 2**17, 4, index=True)
    shipped = dict(triton_decode_pick.SELECT)
    print(f"\nselection and scores, 8 rows of {2**17} tokens; shipped {shipped}, {triton_decode_pick.SCORES}")
    for block, warps in ((4096, 8), (4096, 16), (2048, 8), (8192, 16), (8192, 8)):
        triton_decode_pick.SELECT.update(block=block, num_warps=warps)
        print(
            f"  selection in blocks of {block}, {warps} warps: {measure({'': [selecting.pick]}, rounds)['']}"
        )
    triton_decode_pick.SELECT.update(shipped)
    for keys, tile_count, warps, stages in (
        (128, 2, 4, 2),
        (128, 4, 8, 2),
        (128, 2, 8, 2),
        (64, 4, 4, 3),
        (128, 1, 4, 1),
    ):
        triton_decode_pick.SCORES.update(keys=keys, tiles=tile_count, num_warps=warps, num_stages=stages)
        print(f"  scores {triton_decode_pick.SCORES}: {measure({'': [selecting.pick]}, rounds)['']}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    parser.add_argument("--quick", action="store_true", help="a few cases only")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    began, rounds = time.perf_counter(), options.rounds
    source, target = torch.empty(2, 2**29, device="cuda", dtype=torch.float16)
    copy_rate = (
        2 * source.nbytes / measure({"": [functools.partial(target.copy_, source)]}, rounds)[""][0] / 1e3
    )
    del source, target
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"copy {copy_rate:.0f} GB/s")  # fmt: skip
    correctness()
    kinds = (("window", 0), ("HCA", 128), ("CSA", 4))
    cases = [(*kind, rows, 8192) for kind in kinds for rows in (1, 8, 64, 128, 256)]
    cases += [("HCA", 128, rows, 2**20) for rows in (1, 8, 64)] + [("CSA", 4, 1, 2**20)]
    attention(cases[10:12] if options.quick else cases, rounds, copy_rate)
    picks(
        [(8, 8192)] if options.quick else [(1, 4096), (8, 8192), (64, 8192), (8, 2**17), (1, 2**20)],
        rounds,
        copy_rate,
    )
    sampling([8] if options.quick else [1, 8, 64, 256], rounds, copy_rate)
    if options.sweep:
        sweep(rounds)
    print(f"\n{time.perf_counter() - began:.0f} s, compilation included")


if __name__ == "__main__":
    main()
