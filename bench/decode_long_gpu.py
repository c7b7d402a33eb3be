"""A captured decoding step behind 4,096 and behind 1,048,576 tokens on one GPU, at Flash's widths.

    python bench/decode_long_gpu.py [--batches 1 8] [--steps 48] [--no-capture]

The model and the bytes of decode_gpu.py; every number of the decode state is drawn at random. 4,096 tokens
also in rows that may have 8,192 at most: a step's cost must not come from what is allocated. Goal: at most
twice. Predicted: a row of 1M tokens reads 143 MB more (index keys of 262,144 entries in two layers, 8,192 HCA
entries), 0.05 ms at the copy rate beside 3; with three levels of selection in each CSA layer 0.15 ms.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch
from decode_gpu import WARM_UP, our_model, state_bytes, weight_bytes
from gpu_timing import Table, arguments, copy_rate, median_text

LONG, SHORT, LEAST = 2**20, 4096, 8192


def filled(model, batch: int, capacity: int, captures: bool):
    """A state whose rows may have `capacity` tokens, all drawn at random, and its decoder."""
    from consilience.model.state import DecodeState
    from consilience.rollout.captured_decode import Decoder

    state = DecodeState.allocate(model.config, batch, capacity, device="cuda", dtype=torch.bfloat16)
    for tensor in state.tensors():
        if tensor.is_floating_point():
            tensor.normal_()
    decoder = Decoder(model, state, batch, capacity, captures)
    decoder.tokens.random_(model.config.vocab_size)
    return state, decoder


def step_times(model, batch: int, length: int, capacity: int, given: argparse.Namespace):
    """Milliseconds of each step behind `length` tokens a row, and the state's bytes."""
    gc.collect()
    torch.cuda.empty_cache()
    state, decoder = filled(model, batch, capacity, not given.no_capture)
    state.position.fill_(length)
    times = []
    for n in range(1, WARM_UP + given.steps + 1):
        began = time.perf_counter()
        decoder.step([1.0] * batch, [0.5] * batch, length + n)
        times.append(1e3 * (time.perf_counter() - began))
    return times[WARM_UP:], state.num_bytes()


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--no-capture", action="store_true")
    given = parser.parse_args()
    model, rate = our_model(), copy_rate()
    table = Table("batch", "tokens", "a row may have", "ms a step", "of copy", "state GiB", "of the first")
    for batch in given.batches:
        first = None
        for length, capacity in ((SHORT, LEAST), (SHORT, LONG + 256), (LONG, LONG + 256)):
            head = (batch, f"{length:,}", f"{capacity:,}")
            try:
                times, size = step_times(model, batch, length, capacity, given)
            except torch.cuda.OutOfMemoryError:
                table.add(*head, "out of memory", "", "", "")
                continue
            median = statistics.median(times)
            first = first or median
            must = weight_bytes(model, batch) + state_bytes(model.config, batch, length)
            share = f"{must / rate / median * 1e3:.0%}"
            table.add(*head, median_text(times), share, f"{size / 2**30:.2f}", f"{median / first:.2f}")
    table.note(f"copy {rate / 1e12:.2f} TB/s.")


if __name__ == "__main__":
    main()
