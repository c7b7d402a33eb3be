"""The quantisers on one CPU thread: milliseconds per million values, and what they cost beside a GEMM.

    python bench/quantization.py [rounds]

One expert matrix of 1,024 × 1,024 in float32. The arms take turns and the best of all rounds is printed,
in processor time, so that a machine which others use too treats all alike. The last column is the time
over that of multiplying the same matrix with 64 tokens, forward alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from consilience.model.number_formats import decode_fp8, decode_mxfp4, encode_fp8, encode_mxfp4, mxfp4_to_fp8
from consilience.model.quantization import fake_fp8, fake_mxfp4, hadamard

SIDE, TOKENS = 1024, 64


def arms() -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIDE, SIDE, generator=generator)
    tokens = torch.randn(TOKENS, SIDE, generator=generator)
    heads = weight.view(-1, 128)
    fp4, fp8 = encode_mxfp4(weight), encode_fp8(weight)
    return {
        f"GEMM of {TOKENS} tokens": lambda: tokens @ weight.T,
        "fake_mxfp4": lambda: fake_mxfp4(weight),
        "fake_fp8, width 64": lambda: fake_fp8(weight, 64),
        "hadamard, width 128": lambda: hadamard(heads),
        "encode_mxfp4": lambda: encode_mxfp4(weight),
        "decode_mxfp4": lambda: decode_mxfp4(*fp4),
        "encode_fp8": lambda: encode_fp8(weight),
        "decode_fp8": lambda: decode_fp8(*fp8),
        "mxfp4_to_fp8": lambda: mxfp4_to_fp8(*fp4),
    }


def main(rounds: int) -> None:
    torch.set_num_threads(1)
    works = arms()
    best = dict.fromkeys(works, float("inf"))
    for _ in range(rounds):
        for name, work in works.items():
            work()
            began = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - began)
    gemm = best[f"GEMM of {TOKENS} tokens"]
    for name, seconds in best.items():
        print(f"{name:20s} {1e9 * seconds / SIDE**2:7.2f} ms per million {seconds / gemm:7.2f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
