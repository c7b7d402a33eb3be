"""The seam between an episode and whatever decodes tokens: token ids in, token ids out.

`NativeEngine` (native_engine.py) is the reference; `FakeRolloutEngine` (fake_engine.py) is shipped
for tests; vLLM and others come behind the same verbs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from consilience.rollout.kept_sets import KeptSets
    from consilience.rollout.publishing import Announced
    from consilience.rollout.token_routing import TokenRouting


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. V4 recommends temperature 1 and no truncation.

    temperature 0 means greedy. `seed` makes the request's tokens a function of (seed, position,
    weights) alone, whatever it is batched with. top_k (0: all), top_p (1: all) and min_p (0: all) cut
    the distribution (`truncation.py`); log-probabilities are then those among the kept tokens, which
    `Completed.kept` names.
    """

    temperature: float = 1.0
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    seed: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens cannot be drawn; a greedy draw has no distribution to cut."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request had sampled before its engine died: token ids, log-probabilities, weight versions."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedStream:
    """Where a paused worker left the decode state of request `uid`, if it did (`saved_streams.py`)."""

    folder: Path
    uid: str


@dataclass(frozen=True, slots=True)
class Request:
    """One generation turn.

    prompt_ids   tokens to append before sampling starts
    prefix       tokens that this very request has sampled already, or None: they count as sampled, come
                 first in its `Completed`, and the random numbers go on behind them. Without a parent only
    parent       uid of a held request whose stream this one continues (tool results), or None
    group        requests with equal prompts and equal group share one prefill
    hold         keep the decode state after the turn, so that a later request may continue it;
                 a held stream is dropped by `release`. With `max_tokens` 0 it is a turn of no tokens: the
                 native engine computes the prompt's state and holds it, to be forked and continued
    saved        a state on disk of the beginning of what this request prefills; what is not there is computed
    """

    uid: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    parent: str | None = None
    group: str | None = None
    hold: bool = False
    prefix: Prefix | None = None
    saved: SavedStream | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """A branch that was taken off a stream (quick instructions, report 5.1.2).

    num_tokens  tokens of the parent's stream at that moment, prompt and sampled: the branch has these, then
                its own prompt, then what it samples. The parent has none of the branch's
    """

    uid: str
    parent: str
    num_tokens: int


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
    """A finished turn. finish is "stop" (a stop id, included as the last token) or "length".

    routing  of the newest tokens that the engine fed for this stream, the turn's last one left out, which is
             not fed; a prefix is fed and so recorded again. None: not recorded
    kept     one set a token of token_ids, where the request's distribution is cut; none for a prefix's
    """

    uid: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: tuple[int, ...]
    finish: str
    routing: TokenRouting | None = None
    kept: KeptSets | None = None


@dataclass(frozen=True, slots=True)
class EngineState:
    """Counters a driver shows and checks. Times in seconds, sizes in tokens.

    drafted_tokens, accepted_tokens  of speculative decoding: drafts made, and those that stood
    prefix_hits, prefix_misses  prompts that a prefix store had the beginning of, or not
    prefix_tokens     tokens that did not have to be computed for it
    prefix_corrupted  damaged entries that were found and removed
    saved_tokens      tokens whose state a paused worker had left on disk
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
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_tokens: int = 0
    prefix_corrupted: int = 0
    saved_tokens: int = 0


class RolloutEngine(Protocol):
    """Submit, step, new_tokens, publish, state (release for held streams, clear for all); sleep, wake."""

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

    def clear(self) -> tuple[list[Request], list[str]]:
        """Forget every stream: (unfinished requests, each with what it had sampled as its prefix; uids of the
        held streams). A request that continued another names that one still, though it is gone too."""
        ...

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """Replace the weights between two steps. WeightsRefused unless they are what was announced
        (`publishing.verify`): all of them, or none is loaded."""
        ...

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake`: caches (0), weights to the host too (1), weights dropped (2).

        EngineError while there are streams; from `submit` and `publish` while it sleeps.
        """
        ...

    def wake(self) -> None:
        """Undo `sleep`, if it sleeps. After level 2 `publish` comes before the next request."""
        ...

    def state(self) -> EngineState: ...
