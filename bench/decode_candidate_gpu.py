"""Attention of a decoding step by triton_decode_in_turns.py, not the chosen one: is it right, is it faster?

    PYTHONPATH=.:bench python bench/decode_candidate_gpu.py

Errors to fp64, and equal bits alone and in company; then both kernels in turns, with an A/A arm, over several
sets of keys so that none lies in L2. A candidate that wins moves to model/kernels/, one that loses goes.
"""

from __future__ import annotations

import sys

import torch
import triton_decode_in_turns
from decode_kernels_gpu import SCALE, WINDOW, Rows, head, report, sets, splits_of
from gpu_timing import copy_rate
from torch import Tensor

KINDS = {"window": 0, "HCA": 128, "CSA": 4}
ROUNDING = 0.01


def attend(rows: Rows, splits: int) -> Tensor:
    more = {} if not rows.ratio else {"ratio": rows.ratio, "pages": rows.pages, "tables": rows.tables}
    given = (rows.query, rows.window, rows.position, rows.sink, SCALE, WINDOW, splits)
    return triton_decode_in_turns.attend(*given, rows=rows.rows, **more)  # type: ignore[arg-type]


def check(name: str, length: int, splits: int) -> None:
    rows = Rows(5, length, KINDS[name])
    found, truth = attend(rows, splits), rows.twin(torch.float64)
    error = float((found.double() - truth).norm() / truth.norm())
    alone = Rows(1, length, KINDS[name])
    for part in ("query", "window", "position", "tables", "rows"):
        whole = getattr(rows, part)
        setattr(alone, part, None if whole is None else whole[2:3].contiguous())
    alone.pages, alone.sink = rows.pages, rows.sink
    is_same = torch.equal(attend(alone, splits)[0], found[2]) and torch.equal(attend(rows, splits), found)
    print(f"{name} {length}, {splits} splits: {error:.1e}, same bits: {is_same}", flush=True)
    if error > ROUNDING or not is_same:
        sys.exit("wrong")


def main() -> None:
    torch.manual_seed(0)
    for name in KINDS:
        for splits in (1, 2, 16):
            check(name, 8192, splits)
    rate = copy_rate() / 1e9
    head("attention")
    for name, num_rows, length in (
        ("CSA", 8, 8192),
        ("CSA", 64, 8192),
        ("CSA", 128, 8192),
        ("CSA", 256, 8192),
        ("HCA", 128, 32768),
        ("window", 128, 8192),
    ):
        make = lambda n=num_rows, size=length, ratio=KINDS[name]: Rows(n, size, ratio)
        splits, every = splits_of(num_rows), sets(make, make().num_bytes())
        chosen = [lambda r=r, s=splits: r.attend(s) for r in every]
        turns = [lambda r=r, s=splits: attend(r, s) for r in every]
        arms = {f"chosen, {splits} splits": chosen, "in turns": turns, "chosen again (A/A)": chosen}
        report(f"{name}, {num_rows} x {length}", arms, every[0].num_bytes(), 5, rate)


if __name__ == "__main__":
    main()
