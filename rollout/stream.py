"""One running turn of a rollout engine: its request, its random numbers, what it has sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.rollout.engine import Completed, Prefix, Request
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.sampling import sample
from consilience.rollout.token_routing import TokenRouting
from consilience.rollout.truncation import NO_CUT, ids_of, sample_kept

if TYPE_CHECKING:
    from consilience.rollout.saved_streams import Found


@dataclass
class Stream:
    """max_tokens it may sample; uniforms [max_tokens + 1, numbers a token] in [0, 1), by its seed alone.

    before   tokens of the stream in front of what this turn samples
    era      of the weights that the oldest part of its decode state comes from
    routing  of what was fed since it started, in chunks [n, layers, K]
    earlier_routing  the same of the turns that this one continues
    kept     ids that each token was drawn from, where that is less than all
    """

    request: Request
    max_tokens: int
    uniforms: np.ndarray
    before: tuple[int, ...]
    era: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    routing: list[np.ndarray] = field(default_factory=list)
    kept: list[np.ndarray | None] = field(default_factory=list)
    earlier_routing: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def start(
        cls, request: Request, max_tokens: int, numbers: int, before: tuple[int, ...], era: int = 0
    ) -> Stream:
        """A stream of at most `max_tokens` tokens; a longer one has the same numbers and some more."""
        generator = np.random.Generator(np.random.Philox(key=request.sampling.seed))
        return cls(request, max_tokens, generator.random((max_tokens + 1, numbers)), before, era)

    @property
    def length(self) -> int:
        """Tokens of the stream, the last one, which its decode state does not hold yet, included."""
        return len(self.before) + len(self.tokens)

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens of the stream; its decode state has consumed all but the last."""
        return (*self.before, *self.tokens)

    def copy(self) -> Stream:
        """The stream's tokens as they are now; what this one samples from here on is not among them."""
        return replace(self, tokens=self.tokens[:])

    def go_on_from(self, prefix: Prefix) -> None:
        """Take over what was sampled before; the next numbers are those behind it."""
        self.tokens += prefix.token_ids
        self.logprobs += prefix.logprobs
        self.versions += prefix.weight_version
        self.kept += [None] * len(prefix.token_ids)

    @property
    def is_stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.request.sampling.stop_ids

    @property
    def num_left(self) -> int:
        """Tokens it may still sample."""
        return 0 if self.is_stopped else self.max_tokens - len(self.tokens)

    def coming(self, count: int) -> np.ndarray:
        """[count, numbers] of the next tokens; there are as many as may come, and one token's more."""
        return self.uniforms[len(self.tokens) : len(self.tokens) + count]

    def take(self, tokens: Sequence[int], logprobs: Sequence[float], version: int) -> int:
        """Append tokens up to the one that ends the stream; how many. EngineError: not finite."""
        before = len(self.tokens)
        for token, logprob in zip(tokens, logprobs):
            if not math.isfinite(logprob):
                raise EngineError(
                    f"weights of version {version} give logits that are not finite; publish a checkpoint "
                    "from before the training step that broke them, and restart the engine"
                )
            self.tokens.append(token)
            self.logprobs.append(logprob)
            self.versions.append(version)
            if not self.num_left:
                break
        return len(self.tokens) - before

    def as_request(self) -> Request:
        """The request that goes on where this stream stands."""
        prefix = Prefix(tuple(self.tokens), tuple(self.logprobs), tuple(self.versions))
        return replace(self.request, prefix=prefix)

    def completed(self, routing: TokenRouting | None = None) -> Completed:
        finish = "stop" if self.is_stopped else "length"
        columns = (tuple(self.tokens), tuple(self.logprobs), tuple(self.versions))
        kept = KeptSets.of(self.kept) if self.request.sampling.is_cut else None
        return Completed(self.request.uid, *columns, finish, routing, kept)


def hand_out(
    streams: Sequence[Stream],
    fed: Sequence[np.ndarray],
    rows: Sequence[int] | None = None,
    before: Sequence[np.ndarray] = (),
    found: Sequence[Found | None] = (),
) -> None:
    """Stream i gets the experts [n, layers, K] of row rows[i] of what was `fed` (i if not given), behind
    those of what was fed `before`; none where `fed` is empty. Then what a former worker had recorded."""
    if fed:
        for stream, row in zip(streams, range(len(streams)) if rows is None else rows):
            stream.routing = [*before, fed[row]]
    for stream, recorded in zip(streams, found):
        if recorded is not None:
            recorded.give_to(stream)  # type: ignore[arg-type]  # the two files import each other


def take_each(
    streams: Sequence[Stream],
    version: int,
    tokens: Tensor,
    logprobs: Tensor,
    counts: Sequence[int],
    fed: Sequence[np.ndarray] = (),
    bits: Sequence[np.ndarray] = (),
) -> list[int]:
    """Give stream i the first counts[i] of tokens[i], logprobs[i]; how many each one took.

    For each token taken one was fed: fed[i] [at least so many, layers, K] are the experts of these, if any.
    bits[i] are the kept tokens of a stream that gets one (`truncation.bits_of`), if any stream is cut.
    """
    rows = zip(streams, tokens.tolist(), logprobs.tolist(), counts)
    taken = [stream.take(ids[:n], values[:n], version) for stream, ids, values, n in rows]
    for stream, experts, n in zip(streams, fed, taken):
        stream.routing.append(experts[:n])
    for stream, row in zip(streams, bits):
        stream.kept.append(ids_of(row) if stream.request.sampling.is_cut else None)
    return taken


def cuts(streams: Sequence[Stream]) -> Tensor | None:
    """[R, 3] fp64 as `truncation.kept_tokens` takes them, on the host; None where no stream is cut."""
    given = [s.request.sampling for s in streams]
    if not any(sampling.is_cut for sampling in given):
        return None
    rows = [(s.top_k, s.top_p, s.min_p) if s.is_cut else NO_CUT for s in given]
    return torch.tensor(rows, dtype=torch.float64)


def draw_each(streams: Sequence[Stream], logits: Tensor) -> tuple[Tensor, Tensor, Sequence[np.ndarray]]:
    """One token a stream from logits [R, V], its log-probability, and `bits` as `take_each` takes them."""
    uniform = torch.from_numpy(np.array([s.coming(1)[0, 0] for s in streams]))
    if (cut := cuts(streams)) is None:
        return *sample(logits, temperatures(streams), uniform), ()
    tokens, logprobs, bits = sample_kept(logits, temperatures(streams), uniform, cut)
    return tokens, logprobs, list(bits.cpu().numpy())


def temperatures(streams: Sequence[Stream]) -> Tensor:
    """[R] fp32, on the host."""
    return torch.tensor([s.request.sampling.temperature for s in streams], dtype=torch.float32)
