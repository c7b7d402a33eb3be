"""A rollout engine without a model: scripted replies, one token a step, the protocol's rules enforced.

It refuses what a real engine must refuse (duplicate uids, empty or overlong prompts, a parent that is not
held, weights whose digest is wrong), so that code tested against it is tested against the contract.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from consilience.conf.errors import EngineError
from consilience.rollout.engine import Completed, EngineState, NewTokens, Prefix, Request
from consilience.rollout.proof import Evidence
from consilience.rollout.publishing import Announced, TensorRecord, digest_of, tensor_records, verify

if TYPE_CHECKING:
    from torch import Tensor

Reply = Callable[[Request, tuple[int, ...]], Sequence[int]]


@dataclass(slots=True)
class _Stream:
    request: Request
    context: tuple[int, ...]  # everything before the first token this turn samples
    reply: tuple[int, ...]
    versions: list[int] = field(default_factory=list)


class FakeRolloutEngine:
    """Replies are a function of (request, context ids); log-prob of token t of one is −0.01 (t + 1) in fp32.

    reply           what to sample, the request's prefix included; cut at `max_tokens` (finish "length") or
                    after the first stop id
    max_running     requests decoded at once, the rest wait
    max_context     longest context + reply, in tokens
    die_after       number of steps after which the engine is dead; None = never
    death           "error" raises EngineError from then on, "kill" sends SIGKILL to its own process
    step_s          seconds one step sleeps
    """

    def __init__(
        self,
        reply: Reply,
        *,
        max_running: int = 64,
        max_context: int = 4096,
        die_after: int | None = None,
        death: str = "error",
        step_s: float = 0.0,
    ) -> None:
        self._reply, self._max_running, self._max_context = reply, max_running, max_context
        self._die_after, self._death, self._step_s = die_after, death, step_s
        self._waiting: deque[Request] = deque()
        self._known: set[str] = set()  # waiting, running or held
        self._running: dict[str, _Stream] = {}
        self._held: dict[str, tuple[int, ...]] = {}
        self._version, self._digest = 0, ""
        self._is_asleep = False
        self._num_steps = self._prefilled = self._sampled = 0
        self._new = NewTokens(0)
        self.published: list[tuple[str, int]] = []
        self._tensors: dict[str, TensorRecord] = {}

    def submit(self, requests: Sequence[Request]) -> None:
        if self._is_asleep:
            raise EngineError("the engine sleeps; wake it")
        for request in requests:
            if request.uid in self._known:
                raise EngineError(f"request {request.uid} is already known; uids are unique")
            if not request.prompt_ids:
                raise EngineError(f"request {request.uid} has an empty prompt")
            if request.parent is not None and request.parent not in self._held:
                raise EngineError(f"request {request.uid} continues {request.parent}, which is not held")
            if request.prefix is not None and request.parent is not None:
                raise EngineError(f"request {request.uid} goes on from a prefix and continues a stream")
            length = len(request.prompt_ids) + len(self._held.get(request.parent or "", ()))
            if length >= self._max_context:
                raise EngineError(
                    f"request {request.uid}: {length} tokens, the context holds {self._max_context}"
                )
            self._known.add(request.uid)
            self._waiting.append(request)

    def sleep(self, level: int = 1) -> None:
        if self._known:
            raise EngineError(
                f"{len(self._known)} requests run or are held; an engine sleeps between two phases"
            )
        self._is_asleep = True

    def wake(self) -> None:
        self._is_asleep = False

    def step(self) -> list[Completed]:
        self._num_steps += 1
        if self._die_after is not None and self._num_steps > self._die_after:
            if self._death == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise EngineError(f"the engine died after {self._die_after} steps")
        if self._step_s:
            time.sleep(self._step_s)
        self._new = NewTokens(self._version)
        while self._waiting and len(self._running) < self._max_running:
            self._admit(self._waiting.popleft())
        finished = []
        for stream in list(self._running.values()):
            if len(stream.versions) < len(stream.reply):  # a prefix may be complete already
                self._sample(stream)
            if len(stream.versions) == len(stream.reply):
                finished.append(self._finish(stream))
        return finished

    def _admit(self, request: Request) -> None:
        before: tuple[int, ...] = ()
        if request.parent is not None:
            before = self._held.pop(request.parent)
            self._known.discard(request.parent)
        context = before + request.prompt_ids
        self._prefilled += len(request.prompt_ids)
        reply = tuple(self._reply(request, context))
        stops = [i for i, token in enumerate(reply) if token in request.sampling.stop_ids]
        reply = reply[: stops[0] + 1] if stops else reply
        room = min(request.sampling.max_tokens, self._max_context - len(context))
        if not reply:
            raise EngineError(f"the script of request {request.uid} is empty; a turn has a token at least")
        stream = self._running[request.uid] = _Stream(request, context, reply[:room])
        if request.prefix is not None:
            begun = request.prefix.token_ids
            if stream.reply[: len(begun)] != begun:
                raise EngineError(f"the script of request {request.uid} does not begin with its prefix")
            stream.versions += request.prefix.weight_version

    def _sample(self, stream: _Stream) -> None:
        position = len(stream.versions)
        stream.versions.append(self._version)
        self._sampled += 1
        self._new.add(stream.request.uid, position, stream.reply[position], _logprob(position))

    def new_tokens(self) -> NewTokens:
        return self._new

    def _finish(self, stream: _Stream) -> Completed:
        request = stream.request
        del self._running[request.uid]
        if request.hold:
            self._held[request.uid] = stream.context + stream.reply
        else:
            self._known.discard(request.uid)
        is_stop = stream.reply[-1] in request.sampling.stop_ids
        logprobs = tuple(_logprob(t) for t in range(len(stream.reply)))
        versions = tuple(stream.versions)
        return Completed(request.uid, stream.reply, logprobs, versions, "stop" if is_stop else "length")

    def release(self, uids: Sequence[str]) -> None:
        for uid in uids:
            if self._held.pop(uid, None) is not None:
                self._known.discard(uid)

    def clear(self) -> tuple[list[Request], list[str]]:
        running = [
            replace(s.request, prefix=_begun(s)) if s.versions else s.request for s in self._running.values()
        ]
        unfinished, held = [*running, *self._waiting], list(self._held)
        for those in (self._running, self._waiting, self._held, self._known):
            those.clear()
        return unfinished, held

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        verify(weights, announced)
        self._digest, self._version = digest_of(announced), version
        self._tensors = tensor_records(weights)
        self.published.append((self._digest, version))

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
        """The tensors last published, and log-probabilities of its own kind."""
        del exact
        logprobs = tuple(tuple(_logprob(t) for t in range(len(p) - 1)) for p in prompts)
        return Evidence(dict(self._tensors), logprobs, "cpu")

    def state(self) -> EngineState:
        return EngineState(
            weight_version=self._version,
            digest=self._digest,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_held=len(self._held),
            prefill_tokens=self._prefilled,
            sampled_tokens=self._sampled,
            prefill_s=0.0,
            decode_s=self._num_steps * self._step_s,
        )


def _begun(stream: _Stream) -> Prefix:
    count = len(stream.versions)
    logprobs = tuple(_logprob(t) for t in range(count))
    return Prefix(stream.reply[:count], logprobs, tuple(stream.versions))


def _logprob(position: int) -> float:
    return float(np.float32(-0.01 * (position + 1)))
