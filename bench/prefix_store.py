"""What a prefix on disk costs and saves: a cold prefill beside a hit, for each window policy. CPU.

    python bench/prefix_store.py [--threads N] [prompt lengths ...]        # default 1024 4096

For each length: a cold prefill without a store; the first prefill with one (computes, and writes); a hit in a
new engine (reads, and computes what the policy leaves). CPU seconds of the process, medians of three, exact
mode off; the first token's log-probability of every arm is compared with the cold one's. Bytes are those of
the folder. A last table says what the released models would write, by the shapes of their states.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from consilience.model.config import FLASH, PRESETS, PRO
from consilience.model.initialize import initialize
from consilience.model.prefix_state import block_of, rest_of, window_reach
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prefix_reuse import WINDOWS, PrefixCaching

ROUNDS = 3
PERIOD = 512  # of "checkpointed"


def prefill(
    model: Transformer, ids: tuple[int, ...], caching: PrefixCaching | None
) -> tuple[float, float, int]:
    """CPU seconds, the first token's log-probability, tokens computed."""
    engine = NativeEngine(model, max_rows=1, max_length=len(ids) + 8, prefixes=caching)
    engine.submit([Request("bench", ids, SamplingParams(1.0, 1))])
    began = time.process_time()
    (done,) = engine.step()
    return time.process_time() - began, done.logprobs[0], engine.state().prefill_tokens


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(model: Transformer, length: int) -> None:
    g = torch.Generator().manual_seed(length)
    ids = tuple(torch.randint(model.config.vocab_size, (length,), generator=g).tolist())
    prefill(model, ids, None)
    cold = [prefill(model, ids, None) for _ in range(ROUNDS)]
    cold_s, expected = statistics.median(x[0] for x in cold), cold[0][1]
    print(f"| {length} | none | {cold_s:.3f} | | | | {length} | | |")
    for window in WINDOWS:
        first, hits, num_bytes = [], [], 0
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                caching = PrefixCaching(Path(folder), window, PERIOD)
                first.append(prefill(model, ids, caching))
                num_bytes = folder_bytes(Path(folder))
                hits.append(prefill(model, ids, caching))
        gap = max(abs(x[1] - expected) for x in (*first, *hits))
        first_s, hit_s = (statistics.median(x[0] for x in arm) for arm in (first, hits))
        columns = (f"{first_s:.3f}", f"{hit_s:.3f}", f"{cold_s / hit_s:.1f}", hits[0][2])
        print(
            f"| {length} | {window} | {cold_s:.3f} | {' | '.join(map(str, columns))} | "
            f"{num_bytes / length:,.0f} | {gap:.1e} |"
        )


def shape_bytes() -> None:
    """Bytes a token of the released models in bfloat16, and the tokens that "recomputed" computes again."""
    print("\n| model | entries | whole | every 2,048 | recomputed | tokens computed again |")
    print("|" + " --- |" * 6)
    for name, config in (("Flash", FLASH), ("Pro", PRO)):
        state = DecodeState.allocate(config, 1, 256, dtype=torch.bfloat16)
        state.position[0] = 128
        blocks = sum(t.nbytes for t in block_of(state, 0, 0).values()) / 128
        rest = sum(t.nbytes for t in rest_of(state, 0).values())
        columns = [blocks, blocks + rest / 128, blocks + rest / 2048, blocks]
        shown = " | ".join(f"{x:,.0f}" for x in columns)
        print(f"| {name}, {config.num_hidden_layers} layers | {shown} | {window_reach(config):,} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("lengths", nargs="*", type=int, default=[1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = initialize(Transformer(PRESETS["tiny"]), seed=0)
    print(
        f"tiny, fp32, {options.threads} thread(s), torch {torch.__version__}; checkpointed: {PERIOD} tokens"
    )
    print(
        "\n| prompt | window | cold s | first s | hit s | cold/hit | computed | bytes a token | Δ log-prob |"
    )
    print("|" + " --- |" * 9)
    for length in options.lengths:
        measure(model, length)
    shape_bytes()


if __name__ == "__main__":
    main()
