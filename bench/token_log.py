"""What the write-ahead log costs: seconds of a step's logging beside seconds of the step, native engine.

    python bench/token_log.py [rows] [steps]        # tiny on a CPU, small in bfloat16 on a GPU

What the log adds (`new_tokens`, `step`, and `sync` where a turn ends) is timed beside its step, in the same
run. CPU seconds of this thread on a CPU, so that the share does not depend on what else the machine
does; wall seconds on a GPU, and for `power`, which waits for the disk. Also: bytes a token, rate of a replay.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.log_replay import replay
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.token_log import TokenLog

IS_GPU = torch.cuda.is_available()
PROMPT = 32


def build(rows: int, steps: int) -> NativeEngine:
    name = "small" if IS_GPU else "tiny"
    model = initialize(Transformer(PRESETS[name]), seed=0)
    model = model.to("cuda", torch.bfloat16) if IS_GPU else model
    return NativeEngine(model, max_rows=rows, max_length=PROMPT + steps)


def requests(rows: int, steps: int, vocab: int) -> list[Request]:
    """Lengths spread evenly, so that turns end all along and `sync` is called as often as in a real phase."""
    g = torch.Generator().manual_seed(0)
    found = []
    for row in range(rows):
        ids = tuple(torch.randint(vocab, (PROMPT,), generator=g).tolist())
        length = steps // 2 + (steps - steps // 2) * (row + 1) // rows
        found.append(Request(f"bench/{row}#0", ids, SamplingParams(1.0, length, (), row)))
    return found


def measure(rows: int, steps: int, *, survives_power: bool) -> str:
    engine, clock = build(rows, steps), time.perf_counter if survives_power or IS_GPU else time.thread_time
    with tempfile.TemporaryDirectory() as folder:
        log = TokenLog(take_lease(Path(folder), "bench", survives_power=survives_power))
        work = requests(rows, steps, engine.model.config.vocab_size)
        for request in work:
            log.open(request.uid, request.uid.split("#")[0], 0, request.prompt_ids, request.sampling.seed)
        engine.submit(work)
        step_s = log_s = 0.0
        tokens = num_steps = num_syncs = 0
        while tokens < sum(r.sampling.max_tokens for r in work):
            began = clock()
            done = engine.step()
            stepped = clock()
            new = engine.new_tokens()
            log.step(new)
            for completed in done:
                log.end(completed.uid, completed.finish)
            if done:
                log.sync()
            ended = clock()
            step_s, log_s = step_s + stepped - began, log_s + ended - stepped
            tokens, num_steps, num_syncs = tokens + len(new.uids), num_steps + 1, num_syncs + bool(done)
        log.close()
        num_bytes = sum(path.stat().st_size for path in Path(folder).glob("*.log"))
        fence(Path(folder))
        began = time.thread_time()
        episodes = replay(Path(folder)).episodes
        replay_s = time.thread_time() - began
    assert sum(len(e.turns[0].token_ids) for e in episodes.values()) == tokens
    cells = (
        "power" if survives_power else "process",
        rows,
        f"{1e3 * step_s / num_steps:.2f}",
        f"{1e3 * log_s / num_steps:.3f}",
        f"{100 * log_s / step_s:.2f} %",
        f"{num_syncs} in {num_steps}",
        f"{num_bytes / tokens:.1f}",
        f"{tokens / replay_s / 1e6:.2f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = """| survives | rows | step, ms | log, ms | of decoding | syncs in steps | bytes a token | replay M/s |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    torch.set_num_threads(1)
    rows = [int(sys.argv[1])] if len(sys.argv) > 1 else [8, 64]
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else 64
    print(HEAD)
    for count in rows:
        for survives_power in (False, True):
            print(measure(count, steps, survives_power=survives_power))


if __name__ == "__main__":
    main()
