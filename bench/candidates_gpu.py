"""Candidates for bytes-bound kernels: are they right, are they faster than the chosen ones?

    PYTHONPATH=.:bench python bench/candidates_gpu.py

parameters  triton_parameters_pieces.py: mHC's gradients of fn, base and scale; fn's must be the chosen
            one's bits
columns     triton_codes_narrow.py: FP8 codes of columns from narrower tiles; the same bits

Each beside the chosen kernel and the chosen kernel again (A/A), in graphs of several calls so that
launches do not count, and beside a copy and a product of the same run. Under TRITON_INTERPRET=1, where
there is no GPU, the checks alone run, at small sizes. A candidate that wins moves to model/kernels/, one
that loses goes.
"""

from __future__ import annotations

import functools
import statistics
import sys

import torch
import triton_codes_narrow
import triton_parameters_pieces
from gpu_timing import Arm, copy_rate, matrix_rate, time_arms
from torch import Tensor

from consilience.model.kernels import triton_hyper_connections_parameters as parameters
from consilience.model.kernels import triton_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, K, CALLS = 4, 24, 20
SUM = 1e-5  # base and scale: fp32 sums in another order


def drawn(num_tokens: int, width: int) -> tuple[Tensor, parameters.Read]:
    """Streams [R, N, D] and what a read leaves to its backward."""
    normal = functools.partial(torch.randn, device=DEVICE)
    streams = normal(num_tokens, N, width).bfloat16()
    fn, inverse = normal(K, N * width), normal(num_tokens).abs() + 0.5
    d_logits, mixes = normal(num_tokens, K), normal(num_tokens, K)
    d_input, pre = normal(num_tokens, width).bfloat16(), normal(num_tokens, N)
    return streams, parameters.Read(d_input, pre, fn, d_logits, mixes, inverse, normal(3))


def by_hand(streams: Tensor, read: parameters.Read) -> tuple[Tensor, ...]:
    """Gradients of fn, base and scale in fp64."""
    d_logits, mixes = read.d_logits.double(), read.mixes.double()
    parts = (N, N, K - 2 * N)
    factor = torch.cat([s.double().expand(n) for s, n in zip(read.scale, parts)])
    raw = d_logits * factor * read.inverse.double()[:, None]
    d_scale = torch.stack([x.sum() for x in (d_logits * mixes).split(parts, 1)])
    return raw.T @ streams.double().flatten(1), d_logits.sum(0), d_scale


def far(found: Tensor, wanted: Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def check_parameters(num_tokens: int, width: int) -> None:
    given = drawn(num_tokens, width)
    found, chosen = triton_parameters_pieces.d_parameters(*given), parameters.d_parameters(*given)
    again, exact = triton_parameters_pieces.d_parameters(*given), by_hand(*given)
    errors = [far(x, y) for x, y in zip(found, exact)]
    is_same = torch.equal(found[0], chosen[0]) and all(torch.equal(x, y) for x, y in zip(found, again))
    print(
        f"parameters {num_tokens} × {width}: {[f'{e:.1e}' for e in errors]}, same bits: {is_same}", flush=True
    )
    # fn: two pieces of bfloat16 leave 2^-18 of each term; the interpreter cuts them off instead, 2^-14.
    if not is_same or max(errors[1:]) > SUM or errors[0] > 2**-14:
        sys.exit("parameters: wrong")


def check_columns(num_rows: int, width: int) -> None:
    x = torch.randn(num_rows, width, device=DEVICE).bfloat16() * 3
    x[0, 1], x[num_rows // 2, 2], x[:, 3] = float("inf"), float("nan"), 0
    wanted = triton_quantize.encode_rows(x, has_codes=False)[2:]
    for number, setting in enumerate(triton_codes_narrow.SETTINGS):
        codes, scales = triton_codes_narrow.encode_columns(x, number)[2:]
        assert codes is not None and scales is not None and wanted[0] is not None and wanted[1] is not None
        is_same = torch.equal(codes.view(torch.uint8), wanted[0].view(torch.uint8))
        is_same &= torch.equal(scales.view(torch.int32), wanted[1].view(torch.int32))
        print(f"columns {num_rows} × {width} {setting}: same bits: {is_same}", flush=True)
        if not is_same:
            sys.exit("columns: wrong")


def repeated(arm: Arm) -> Arm:
    """CALLS calls as one graph."""
    arm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            arm()
    return graph.replay


def measure(name: str, arms: dict[str, Arm], num_bytes: float, rate: float) -> None:
    for arm, times in time_arms({key: repeated(arm) for key, arm in arms.items()}, rounds=9).items():
        us = [1e3 * t / CALLS for t in times]
        share = num_bytes / rate / (statistics.median(us) / 1e6)
        spread = f"{statistics.median(us):.1f} ({min(us):.1f}–{max(us):.1f})"
        print(f"| {name} | {arm} | {spread} µs | {share:.0%} of copy |", flush=True)


def main() -> None:
    is_gpu = DEVICE == "cuda"
    torch.manual_seed(0)
    for size in ((1, 64), (19, 40), (200, 16)) + (((4096, 4096), (4001, 7168)) if is_gpu else ()):
        check_parameters(*size)
    for size in ((130, 128), (1, 256)) + (((4096, 4096), (4001, 7168)) if is_gpu else ()):
        check_columns(*size)
    if not is_gpu:
        return
    rate = copy_rate()
    print(f"copy {rate / 1e12:.2f} TB/s, products {matrix_rate() / 1e12:.0f} TFLOP/s", flush=True)
    for tokens, width in ((4096, 4096), (16384, 4096), (4096, 7168)):
        given = drawn(tokens, width)
        chosen = lambda g=given: parameters.d_parameters(*g)
        arms = {"chosen": chosen, "pieces": lambda g=given: triton_parameters_pieces.d_parameters(*g)}
        measure(
            f"parameters {tokens} × {width}", arms | {"chosen again": chosen}, 2.0 * tokens * N * width, rate
        )
    for rows, width in ((16384, 4096), (4096, 4096), (16384, 2048)):
        x = torch.randn(rows, width, device=DEVICE).bfloat16()
        chosen = lambda x=x: triton_quantize.encode_rows(x, has_codes=False)
        arms = {"chosen": chosen}
        for i, setting in enumerate(triton_codes_narrow.SETTINGS):
            arms[str(setting)] = lambda x=x, i=i: triton_codes_narrow.encode_columns(x, i)
        measure(f"columns {rows} × {width}", arms | {"chosen again": chosen}, 3.0 * rows * width, rate)


if __name__ == "__main__":
    main()
