"""The seam between an episode and whatever decodes tokens: token ids in, token ids out.

`NativeEngine` (native_engine.py) is the reference; `FakeRolloutEngine` (fake_engine.py) is shipped
for tests; vLLM and others come behind the same verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.rollout.publishing import Announced


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. V4 recommends temperature 1 and no truncation.

    temperature 0 means greedy. `seed` makes the request's tokens a function of (seed, position,
    weights) alone, whatever it is batched with.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request had sampled before its engine died: token ids, log-probabilities, weight versions."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """One generation turn.

    prompt_ids   tokens to append before sampling starts
    prefix       tokens that this very request has sampled already, or None: they count as sampled, come
                 first in its `Completed`, and the random numbers go on behind them. Without a parent only
    parent       uid of a held request whose stream this one continues (tool results), or None
    group        requests with equal prompts and equal group share one prefill
    hold         keep the decode state after the turn, so that a later request may continue it;
                 a held stream is dropped by `release`
    """

    uid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    parent: str | None = None
    group: str | None = None
    hold: bool = False
    prefix: Prefix | None = None


@dataclass(slots=True)
class NewTokens:
    """Tokens that one step sampled, in columns of equal length.

    uids      request of each token; those of one request stand in stream order
    positions number of the token among those its request sampled, from 0 (a prefix counts)
    logprobs  values that fp32 holds
    """

    weight_version: int
    uids: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, uid: str, position: int, token_id: int, logprob: float) -> None:
        self.uids.append(uid)
        self.positions.append(position)
        self.token_ids.append(token_id)
        self.logprobs.append(logprob)


@dataclass(frozen=True, slots=True)
class Completed:
    """A finished turn. finish is "stop" (a stop id, included as the last token) or "length"."""

    uid: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: tuple[int, ...]
    finish: str


@dataclass(frozen=True, slots=True)
class EngineState:
    """Counters a driver shows and checks. Times in seconds, sizes in tokens.

    drafted_tokens, accepted_tokens  of speculative decoding: drafts made, and those that stood
    """

    weight_version: int
    digest: str
    num_waiting: int
    num_running: int
    num_held: int
    prefill_tokens: int
    sampled_tokens: int
    prefill_s: float
    decode_s: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class RolloutEngine(Protocol):
    """Submit, step, new_tokens, publish, state (and release for held streams)."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests. EngineError on a duplicate uid, an empty prompt or a prompt over the limit, or a
        prefix with a parent, or longer than `max_tokens`."""
        ...

    def step(self) -> list[Completed]:
        """Advance every running request by a token or more (admitting waiting ones first); what finished."""
        ...

    def new_tokens(self) -> NewTokens:
        """What the last step sampled, for finished requests too: what a log writes."""
        ...

    def release(self, uids: Sequence[str]) -> None:
        """Drop held streams."""
        ...

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """Replace the weights between two steps. WeightsRefused unless they are what was announced
        (`publishing.verify`): all of them, or none is loaded."""
        ...

    def state(self) -> EngineState: ...
