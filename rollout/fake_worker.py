"""A whole rollout worker without a model: for tests of what stands above it, Ray pool included."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.deadlines import Limits
from consilience.rollout.engine import Request
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.grading import FakeGrader, GradeItem
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.worker import RolloutWorker

if TYPE_CHECKING:
    from torch import Tensor


def byte_tokenizer() -> Tokenizer:
    """V4's special tokens and the 256 bytes, no merges."""
    return Tokenizer.train([], 272)


_FOR_EVER_S = 3600.0


@dataclass(frozen=True)
class Trouble:
    """What happens to samples whose uid has `word` in it, `times` times over all processes.

    kind   "grade": their grading never ends; "step": the engine never comes back from their first step;
           "freeze": the process stops itself (SIGSTOP) when it gets new weights
    tally  a file that counts them, a byte each
    """

    kind: str
    tally: str
    word: str = ""
    times: int = 1

    def happens(self, kind: str, uid: str) -> bool:
        path = Path(self.tally)
        if kind != self.kind or self.word not in uid or (path.exists() and path.stat().st_size >= self.times):
            return False
        with path.open("ab") as file:
            file.write(b".")
        return True


class _TroubledEngine(FakeRolloutEngine):
    """Hangs, or stops its own process, where `trouble` says so."""

    trouble: Trouble

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self.trouble.happens("step", request.uid):
                time.sleep(_FOR_EVER_S)
        super().submit(requests)

    def publish(self, weights: Mapping[str, Tensor], digest: str, version: int) -> None:
        if self.trouble.happens("freeze", ""):
            os.kill(os.getpid(), signal.SIGSTOP)
        super().publish(weights, digest, version)


def build_fake_worker(
    reply: str = "42",
    *,
    step_s: float = 0.0,
    max_running: int = 64,
    die_after: int | None = None,
    trouble: Trouble | None = None,
    limits: Limits | None = None,
) -> RolloutWorker:
    """A worker whose policy says `reply`, then the seed, then end-of-sentence, whatever it is asked.

    die_after   steps after which the process kills itself with SIGKILL; None = never
    trouble     what else goes wrong; samples are then graded one by one
    """
    tokenizer = byte_tokenizer()

    def say(request: Request, context: Sequence[int]) -> Sequence[int]:
        return [*tokenizer.encode_plain(f"{reply} {request.sampling.seed}"), tokenizer.eos_id]

    def score(item: GradeItem) -> float:
        if trouble is not None and trouble.happens("grade", item.uid):
            time.sleep(_FOR_EVER_S)
        return float(len(item.text))

    kind = FakeRolloutEngine if trouble is None else _TroubledEngine
    engine = kind(say, step_s=step_s, max_running=max_running, die_after=die_after, death="kill")
    if isinstance(engine, _TroubledEngine) and trouble is not None:
        engine.trouble = trouble
    options = {"flush_s": 0.05, "limits": limits, "grade_batch": 64 if trouble is None else 1}
    return RolloutWorker(engine, tokenizer, FakeBoxes(), FakeGrader(score), **options)
