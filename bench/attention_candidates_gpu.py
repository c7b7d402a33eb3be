"""Attention kernels that are compiled and emulated, and not the chosen ones: are they right, are they faster?

    PYTHONPATH=.:bench python bench/attention_candidates_gpu.py

backward  triton_backward_lean.py: CSA's, with fewer reloads and a query's chunks released one by one. Its
          integers are the chosen kernel's, so its gradients must be the same bits
forward   triton_forward_in_turns.py: two warp groups in turns and one that copies; to rounding of bf16

Each is checked in a process of its own, since one that hangs must not hold up the other; then it and the
chosen kernel take turns, with an A/A arm. A candidate that wins moves to model/kernels/, one that loses goes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from importlib import import_module

import attention_gpu as attention
import torch
from gpu_timing import time_arms

from consilience.model.kernels import triton_attention_backward_gluon, triton_attention_gluon

CHOSEN = {"backward": triton_attention_backward_gluon, "forward": triton_attention_gluon}
CANDIDATES = {"backward": "triton_backward_lean", "forward": "triton_forward_in_turns"}
SHAPES = {
    "backward": (("CSA", 8192, 0), ("CSA", 32768, 0), ("CSA", 32768, 1024)),
    "forward": (
        ("sliding", 4096, 0),
        ("sliding", 32768, 0),
        ("CSA", 4096, 0),
        ("CSA", 8192, 0),
        ("CSA", 32768, 0),
    ),
}
LIMIT_S = 150
ROUNDING = 0.01


def calls(side: str, kind: str, length: int, count: int, samples: int = 1):
    """(chosen, candidate), functions of nothing that give a tuple of tensors."""
    given = attention.problem(attention.draw(attention.FLASH, kind, length, samples, count=count))
    modules = (CHOSEN[side], import_module(CANDIDATES[side]))
    if side == "forward":
        return [lambda m=m: m.forward(given) for m in modules]
    out, lse = triton_attention_gluon.forward(given)
    grad = torch.randn_like(out)
    return [lambda m=m: m.backward(given, out, lse, grad) for m in modules]


def check(side: str) -> None:
    for kind, length, samples, count in (("CSA", 1300, 2, 80), ("CSA", 8192, 1, 0), ("CSA", 2048, 1, 64)):
        torch.manual_seed(1)
        chosen, candidate = calls(side, kind, length, count, samples)
        wanted, found = chosen(), [candidate() for _ in range(2)][-1]
        pairs = [(x, y) for x, y in zip(found, wanted) if x is not None]
        far = [
            ((x.double() - y.double()).square().mean() / y.double().square().mean()).sqrt() for x, y in pairs
        ]
        is_right = all(torch.equal(x, y) for x, y in pairs) if side == "backward" else max(far) < ROUNDING
        print(f"{side} {kind} {length}: {[f'{float(x):.1e}' for x in far]}", flush=True)
        if not is_right:
            sys.exit(f"{side} {kind} {length}: wrong")


def measure(side: str) -> None:
    for kind, length, count in SHAPES[side]:
        chosen, candidate = calls(side, kind, length, count)
        arms = {"chosen": chosen, CANDIDATES[side]: candidate, "chosen again": chosen}
        for name, times in time_arms(arms, rounds=7).items():
            ms = statistics.median(times)
            spread = f"{min(times):.3f}–{max(times):.3f}"
            print(f"| {side} | {kind} {length} {count or ''} | {name} | {ms:.3f} ({spread}) ms |", flush=True)


def main() -> None:
    if sys.argv[1:]:
        return {"check": check, "measure": measure}[sys.argv[1]](sys.argv[2])
    for side in CANDIDATES:
        for task in ("check", "measure"):
            try:
                done = subprocess.run([sys.executable, __file__, task, side], timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                print(f"{side}: over {LIMIT_S} s", flush=True)
                break
            if done.returncode:
                break


if __name__ == "__main__":
    main()
