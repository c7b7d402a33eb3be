"""One running turn of a rollout engine: its request, its random numbers, what it has sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.rollout.engine import Completed, Prefix, Request


@dataclass
class Stream:
    """max_tokens it may sample; uniforms [max_tokens + 1, numbers a token] in [0, 1), by its seed alone;
    num_before: tokens that its decode state held when it started."""

    request: Request
    max_tokens: int
    uniforms: np.ndarray
    num_before: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @classmethod
    def start(cls, request: Request, max_tokens: int, numbers: int, num_before: int) -> Stream:
        """A stream of at most `max_tokens` tokens; a longer one has the same numbers and some more."""
        generator = np.random.Generator(np.random.Philox(key=request.sampling.seed))
        return cls(request, max_tokens, generator.random((max_tokens + 1, numbers)), num_before)

    @property
    def length(self) -> int:
        """Tokens of the stream, the last one, which its decode state does not hold yet, included."""
        return self.num_before + len(self.tokens)

    def go_on_from(self, prefix: Prefix) -> None:
        """Take over what was sampled before; the next numbers are those behind it."""
        self.tokens += prefix.token_ids
        self.logprobs += prefix.logprobs
        self.versions += prefix.weight_version

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

    def completed(self) -> Completed:
        finish = "stop" if self.is_stopped else "length"
        return Completed(
            self.request.uid, tuple(self.tokens), tuple(self.logprobs), tuple(self.versions), finish
        )


def temperatures(streams: list[Stream]) -> Tensor:
    """[R] fp32, on the host."""
    return torch.tensor([s.request.sampling.temperature for s in streams], dtype=torch.float32)
