"""The native decoding engine: batched sampling on V4's heterogeneous decode state.

Running streams fill the front rows of the state, so a step works on a view without copying. Streams
that wait for a tool are parked in the rows behind, the last of which keeps the longest prefix that a
batch of prompts shares. Compressed entries lie in blocks and never move.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError, EngineError, WeightsRefused
from consilience.model.checkpoint import load_official
from consilience.model.exact import exact_mode
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.admission import one_prefill
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.engine import Completed, EngineState, NewTokens, Request
from consilience.rollout.proof import Evidence, model_evidence
from consilience.rollout.publishing import Announced, digest_of, verify
from consilience.rollout.request_check import check_request
from consilience.rollout.sampling import sample
from consilience.rollout.speculative import NUM_UNIFORMS, SpeculativeState
from consilience.rollout.stream import Stream, temperatures

MIN_SHARED_PREFIX = 32  # tokens; below this a fork costs more than it saves


class NativeEngine:
    """RolloutEngine over a `Transformer`.

    max_rows   sequences held at once, running and waiting for tools together
    max_length tokens a sequence may reach
    prefill_tokens  padded tokens of one prefill call
    speculative  the model's MTP block drafts: fewer steps, the same distribution, other tokens for a seed
    exact      decode in exact mode: the trainer's log-probabilities, to the last bit (`model/exact.py`)
    captures   on a GPU in bf16, capture decoding steps in CUDA graphs (`captured_decode.py`)
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
    ) -> None:
        self.model = model.eval()
        self.exact = exact
        self.max_rows, self.max_length = max_rows, max_length
        self.prefill_tokens = prefill_tokens
        weight = model.head.weight
        self._prefix_slot = 2 * max_rows
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
        self._prefix: tuple[int, ...] = ()
        self._running: list[Stream] = []
        state = self._state.trunk if isinstance(self._state, SpeculativeState) else self._state
        self._decoder = Decoder(model, state, max_rows, max_length, captures)
        self._last = self._decoder.tokens  # [max_rows] sampled, not yet fed
        self._held: dict[str, tuple[int, int]] = {}  # uid -> (slot, last token, not yet fed)
        self._resuming: dict[str, tuple[int, int]] = {}  # uid of a waiting continuation -> the same
        self._free_slots = list(range(max_rows, 2 * max_rows))
        self._waiting: deque[Request] = deque()
        self._uids: set[str] = set()
        self._version, self._digest = version, ""
        self._new: list[tuple[Stream, int, int]] = []  # of this step: stream, tokens before, tokens
        self._counts = {"prefill_tokens": 0, "sampled_tokens": 0}
        self._seconds = {"prefill_s": 0.0, "decode_s": 0.0}

    # ---- the protocol -------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`. All or none: after an error nothing was queued.

        A fresh request must fit with all its `max_tokens`; a continuation samples as far as its
        stream has room, at least one token, and then ends with "length".
        """
        uids: set[str] = set()
        parents: set[str] = set()
        for request in requests:
            self._check(request, uids, parents)
            uids.add(request.uid)
            if request.parent is not None:
                parents.add(request.parent)
        self._uids |= uids
        for request in requests:
            # Continuations first: they free held rows, which new prompts may be waiting for.
            if request.parent is not None:
                self._resuming[request.uid] = self._held.pop(request.parent)
                self._uids.discard(request.parent)
                self._waiting.appendleft(request)
            else:
                self._waiting.append(request)

    def _check(self, request: Request, uids: set[str], parents: set[str]) -> None:
        """EngineError unless the request can run; `uids`, `parents` are those of the same submission."""
        uid, prompt, sampling, parent = request.uid, request.prompt_ids, request.sampling, request.parent
        if uid in self._uids or uid in uids:
            raise EngineError(f"request {uid} is already in the engine; uids are unique")
        check_request(request, self.model.config.vocab_size)
        if parent is not None and (parent not in self._held or parent in parents):
            raise EngineError(f"request {uid} continues {parent}, which is not held")
        before = 0 if parent is None else self._length_held(self._held[parent])
        length = before + len(prompt) + (sampling.max_tokens if parent is None else 1)
        if length > self.max_length:
            raise EngineError(
                f"request {uid} needs {length} tokens, the engine holds {self.max_length}; "
                "raise rollout.max_length or lower max_tokens"
            )

    def _length_held(self, held: tuple[int, int]) -> int:
        """Tokens of a held stream: those its state has consumed and the last one, not yet fed."""
        return int(self._state.position[held[0]]) + 1

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
        new = NewTokens(self._version)
        for stream, before, count in self._new:
            for at in range(before, before + count):
                new.add(stream.request.uid, at, stream.tokens[at], stream.logprobs[at])
        return new

    def release(self, uids: Sequence[str]) -> None:
        """See `RolloutEngine.release`."""
        for uid in uids:
            if uid in self._held:
                slot, _ = self._held.pop(uid)
                self._state.free(slot)
                self._free_slots.append(slot)
                self._uids.discard(uid)

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutEngine.publish`. Running streams go on with the new weights and the old state."""
        verify(weights, announced)
        try:
            load_official(self.model, weights)
        except CheckpointError as error:
            raise WeightsRefused(f"weights that do not fit the model, the old ones stay: {error}") from None
        self._decoder.forget()
        self._version, self._digest, self._prefix = version, digest_of(announced), ()

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
        """See `proof.py`. Running streams do not notice."""
        return model_evidence(self.model, prompts, exact)

    def state(self) -> EngineState:
        return EngineState(
            weight_version=self._version,
            digest=self._digest,
            num_waiting=len(self._waiting),
            num_running=len(self._running),
            num_held=len(self._held) + len(self._resuming),
            prefill_tokens=self._counts["prefill_tokens"],
            sampled_tokens=self._counts["sampled_tokens"],
            **self._seconds,
            drafted_tokens=self._speculative.drafted if self._speculative else 0,
            accepted_tokens=self._speculative.accepted if self._speculative else 0,
        )

    # ---- admission ----------------------------------------------------------------------------

    @property
    def _num_free(self) -> int:
        return self.max_rows - len(self._running) - len(self._held) - len(self._resuming)

    def _admit(self) -> list[Completed]:
        """Prefill waiting requests into free rows; what finished with its very first token."""
        done: list[Completed] = []
        while self._waiting and (self._waiting[0].parent is not None or self._num_free > 0):
            resumed = [r for r in self._waiting if r.parent is not None]
            if resumed:
                batch = self._choose(resumed)
                self._prefill_resumed(batch)
            elif self._waiting[0].prefix is not None:
                begun = [r for r in list(self._waiting)[: self._num_free] if r.prefix is not None]
                self._prefill_begun(self._choose(begun))
            else:
                fresh = [r for r in list(self._waiting)[: self._num_free] if r.prefix is None]
                self._prefill_new(self._choose(fresh))
            done += self._retire()
        return done

    def _choose(self, candidates: list[Request]) -> list[Request]:
        """Those of the candidates that go first; they wait no longer."""
        chosen = one_prefill(candidates, self.prefill_tokens)
        taken = {r.uid for r in chosen}
        self._waiting = deque(r for r in self._waiting if r.uid not in taken)
        return chosen

    def _prefill_resumed(self, batch: list[Request]) -> None:
        first = len(self._running)
        parked = [self._resuming.pop(r.uid) for r in batch]
        slots = [slot for slot, _ in parked]
        room = [self.max_length - self._length_held(p) - len(r.prompt_ids) for r, p in zip(batch, parked)]
        self._state.move(slots, list(range(first, first + len(batch))))
        self._free_slots += slots
        for row, (request, rest) in enumerate(zip(batch, room), first):
            most = len(request.prompt_ids) + min(request.sampling.max_tokens, rest)
            self._state.reserve(row, int(self._state.position[row]) + 1 + most)
        logits = self._extend(first, [(last, *r.prompt_ids) for r, (_, last) in zip(batch, parked)])
        self._start(batch, logits, room)

    def _prefill_begun(self, batch: list[Request]) -> None:
        """Compute again the state of requests that had sampled something: all but the last token is fed."""
        first = len(self._running)
        self._reserve(first, batch)
        streams = [(*r.prompt_ids, *r.prefix.token_ids) for r in batch]  # type: ignore[union-attr]
        self._extend(first, [stream[:-1] for stream in streams])
        last = torch.tensor([stream[-1] for stream in streams], device=self._last.device)
        self._last[first : first + len(batch)] = last
        for request in batch:
            self._begin(request, request.sampling.max_tokens, len(request.prompt_ids))
            self._running[-1].go_on_from(request.prefix)  # type: ignore[arg-type]

    def _prefill_new(self, batch: list[Request]) -> None:
        """Prefill one row per distinct prompt, then fork it for the rest of its group."""
        first = len(self._running)
        leaders: dict[tuple, int] = {}
        owner = []
        for request in batch:
            key = (request.group, request.prompt_ids) if request.group is not None else (request.uid,)
            owner.append(leaders.setdefault(key, len(leaders)))
        order = sorted(range(len(batch)), key=lambda i: (owner[i], i))
        is_leader = [i for n, i in enumerate(order) if n == 0 or owner[i] != owner[order[n - 1]]]
        followers = [i for i in order if i not in set(is_leader)]
        prompts = [batch[i].prompt_ids for i in is_leader]
        shared = self._shared_prefix(prompts)
        everyone = [batch[i] for i in is_leader + followers]
        if shared:
            rows = list(range(first, first + len(prompts)))
            self._state.fork([self._prefix_slot] * len(prompts), rows)
        self._reserve(first, everyone[: len(prompts)])
        logits = self._extend(first, [p[shared:] for p in prompts])
        sources, behind = [first + owner[i] for i in followers], first + len(prompts)
        self._state.fork(sources, list(range(behind, first + len(batch))))
        self._reserve(behind, everyone[len(prompts) :])
        rows = torch.tensor([*range(len(prompts)), *(owner[i] for i in followers)], device=logits.device)
        self._start(everyone, logits[rows], [r.sampling.max_tokens for r in everyone])

    def _reserve(self, first: int, requests: list[Request]) -> None:
        """Blocks for everything that requests in rows first.. may become."""
        for row, request in enumerate(requests, first):
            self._state.reserve(row, len(request.prompt_ids) + request.sampling.max_tokens)

    def _shared_prefix(self, prompts: list[tuple[int, ...]]) -> int:
        """Length of the cached prefix all prompts share (at least one token is always left to extend)."""
        low, high = min(prompts), max(prompts)
        common = 0
        while common < min(len(low), len(high)) - 1 and low[common] == high[common]:
            common += 1
        kept = len(self._prefix)
        if kept and all(len(p) > kept and p[:kept] == self._prefix for p in prompts):
            return kept
        if common < MIN_SHARED_PREFIX or len(prompts) < 2:
            return 0
        self._prefix = ()
        self._state.free(self._prefix_slot)
        self._state.reserve(self._prefix_slot, common)
        self._extend(self._prefix_slot, [low[:common]])
        self._prefix = low[:common]
        return common

    def _extend(self, first: int, prompts: list[tuple[int, ...]]) -> Tensor:
        """Feed `prompts` to rows first.., return logits [rows, V] at each row's last token."""
        lengths = torch.tensor([len(p) for p in prompts], device=self._last.device)
        longest = int(lengths.max())
        ids = np.zeros((len(prompts), longest), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        tokens = torch.from_numpy(ids).to(self._last.device)
        if self._speculative:
            hidden = self._speculative.feed(first, tokens, lengths)
        else:
            view = self._state.view(first, first + len(prompts))
            hidden = self.model.hidden(tokens, state=view, lengths=lengths)
        self._counts["prefill_tokens"] += int(lengths.sum())
        rows = torch.arange(len(prompts), device=hidden.device)
        return self.model.head(hidden[rows, lengths - 1])

    def _start(self, batch: list[Request], logits: Tensor, room: list[int]) -> None:
        """Run `batch` from its first logits [rows, V]; `room` = tokens each row's stream can still take."""
        first = len(self._running)
        lengths = self._state.position[first : first + len(batch)].tolist()
        for request, most, length in zip(batch, room, lengths):
            self._begin(request, min(request.sampling.max_tokens, most), length)
        self._sample(logits, first)

    def _begin(self, request: Request, max_tokens: int, num_before: int) -> None:
        numbers = NUM_UNIFORMS if self._speculative else 1
        self._running.append(Stream.start(request, max_tokens, numbers, num_before))

    # ---- decoding -----------------------------------------------------------------------------

    def _decode(self) -> list[Completed]:
        if self._speculative:
            self._sample_ahead(self._speculative)
            return self._retire()
        streams = self._running
        heats = [s.request.sampling.temperature for s in streams]
        longest = max(s.length for s in streams)
        chosen, logprobs = self._decoder.step(heats, [s.coming(1)[0, 0] for s in streams], longest)
        self._take(streams, chosen[:, None], logprobs[:, None], [1] * len(streams))
        return self._retire()

    def _sample(self, logits: Tensor, first: int) -> None:
        """Draw one token for running rows first.. from logits [rows, V]."""
        streams = self._running[first:]
        uniform = torch.from_numpy(np.array([s.coming(1)[0, 0] for s in streams]))
        chosen, logprobs = sample(logits, temperatures(streams), uniform)
        self._last[first : first + len(streams)] = chosen
        self._take(streams, chosen[:, None], logprobs[:, None], [1] * len(streams))

    def _sample_ahead(self, speculative: SpeculativeState) -> None:
        """One or two tokens for every running row."""
        streams = self._running
        found = speculative.round(
            self._last[: len(streams)],
            temperatures(streams),
            torch.from_numpy(np.stack([s.coming(2) for s in streams])),
            torch.tensor([s.num_left > 1 for s in streams], device=self._last.device),
        )
        kept = self._take(streams, found.tokens, found.logprobs, found.num_found.tolist())
        self._last[: len(streams)] = speculative.settle(found, kept)

    def _take(self, streams: list[Stream], tokens: Tensor, logprobs: Tensor, counts: list[int]) -> list[int]:
        """Give stream i the first counts[i] of tokens[i]; how many each one took."""
        rows = zip(streams, tokens.tolist(), logprobs.tolist(), counts)
        taken = [s.take(ids[:n], values[:n], self._version) for s, ids, values, n in rows]
        self._new += [(s, len(s.tokens) - n, n) for s, n in zip(streams, taken)]
        self._counts["sampled_tokens"] += sum(taken)
        return taken

    def _retire(self) -> list[Completed]:
        """Take finished streams out of the running rows; hold or free them."""
        done: list[Completed] = []
        holes: list[int] = []
        for row, stream in enumerate(self._running):
            if not stream.num_left:
                holes.append(row)
                done.append(stream.completed())
        if holes:
            self._close_rows(holes)
        return done

    def _close_rows(self, holes: list[int]) -> None:
        """Park or drop the streams in rows `holes` (ascending), then close the gaps from the back."""
        held = [row for row in holes if self._running[row].request.hold]
        slots = [self._free_slots.pop() for _ in held]
        self._state.move(held, slots)
        for row, slot in zip(held, slots):
            stream = self._running[row]
            self._held[stream.request.uid] = (slot, stream.tokens[-1])
        self._uids -= {self._running[row].request.uid for row in holes if not self._running[row].request.hold}
        remaining, gone = len(self._running) - len(holes), set(holes)
        movers = [row for row in range(remaining, len(self._running)) if row not in gone]
        targets = [row for row in holes if row < remaining]
        for row in holes:
            self._state.free(row)
        self._state.move(movers, targets)
        self._last[targets] = self._last[movers]
        for source, target in zip(movers, targets):
            self._running[target] = self._running[source]
        del self._running[remaining:]
