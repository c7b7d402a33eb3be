"""Brings rows of a decode state to the end of their prompts: from what is known already, or by computing it.

What is known: the longest prefix that a batch of prompts shared, in a row of its own; a store on disk; what a
paused worker has left there.

R rows, V vocabulary, L layers with a learned router, K experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.admission import common_length, padded_ids
from consilience.rollout.engine import Request
from consilience.rollout.prefix_reuse import PrefixReuse
from consilience.rollout.routing_capture import RoutingCapture, fed_rows
from consilience.rollout.saved_streams import Found, SavedStreams
from consilience.rollout.speculative import SpeculativeState

MIN_SHARED_PREFIX = 32  # tokens; below this a fork costs more than it saves


class Prefill:
    """num_tokens computed so far; fed: R arrays [n, L, K], experts of what the last call fed, if recorded.

    found        what the last `recall` found, a row

    shared       tokens of the shared prefix
    shared_slot  row that keeps it
    """

    def __init__(
        self,
        model: Transformer,
        state: DecodeState | SpeculativeState,
        capture: RoutingCapture,
        reuse: PrefixReuse | None,
        saved: SavedStreams | None,
        shared_slot: int,
    ) -> None:
        self.model, self.state, self.capture, self.reuse = model, state, capture, reuse
        self.saved = saved
        self.found: list[Found | None] = []
        self.num_tokens = 0
        self.fed: list[np.ndarray] = []
        self.shared: tuple[int, ...] = ()
        self._shared_slot = shared_slot
        self._shared_fed: list[np.ndarray] = []

    def feed(self, first: int, prompts: list[tuple[int, ...]]) -> Tensor:
        """Feed `prompts` to rows first..; logits [R, V] at each row's last token, if it got one."""
        tokens, lengths = padded_ids(prompts, self.model.head.weight.device)
        routing = self.capture.routing(tokens.numel())
        if isinstance(self.state, SpeculativeState):
            hidden = self.state.feed(first, tokens, lengths, routing)
        else:
            view = self.state.view(first, first + len(prompts))
            hidden = self.model.hidden(tokens, state=view, lengths=lengths, routing=routing)
        fed = fed_rows(routing, tokens.shape, lengths.tolist())
        self.fed = [np.concatenate(both) for both in zip(self.fed, fed)] if self.fed else fed
        self.num_tokens += sum(map(len, prompts))
        rows = torch.arange(len(prompts), device=hidden.device)
        return self.model.head(hidden[rows, lengths - 1])

    def complete(self, first: int, streams: Sequence[tuple[int, ...]], leave: int = 1) -> Tensor:
        """`feed` rows first.. what they have yet to consume of their `streams`, what a store has left out.

        leave  tokens that are computed in any case, 1 where the logits are wanted
        """
        self.fed = []
        if self.reuse:
            again = self.reuse.advance(first, streams, leave, self.feed)
            self.num_tokens += again
        at = self.state.position[first : first + len(streams)].tolist()
        return self.feed(first, [stream[consumed:] for stream, consumed in zip(streams, at)])

    def recall(self, first: int, requests: Sequence[Request], streams: Sequence[tuple[int, ...]]) -> bool:
        """Rows first.. get the states that `requests` name, of what their `streams` begin with; whether any
        did."""
        self.found = [
            self.saved.take(row, request.saved, ids) if self.saved and request.saved else None
            for row, (request, ids) in enumerate(zip(requests, streams), first)
        ]
        return any(self.found)

    def proceed(self, first: int, tokens: list[tuple[int, ...]]) -> Tensor:
        """`feed` streams that go on."""
        self.fed = []
        return self.feed(first, tokens)

    def share(self, first: int, prompts: list[tuple[int, ...]]) -> None:
        """Rows first.. get the state of the prefix that all `prompts` share, where that is worth it."""
        kept = len(self.shared)
        if not kept or any(len(p) <= kept or p[:kept] != self.shared for p in prompts):
            common = common_length(prompts)
            if common < MIN_SHARED_PREFIX or len(prompts) < 2:
                return
            self.forget()
            self.state.free(self._shared_slot)
            self.state.reserve(self._shared_slot, common)
            self.complete(self._shared_slot, [prompts[0][:common]])
            self.shared, self._shared_fed = prompts[0][:common], self.fed
        self.state.fork([self._shared_slot] * len(prompts), list(range(first, first + len(prompts))))

    def fed_before(self, prompts: list[tuple[int, ...]]) -> list[np.ndarray]:
        """What was fed of all `prompts` in the shared row, if their rows were fed the rest, all of it."""
        rests = (len(p) - len(fed) for p, fed in zip(prompts, self.fed))
        if any(self.found):
            return []
        return self._shared_fed if self.shared and all(n == len(self.shared) for n in rests) else []

    def forget(self) -> None:
        """The shared prefix was computed with weights that are gone."""
        self.shared = ()
