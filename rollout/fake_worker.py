"""A whole rollout worker without a model: for tests of what stands above it, Ray pool included."""

from __future__ import annotations

from collections.abc import Sequence

from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.engine import Request
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.grading import FakeGrader
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.worker import RolloutWorker


def byte_tokenizer() -> Tokenizer:
    """V4's special tokens and the 256 bytes, no merges."""
    return Tokenizer.train([], 272)


def build_fake_worker(
    reply: str = "42", *, step_s: float = 0.0, max_running: int = 64, die_after: int | None = None
) -> RolloutWorker:
    """A worker whose policy says `reply`, then the seed, then end-of-sentence, whatever it is asked.

    die_after   steps after which the process kills itself with SIGKILL; None = never
    """
    tokenizer = byte_tokenizer()

    def say(request: Request, context: Sequence[int]) -> Sequence[int]:
        return [*tokenizer.encode_plain(f"{reply} {request.sampling.seed}"), tokenizer.eos_id]

    engine = FakeRolloutEngine(say, step_s=step_s, max_running=max_running, die_after=die_after, death="kill")
    return RolloutWorker(engine, tokenizer, FakeBoxes(), FakeGrader(), flush_s=0.05)
