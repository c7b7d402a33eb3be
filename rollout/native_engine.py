"""The native decoding engine: batched sampling on V4's heterogeneous decode state.

Running streams fill the front rows of the state, so a step works on a view without copying. Streams
that wait for a tool are parked in the rows behind, the last of which keeps the longest prefix that a
batch of prompts shares. Compressed entries lie in blocks and never move.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError, EngineError, WeightsRefused
from consilience.model.checkpoint import load_official
from consilience.model.exact import exact_mode
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.admission import by_prompt, starts_with_a_token, take_next
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.engine import Completed, EngineState, Fork, NewTokens, Request
from consilience.rollout.native_sleep import Rest
from consilience.rollout.parked_streams import ParkedStreams, moves_into
from consilience.rollout.prefill import Prefill
from consilience.rollout.prefix_keys import PrefixKeys
from consilience.rollout.prefix_reuse import PrefixCaching, PrefixReuse
from consilience.rollout.proof import Evidence, model_evidence
from consilience.rollout.publishing import Announced, digest_of, verify
from consilience.rollout.request_check import check_branches, check_length, check_request
from consilience.rollout.routing_capture import RoutingCapture, fed_rows
from consilience.rollout.saved_streams import SavedStreams
from consilience.rollout.speculative import NUM_UNIFORMS, SpeculativeState
from consilience.rollout.stream import Stream, cuts, draw_each, hand_out, take_each, temperatures


class NativeEngine:
    """RolloutEngine over a `Transformer`.

    max_rows   sequences held at once, running and waiting for tools together
    max_length tokens a sequence may reach
    prefill_tokens  padded tokens of one prefill call
    speculative  the model's MTP block drafts: fewer steps, the same distribution, other tokens for a seed
    exact      decode in exact mode: the trainer's log-probabilities, to the last bit (`model/exact.py`)
    captures   on a GPU in bf16, capture decoding steps in CUDA graphs (`captured_decode.py`)
    records_routing  hand out the experts that each token visited (`Completed.routing`)
    prefixes   keep prompts' states on disk, take them from there (`prefix_reuse.py`); not with `speculative`
    """

    def __init__(
        self,
        model: Transformer,
        *,
        max_rows: int,
        max_length: int,
        prefill_tokens: int = 8192,
        version: int = 0,
        speculative: bool = False,
        exact: bool = False,
        captures: bool = True,
        records_routing: bool = False,
        prefixes: PrefixCaching | None = None,
    ) -> None:
        self.model = model.eval()
        self.exact = exact
        self.max_rows, self.max_length = max_rows, max_length
        self.prefill_tokens = prefill_tokens
        weight = model.head.weight
        num_slots, num_rows = 2 * max_rows + 1, max_rows + 1
        self._speculative = SpeculativeState(model, num_slots, max_length, num_rows) if speculative else None
        self._state = self._speculative or DecodeState.allocate(
            model.config,
            num_slots,
            max_length,
            num_blocks=num_rows * DecodeState.blocks_of(model.config, max_length),
            device=weight.device,
            dtype=weight.dtype,
        )
        self._capture = RoutingCapture(model.config, weight.device, records_routing)
        self._running: list[Stream] = []
        state = self._state.trunk if isinstance(self._state, SpeculativeState) else self._state
        self._decoder = Decoder(model, state, max_rows, max_length, captures, self._capture)
        self._keys = PrefixKeys(model, exact)
        self._reuse = prefixes and PrefixReuse(model, self._state, prefixes, self._keys, prefill_tokens)
        self._saved = SavedStreams(state, self._keys) if not speculative else None
        known = self._reuse, self._saved
        self._prefill = Prefill(model, self._state, self._capture, *known, shared_slot=num_slots - 1)
        self._last = self._decoder.tokens  # [max_rows] sampled, not yet fed
        self._parked = ParkedStreams(self._state, range(max_rows, 2 * max_rows))
        self._rest = Rest(self._decoder, self._prefill, self._state)
        self._waiting: deque[Request] = deque()
        self._uids: set[str] = set()
        self._version, self._digest = version, ""
        self._era = 0  # weights so far
        self._new: list[tuple[Stream, int, int]] = []  # of this step: stream, tokens before, tokens
        self._num_sampled = 0
        self._seconds = {"prefill_s": 0.0, "decode_s": 0.0}

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`. All or none: after an error nothing was queued.

        A fresh request must fit with all its `max_tokens`; a continuation samples as far as its
        stream has room, at least one token, and then ends with "length".
        """
        self._rest.check_ready()
        uids, held = set(self._uids), dict(self._parked.held)
        for request in requests:
            parent = request.parent
            if parent is not None and parent not in held:
                raise EngineError(f"request {request.uid} continues {parent}, which is not held")
            self._check(request, uids, 0 if parent is None else held.pop(parent)[1].length)
            uids.add(request.uid)
        self._uids = uids
        for request in requests:
            # Continuations first: they free held rows, which new prompts may be waiting for.
            if request.parent is not None:
                self._parked.claim(request.parent, request.uid)
                self._uids.discard(request.parent)
                self._waiting.appendleft(request)
            else:
                self._waiting.append(request)

    def _check(self, request: Request, uids: set[str], before: int) -> None:
        """EngineError unless the request can run beside `uids`, behind `before` tokens."""
        if request.uid in uids:
            raise EngineError(f"request {request.uid} is already in the engine; uids are unique")
        check_request(request, self.model.config.vocab_size, is_speculative=bool(self._speculative))
        check_length(request, before, self.max_length)

    def fork(self, parent: str, branches: Sequence[Request]) -> list[Fork]:
        """Branch off the stream of a running or held request as it stands now: quick instructions.

        A branch goes on behind all that the parent has, the last sampled token included, and its own
        `prompt_ids`; it decodes beside the parent, which goes on as if there were none. All or none:
        EngineError if the parent neither runs nor is held, if rows are too few, and as `submit`.
        """
        running = {s.request.uid: (row, s) for row, s in enumerate(self._running)}
        if parent not in running and parent not in self._parked.held:
            raise EngineError(f"request {parent} neither runs nor is held; only such streams are forked")
        row, stream = running[parent] if parent in running else self._parked.held[parent]
        check_branches(parent, branches, self._num_free)
        uids = set(self._uids)
        for branch in branches:
            self._check(replace(branch, parent=parent), uids, stream.length)
            uids.add(branch.uid)
        self._uids = uids
        self._parked.fork(row, stream.copy(), [branch.uid for branch in branches])
        self._waiting.extendleft(replace(branch, parent=parent) for branch in branches)
        return [Fork(branch.uid, parent, stream.length) for branch in branches]

    def save_streams(self, folder: Path, uids: Collection[str], limit_s: float) -> int:
        """Before a planned pause: store what runs or is held of `uids`, for `limit_s`; how many states were.

        Whoever gets a request that names one (`Request.saved`) goes on without a prefill. Left out: states of
        old weights, and those of an engine that drafts.
        """
        rows = [*enumerate(self._running), *self._parked]
        fresh = [(row, s) for row, s in rows if s.era == self._era and s.request.uid in uids]
        return self._saved.save_all(folder, fresh, limit_s) if self._saved else 0

    @torch.no_grad()
    def step(self) -> list[Completed]:
        """See `RolloutEngine.step`."""
        with exact_mode(self.exact):
            return self._step()

    def _step(self) -> list[Completed]:
        started = time.perf_counter()
        self._new.clear()
        done = self._admit()
        admitted = time.perf_counter()
        self._seconds["prefill_s"] += admitted - started
        if self._running and not done:
            done = self._decode()
            self._seconds["decode_s"] += time.perf_counter() - admitted
        return done

    def new_tokens(self) -> NewTokens:
        """See `RolloutEngine.new_tokens`."""
        places = [(s, at) for s, before, count in self._new for at in range(before, before + count)]
        return NewTokens(
            self._version,
            [s.request.uid for s, _ in places],
            [at for _, at in places],
            [s.tokens[at] for s, at in places],
            [s.logprobs[at] for s, at in places],
        )

    def release(self, uids: Sequence[str]) -> None:
        """See `RolloutEngine.release`."""
        for uid in uids:
            if uid in self._parked.held:
                self._parked.release(uid)
                self._uids.discard(uid)

    def clear(self) -> tuple[list[Request], list[str]]:
        """See `RolloutEngine.clear`."""
        unfinished = [*(s.as_request() for s in self._running), *self._waiting]
        for row in range(len(self._running)):
            self._state.free(row)
        for those in (self._running, self._waiting, self._uids, self._new):
            those.clear()
        return unfinished, self._parked.clear()

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutEngine.publish`. Running streams go on with the new weights and the old state."""
        self._rest.check_awake()
        verify(weights, announced)
        try:
            load_official(self.model, weights)
        except CheckpointError as error:
            raise WeightsRefused(f"weights that do not fit the model, the old ones stay: {error}") from None
        self._rest.has_new_weights()
        digest = digest_of(announced)
        self._era += digest != self._digest
        self._keys.use_weights(digest)
        self._prefill.forget()
        self._version, self._digest = version, digest

    def sleep(self, level: int = 1) -> None:
        """See `RolloutEngine.sleep`."""
        self._rest.begin(level, self._uids)

    def wake(self) -> None:
        """See `RolloutEngine.wake`."""
        self._rest.end()

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
        """See `proof.py`. Running streams do not notice."""
        return model_evidence(self.model, prompts, exact)

    def state(self) -> EngineState:
        return EngineState(
            weight_version=self._version,
            digest=self._digest,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_held=len(self._parked),
            prefill_tokens=self._prefill.num_tokens,
            sampled_tokens=self._num_sampled,
            **self._seconds,
            drafted_tokens=self._speculative.drafted if self._speculative else 0,
            accepted_tokens=self._speculative.accepted if self._speculative else 0,
            saved_tokens=self._saved.num_tokens if self._saved else 0,
            **(self._reuse.counts() if self._reuse else {}),
        )

    # ---- admission ----------------------------------------------------------------------------

    @property
    def _num_free(self) -> int:
        return self.max_rows - len(self._running) - len(self._parked)

    def _admit(self) -> list[Completed]:
        """Prefill waiting requests into free rows; what finished with its very first token."""
        done: list[Completed] = []
        while self._waiting and (self._waiting[0].parent is not None or self._num_free > 0):
            batch = take_next(self._waiting, self._num_free, self.prefill_tokens)
            if batch[0].parent is not None:
                self._prefill_resumed(batch)
            else:
                self._prefill_new(batch) if starts_with_a_token(batch[0]) else self._prefill_begun(batch)
            done += self._retire()
        return done

    def _prefill_resumed(self, batch: list[Request]) -> None:
        first = len(self._running)
        parents = [self._parked.stream_of(r.uid) for r in batch]
        room = [self.max_length - p.length - len(r.prompt_ids) for r, p in zip(batch, parents)]
        self._parked.resume([r.uid for r in batch], first)
        for row, (request, rest) in enumerate(zip(batch, room), first):
            most = len(request.prompt_ids) + min(request.sampling.max_tokens, rest)
            self._state.reserve(row, int(self._state.position[row]) + 1 + most)
        logits = self._prefill.proceed(first, [(p.ids[-1], *r.prompt_ids) for r, p in zip(batch, parents)])
        self._start(batch, logits, room, parents)
        hand_out(self._running[first:], self._prefill.fed)

    def _prefill_begun(self, batch: list[Request]) -> None:
        """The state of requests that had sampled something, or never will: all but the last token is fed."""
        first = len(self._running)
        self._reserve(first, batch)
        for request in batch:
            self._begin(request, request.sampling.max_tokens)
        consumed, last = zip(*((s.ids[:-1], s.ids[-1]) for s in self._running[first:]))
        self._prefill.recall(first, batch, consumed)
        self._prefill.complete(first, consumed, leave=0)
        self._last[first : first + len(batch)] = torch.tensor(last, device=self._last.device)
        hand_out(self._running[first:], self._prefill.fed, found=self._prefill.found)

    def _prefill_new(self, batch: list[Request]) -> None:
        """Prefill one row per distinct prompt, then fork it for the rest of its group."""
        first = len(self._running)
        is_leader, followers, owner = by_prompt(batch)
        prompts = [batch[i].prompt_ids for i in is_leader]
        everyone = [batch[i] for i in is_leader + followers]
        if not self._prefill.recall(first, everyone, [p[:-1] for p in prompts]):
            self._prefill.share(first, prompts)
        self._reserve(first, everyone[: len(prompts)])
        logits = self._prefill.complete(first, prompts)
        sources, behind = [first + owner[i] for i in followers], first + len(prompts)
        self._state.fork(sources, list(range(behind, first + len(batch))))
        self._reserve(behind, everyone[len(prompts) :])
        rows = [*range(len(prompts)), *(owner[i] for i in followers)]
        self._start(everyone, logits[rows], [r.sampling.max_tokens for r in everyone])
        before, found = self._prefill.fed_before(prompts), self._prefill.found
        hand_out(self._running[first:], self._prefill.fed, rows, before, found)

    def _reserve(self, first: int, requests: list[Request]) -> None:
        """Blocks for everything that requests in rows first.. may become."""
        for row, request in enumerate(requests, first):
            self._state.reserve(row, len(request.prompt_ids) + request.sampling.max_tokens)

    def _start(
        self, batch: list[Request], logits: Tensor, room: list[int], parents: Sequence[Stream] = ()
    ) -> None:
        """Run `batch` from its first logits [rows, V]; `room` = tokens each row's stream can still take."""
        first = len(self._running)
        for request, most, parent in zip(batch, room, parents or [None] * len(batch)):
            self._begin(request, min(request.sampling.max_tokens, most), parent)
        self._sample(logits, first)

    def _begin(self, request: Request, max_tokens: int, parent: Stream | None = None) -> None:
        numbers = NUM_UNIFORMS if self._speculative else 1
        before, era = (parent.ids, parent.era) if parent else ((), self._era)
        stream = Stream.start(request, max_tokens, numbers, (*before, *request.prompt_ids), era)
        if parent:
            stream.earlier_routing = [*parent.earlier_routing, *parent.routing]
        if request.prefix is not None:
            stream.go_on_from(request.prefix)
        self._running.append(stream)

    def _decode(self) -> list[Completed]:
        if self._speculative:
            self._sample_ahead(self._speculative)
            return self._retire()
        streams = self._running
        heats = [s.request.sampling.temperature for s in streams]
        longest = max(s.length for s in streams)
        uniforms, cut = [s.coming(1)[0, 0] for s in streams], cuts(streams)
        chosen, logprobs = self._decoder.step(heats, uniforms, longest, cut)
        bits = () if cut is None else self._decoder.bits(len(streams))
        fed = self._decoder.fed(len(streams))
        self._take(streams, chosen[:, None], logprobs[:, None], [1] * len(streams), fed, bits)
        return self._retire()

    def _sample(self, logits: Tensor, first: int) -> None:
        """Draw one token for running rows first.. from logits [rows, V]."""
        streams = self._running[first:]
        chosen, logprobs, bits = draw_each(streams, logits)
        self._last[first : first + len(streams)] = chosen
        self._take(streams, chosen[:, None], logprobs[:, None], [1] * len(streams), (), bits)

    def _sample_ahead(self, speculative: SpeculativeState) -> None:
        """One or two tokens for every running row."""
        streams = self._running
        routing = self._capture.routing(2 * len(streams))
        found = speculative.round(
            self._last[: len(streams)],
            temperatures(streams),
            torch.from_numpy(np.stack([s.coming(2) for s in streams])),
            torch.tensor([s.num_left > 1 for s in streams], device=self._last.device),
            routing,
        )
        counts = found.num_found.tolist()
        fed = fed_rows(routing, found.tokens.shape, counts)
        kept = self._take(streams, found.tokens, found.logprobs, counts, fed)
        self._last[: len(streams)] = speculative.settle(found, kept)

    def _take(self, streams: list[Stream], *found: Any) -> list[int]:
        """Give the streams what was `found`, as `take_each` takes it; how many tokens each one took."""
        taken = take_each(streams, self._version, *found)
        self._new += [(s, len(s.tokens) - n, n) for s, n in zip(streams, taken)]
        self._num_sampled += sum(taken)
        return taken

    def _retire(self) -> list[Completed]:
        """Take finished streams out of the running rows; hold or free them."""
        holes = [row for row, stream in enumerate(self._running) if not stream.num_left]
        over = [self._running[row] for row in holes]
        done = [stream.completed(self._capture.stored(stream.routing)) for stream in over]
        if holes:
            self._close_rows(holes)
        return done

    def _close_rows(self, holes: list[int]) -> None:
        """Park or drop the streams in rows `holes` (ascending), then close the gaps from the back."""
        held = [row for row in holes if self._running[row].request.hold]
        self._parked.hold(held, [self._running[row] for row in held])
        self._uids -= {self._running[row].request.uid for row in holes if not self._running[row].request.hold}
        movers, targets = moves_into(holes, len(self._running))
        for row in holes:
            self._state.free(row)
        self._state.move(movers, targets)
        self._last[targets] = self._last[movers]
        for source, target in zip(movers, targets):
            self._running[target] = self._running[source]
        del self._running[len(self._running) - len(holes) :]
