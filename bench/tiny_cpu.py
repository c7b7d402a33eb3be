"""The demo's model on one CPU thread: a training step and a decode step, compiled mHC on and off.

    python bench/tiny_cpu.py [rounds]

On and off alternate, each in a process of its own, so that a machine which others use too treats both
alike; the best of all rounds is printed, in milliseconds and tokens a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

ROWS, TOKENS, REPEATS = 2, 512, 8
DECODE_ROWS = (1, 64, 256)


def measure() -> dict[str, float]:
    """Milliseconds by name, with the kernels as the environment says."""
    import torch

    from consilience.model.config import TINY
    from consilience.model.initialize import initialize
    from consilience.model.kernels.linear_logprob import linear_logprob
    from consilience.model.state import DecodeState
    from consilience.model.transformer import Transformer
    from consilience.training.torch_engine import TorchEngine

    torch.set_num_threads(1)
    model = initialize(Transformer(TINY), 0)
    engine = TorchEngine(model)
    ids = torch.randint(0, TINY.vocab_size, (ROWS, TOKENS))

    def train() -> None:
        hidden = model.hidden(ids).flatten(0, 1)
        (-linear_logprob(hidden, model.head.weight, ids.flatten()).logprob.mean()).backward()
        engine.step(1e-3)

    found = {f"train {ROWS * TOKENS} tokens": best_ms(train)}
    model.requires_grad_(False)
    for rows in DECODE_ROWS:
        state = DecodeState.allocate(TINY, rows, 512)
        model.hidden(ids[:1, :64].expand(rows, -1), state=state)
        last = ids[:1, :1].expand(rows, -1)
        with torch.no_grad():
            found[f"decode {rows} rows"] = best_ms(
                lambda s=state, t=last: model.head(model.hidden(t, state=s))
            )
    return found


def best_ms(work: Callable[[], object]) -> float:
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return 1e3 * min(times)


def main(rounds: int) -> None:
    best: dict[str, dict[str, float]] = {"off": {}, "on": {}}
    for _ in range(rounds):
        for kernels, kept in best.items():
            environment = {**os.environ, "CONSILIENCE_KERNELS": kernels}
            command = [sys.executable, __file__, "--measure"]
            told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            for name, ms in json.loads(told.stdout).items():
                kept[name] = min(ms, kept.get(name, ms))
    for name, off in best["off"].items():
        on, tokens = best["on"][name], ROWS * TOKENS if name.startswith("train") else int(name.split()[1])
        speed = f"{off / on:.2f}x, {1e3 * tokens / on:,.0f} tokens/s"
        print(f"{name:18s} plain {off:7.1f} ms, compiled {on:7.1f} ms: {speed}")


if __name__ == "__main__":
    if "--measure" in sys.argv:
        print(json.dumps(measure()))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
