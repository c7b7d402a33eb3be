"""Fast and exact mode side by side: speed of training and decoding, and how far their log-probabilities part.

    python bench/exact.py [preset] [dtype]        # tiny float32 on a CPU, small bfloat16 on a GPU

"mismatch" is the largest difference between the log-probability of a token when it is decoded (one token a
row at a time) and when the whole sequence is computed at once, as a trainer does. Medians of three rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from consilience.model.config import PRESETS
from consilience.model.exact import exact_mode, log_softmax
from consilience.model.initialize import initialize
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"
ROWS, PROMPT, STEPS = 32, 64, 16
TRAIN = (8, 512)


def seconds(work: Callable[[], object], rounds: int = 3) -> float:
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        if IS_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def decode(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [rows, STEPS, V] of the tokens behind the prompt, one step at a time."""
    weight = model.head.weight
    state = DecodeState.allocate(model.config, ROWS, PROMPT + STEPS, device=DEVICE, dtype=weight.dtype)
    model.hidden(ids[:, :PROMPT], state=state)
    found = []
    for t in range(PROMPT, PROMPT + STEPS):
        hidden = model.hidden(ids[:, t : t + 1], state=state)[:, 0]
        found.append(log_softmax(model.head(hidden).float()))
    return torch.stack(found, 1)


def measure(model: Transformer, is_exact: bool) -> str:
    config = model.config
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, PROMPT + STEPS), generator=g).to(DEVICE)
    rows = torch.randint(config.vocab_size, TRAIN, generator=g).to(DEVICE)
    if IS_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if IS_GPU else 0

    def train() -> None:
        model(rows).float().logsumexp(-1).mean().backward()
        model.zero_grad()

    with exact_mode(is_exact):
        step_s = seconds(train)
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if IS_GPU else float("nan")
        with torch.no_grad():
            found = decode(model, ids)
            decode_s = seconds(lambda: decode(model, ids), 1)
            whole = log_softmax(model(ids)[:, PROMPT:].float().flatten(0, 1)).view_as(found)
    tokens, trained = ROWS * STEPS, TRAIN[0] * TRAIN[1]
    return (
        f"{'exact' if is_exact else 'fast':6s} training {trained / step_s:9,.0f} tokens/s, {peak:5.2f} GiB "
        f"above the weights; decoding {tokens / decode_s:8,.0f} tokens/s (prefill included); "
        f"mismatch {(found - whole).abs().max().item():.3g}"
    )


def main() -> None:
    preset = sys.argv[1] if len(sys.argv) > 1 else ("small" if IS_GPU else "tiny")
    dtype = getattr(torch, sys.argv[2] if len(sys.argv) > 2 else ("bfloat16" if IS_GPU else "float32"))
    if not IS_GPU:
        torch.set_num_threads(1)
    model = initialize(Transformer(PRESETS[preset], dtype), 0).to(DEVICE)
    name = torch.cuda.get_device_name() if IS_GPU else "one CPU thread"
    print(f"{preset}, {dtype}, {name}; training {TRAIN}, decoding {ROWS} rows behind {PROMPT} tokens")
    for is_exact in (False, True):
        print(measure(model, is_exact))


if __name__ == "__main__":
    main()
