"""Child processes of test_million_tokens.py.

worker FOLDER N     N records of 1 Mi tokens into column files, the records as pickles to the standard output
driver FOLDER N M   a phase of N such records, from a worker process, trained on in M mini-batches (packed,
                    summed and let go); prints what it measured as JSON
"""

import contextlib
import io
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from consilience.grpo.advantage import group_advantages
from consilience.grpo.mini_batch import pack_records
from consilience.rollout.columns import ColumnFile
from consilience.rollout.phases import sample_phase
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore

NUM_TOKENS = 1 << 20
PROMPT = 1024


def tokens_of(number):
    return np.random.default_rng(number).integers(0, 129_280, NUM_TOKENS, dtype=np.int32)


def worker(folder, num):
    file = ColumnFile(folder / "rollouts" / "000000.tokens", 0)
    for number in range(num):
        ids, mask = tokens_of(number), np.ones(NUM_TOKENS - PROMPT, np.uint8)
        mask[number : number + 100] = 0
        logprobs = np.where(mask, np.float32(-0.5), np.float32("nan"))
        record = RolloutRecord(
            f"{number}", f"{number // 2}", "agent", "think", None, ids[:PROMPT], ids[PROMPT:], logprobs, mask,
            np.where(mask, 3, -1), FinishReason.STOP, Outcome(OutcomeKind.GRADED), float(number % 2),
        )  # fmt: skip
        message = pickle.dumps(file.put(record))
        sys.stdout.buffer.write(struct.pack("<I", len(message)) + message)
        sys.stdout.buffer.flush()


class Sampler:
    """Hands on what a worker process sends, and counts its bytes."""

    def __init__(self, folder):
        self.folder, self.num_bytes = folder, 0

    def generate(self, jobs, on_progress=None, *, durable):
        command = [sys.executable, __file__, "worker", str(self.folder), str(len(jobs))]
        records = []
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            pipe = process.stdout
            assert isinstance(pipe, io.BufferedReader)
            while head := pipe.read(4):
                message = pipe.read(*struct.unpack("<I", head))
                self.num_bytes += len(message)
                records.append(pickle.loads(message))
                durable.keep(records[-1:])
        return records


def high_water_mib():
    """Most memory this process had resident since `reset`, mapped files included."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def reset():
    """Memory resident now, where the high-water mark begins anew; the mark, where a kernel keeps it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return high_water_mib()


def driver(folder, num, num_batches):
    sampler, store = Sampler(folder), RolloutStore(folder / "rollouts")
    base = reset()
    records = sample_phase(store, 0, sampler, lambda step: [SimpleNamespace(uid=f"{i}") for i in range(num)])
    advantages = group_advantages([r.reward for r in records], [r.group for r in records])
    order = np.random.default_rng(0).permutation(np.flatnonzero(advantages.is_kept))
    driven = high_water_mib()
    total, num_loss = 0, 0
    for members in np.array_split(order, num_batches):
        chosen = [records[i] for i in members]
        packed = pack_records(chosen, [float(advantages.advantage[i]) for i in members], NUM_TOKENS)
        total += int(packed.token_ids.sum())
        num_loss += packed.num_loss_tokens
        del packed
    stored = sum(path.stat().st_size for path in (folder / "rollouts").glob("*.*") if path.is_file())
    print(
        json.dumps(
            {
                "driver_mib": driven - base,
                "train_mib": high_water_mib() - base,
                "sent_bytes": sampler.num_bytes,
                "stored_bytes": stored,
                "total": total,
                "loss_tokens": num_loss,
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        driver(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
