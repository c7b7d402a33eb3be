"""vLLM behind the `RolloutEngine` protocol: its scheduler and kernels, our records, seeds and proofs.

The engine runs in this process (of a rollout worker's Ray actor), so one `step` is one step of vLLM, requests
join and leave between two of them, and an update of the weights falls between two. vLLM is imported when an
engine is built.
"""

from __future__ import annotations

import gc
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.rollout.engine import Completed, EngineState, NewTokens, Request
from consilience.rollout.publishing import Announced, digest_of, verify
from consilience.rollout.request_check import check_request
from consilience.rollout.stream import Stream
from consilience.rollout.vllm_proof import (
    KindProof,
    Mismatch,
    Reference,
    Scores,
    changed_enough,
    compare,
    kind_proof,
    kinds_of,
    note_update,
    tensor_digests,
)
from consilience.rollout.vllm_routing import CAPTURE, CapturedRouting
from consilience.rollout.vllm_settings import seed_at, start_vllm

if TYPE_CHECKING:
    from torch import Tensor

_NO_NUMBERS = np.empty((0, 0))  # vLLM draws its own
_ASLEEP = "the engine sleeps; wake it"
_PROBE = "probe/"  # uids of our own scoring requests begin so; a job's uid begins with its stage


class VllmEngine:
    """RolloutEngine over vLLM.

    checkpoint  folder with config.json and the safetensors that vLLM starts from
    max_rows    sequences decoded at once
    max_length  tokens a sequence may reach
    probes      token sequences whose log-probabilities prove each update
    reference   log-probabilities of sequences under given weights, computed without vLLM
    max_mismatch  mean absolute difference to the reference, in nats, above which an update has failed
    export      published weights -> tensors in the checkpoint's names and types; None: they are that already
    settings    further arguments of vLLM (`vllm_settings.ALLOWED`)
    record      file that gets a JSON line an update: what was found of it, by which process
    records_routing  hand out the experts that each token visited (`Completed.routing`)
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        max_rows: int,
        max_length: int,
        probes: Sequence[Sequence[int]],
        reference: Reference,
        max_mismatch: float,
        export: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
        settings: Mapping[str, Any] | None = None,
        record: Path | None = None,
        records_routing: bool = False,
    ) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        self.captured = CapturedRouting.of(config) if records_routing else None
        given = {**(CAPTURE if records_routing else {}), **(settings or {})}
        self._llm: Any = start_vllm(checkpoint, config["architectures"][0], given, max_rows, max_length)
        self.max_rows, self.max_length = max_rows, max_length
        self._vocab_size = int(config["vocab_size"])
        self._export = export or (lambda weights: weights)
        self._layout = _shapes(checkpoint)
        self._probes = [list(map(int, probe)) for probe in probes]
        self._reference, self._max_mismatch = reference, max_mismatch
        self._reference_scores: Scores | None = None
        self.mismatches: list[Mismatch] = []
        self._record = record
        self._streams: dict[str, Stream] = {}
        self._held: dict[str, tuple[int, ...]] = {}
        self._complete: list[Stream] = []  # prefixes with nothing left to sample
        self._context: dict[str, tuple[int, ...]] = {}  # uid -> tokens before the first one it samples
        self._backlog: deque[tuple[int, list[Any]]] = deque()  # (version, outputs) of steps that a proof took
        self._version, self._digest = 0, ""
        self._new = NewTokens(0)
        self._fault = ""  # why this engine may sample nothing, ever
        self._rest = ""  # why it may sample nothing now
        self._has_weights = True
        self._counts = {"prefill_tokens": 0, "sampled_tokens": 0}
        self._seconds = 0.0

    # ---- the protocol -------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`. All or none: after an error nothing was queued.

        A continuation's prompt is the whole held stream: vLLM finds what it still caches of it.
        """
        self._check_alive()
        uids: set[str] = set()
        for request in requests:
            self._check(request, uids)
            uids.add(request.uid)
        for request in requests:
            self._start(request)

    def _check(self, request: Request, uids: set[str]) -> None:
        uid, parent = request.uid, request.parent
        if uid in self._streams or uid in self._held or uid in uids or uid.startswith(_PROBE):
            raise EngineError(f"request {uid} is already in the engine; uids are unique")
        check_request(request, self._vocab_size)
        if request.sampling.is_cut:
            raise EngineError(f"request {uid}: vLLM does not say which tokens top-k, top-p, min-p left")
        if parent is not None and parent not in self._held:
            raise EngineError(f"request {uid} continues {parent}, which is not held")
        before = 0 if parent is None else len(self._held[parent])
        length = before + len(request.prompt_ids) + (request.sampling.max_tokens if parent is None else 1)
        if length > self.max_length:
            raise EngineError(
                f"request {uid} needs {length} tokens, the engine holds {self.max_length}; "
                "raise rollout.max_length or lower max_tokens"
            )

    def _start(self, request: Request) -> None:
        from vllm import SamplingParams  # pyright: ignore
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore

        sampling = request.sampling
        before = () if request.parent is None else self._held.pop(request.parent)
        context = self._context[request.uid] = before + request.prompt_ids
        most = min(sampling.max_tokens, self.max_length - len(context))
        stream = self._streams[request.uid] = Stream(request, most, _NO_NUMBERS, context, era=0)
        if request.prefix is not None:
            stream.go_on_from(request.prefix)
            if not stream.num_left:
                self._complete.append(stream)
                return
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            max_tokens=stream.num_left,
            stop_token_ids=list(sampling.stop_ids),
            ignore_eos=True,
            seed=seed_at(sampling.seed, len(stream.tokens)),
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        prompt = [*context, *stream.tokens]
        self._counts["prefill_tokens"] += len(prompt)
        self._llm.add_request(request.uid, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[Completed]:
        """See `RolloutEngine.step`."""
        self._check_alive()
        started = time.perf_counter()
        done = [self._retire(stream) for stream in self._complete]
        self._complete.clear()
        version, outputs = self._backlog.popleft() if self._backlog else (self._version, self._llm.step())
        self._new = NewTokens(version)
        for output in outputs:
            if (finished := self._take(output, version)) is not None:
                done.append(finished)
        self._seconds += time.perf_counter() - started
        return done

    def _take(self, output: Any, version: int) -> Completed | None:
        """Note what one request sampled; its `Completed` if that was all."""
        stream = self._streams[output.request_id]
        (turn,) = output.outputs
        tokens = [int(token) for token in turn.token_ids]
        logprobs = [float(np.float32(at[token].logprob)) for token, at in zip(tokens, turn.logprobs or [])]
        if len(logprobs) != len(tokens):
            raise EngineError(f"vLLM gave {len(tokens)} tokens and {len(logprobs)} log-probabilities")
        position = len(stream.tokens)
        taken = stream.take(tokens, logprobs, version)
        for token, logprob in zip(tokens[:taken], logprobs):
            self._new.add(output.request_id, position, token, logprob)
            position += 1
        self._counts["sampled_tokens"] += taken
        if output.finished == (not stream.num_left) and taken == len(tokens):
            return self._retire(stream, turn) if output.finished else None
        raise EngineError(
            f"vLLM ended request {output.request_id} as {turn.finish_reason!r} after {len(stream.tokens)} "
            f"tokens, {stream.num_left} were left; restart the worker, which goes on from the log"
        )

    def _retire(self, stream: Stream, turn: Any = None) -> Completed:
        """turn: what vLLM said last of it; None for a complete prefix, which nobody fed."""
        request = stream.request
        del self._streams[request.uid]
        context, routing = self._context.pop(request.uid), None
        if self.captured is not None and turn is not None:
            experts, held = getattr(turn, "routed_experts", None), len(context) - len(request.prompt_ids)
            routing = self.captured.record(request.uid, experts, stream.length, held)
        if request.hold:
            self._held[request.uid] = (*context, *stream.tokens)
        return stream.completed(routing)

    def new_tokens(self) -> NewTokens:
        """See `RolloutEngine.new_tokens`."""
        return self._new

    def release(self, uids: Sequence[str]) -> None:
        """See `RolloutEngine.release`."""
        for uid in uids:
            self._held.pop(uid, None)

    def clear(self) -> tuple[list[Request], list[str]]:
        """See `RolloutEngine.clear`."""
        streams, held = list(self._streams.values()), list(self._held)
        self._check_alive()
        self._llm.abort_request([stream.request.uid for stream in streams])
        for those in (self._streams, self._held, self._context, self._complete):
            those.clear()
        return [stream.as_request() if stream.tokens else stream.request for stream in streams], held

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None:
        """See `RolloutEngine.publish`. Running streams are prefilled again: one state, one version.

        The update is proven: probes are scored and held against the reference under these weights.
        EngineError when it did not arrive as a whole; the engine then samples nothing more.
        """
        if self._fault:
            raise EngineError(self._fault)
        verify(weights, announced)
        self._load(weights)
        self._version, self._digest = version, digest_of(announced)
        self._has_weights, self._rest = True, ""
        scores = self._reference(weights, self._probes)
        mismatch = compare(version, self.score(self._probes), scores, self._reference_scores)
        self._reference_scores = scores
        self.mismatches.append(mismatch)
        if self._record is not None:
            note_update(self._record, mismatch, self._digest)
        if not mismatch.mean <= self._max_mismatch:
            self._fault = (
                f"after the update to version {version} log-probabilities are {mismatch.mean:.3g} nats "
                f"off on average ({mismatch.largest:.3g} at most), {self._max_mismatch:g} are allowed; "
                "weights did not arrive, or this vLLM computes another model; take rollout.engine=native"
            )
            raise EngineError(self._fault)

    def state(self) -> EngineState:
        started = sum(1 for stream in self._streams.values() if stream.tokens)
        return EngineState(
            weight_version=self._version,
            digest=self._digest,
            num_waiting=len(self._streams) - started,
            num_running=started,
            num_held=len(self._held),
            prefill_tokens=self._counts["prefill_tokens"],
            sampled_tokens=self._counts["sampled_tokens"],
            prefill_s=0.0,
            decode_s=self._seconds,
        )

    # ---- weights ------------------------------------------------------------------------------

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        """Export, check against the checkpoint's own list, send, and forget states of the old weights."""
        tensors = self._export(weights)
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != self._layout:
            wrong = sorted(n for n in {*found, *self._layout} if found.get(n) != self._layout.get(n))
            raise WeightsRefused(
                f"{len(wrong)} of {len(self._layout)} tensors are missing, unknown or of another shape, "
                f"{wrong[0]} the first; vLLM would take a part without a word, so the old weights stay"
            )
        try:
            self._llm.collective_rpc("receive_weights", args=(tensors, tensor_digests(tensors)))
        except WeightsRefused:
            raise
        except Exception as error:
            self._fault = f"an update of the weights failed half way: {error}"
            raise EngineError(self._fault) from error
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            self._fault = "vLLM kept cached states of old weights"
            raise EngineError(self._fault)

    def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Log-probability of each sequence's tokens but the first, at temperature 1, by vLLM's prefill."""
        from vllm import SamplingParams  # pyright: ignore

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        names = [f"{_PROBE}{number}" for number in range(len(sequences))]
        for name, tokens in zip(names, sequences):
            self._llm.add_request(name, {"prompt_token_ids": list(tokens)}, params)
        found: dict[str, Any] = {}
        while len(found) < len(names):
            outputs = self._llm.step()
            found |= {
                o.request_id: o.prompt_logprobs for o in outputs if o.finished and o.request_id in names
            }
            if others := [o for o in outputs if o.request_id not in names]:
                self._backlog.append((self._version, others))  # streams that run go on: `step` hands it out
        return [
            np.array([at[token].logprob for token, at in zip(tokens[1:], found[name][1:])])
            for name, tokens in zip(names, sequences)
        ]

    def prove(self, weights: Mapping[str, Tensor], kinds: Sequence[str] = ()) -> list[KindProof]:
        """Change each kind of tensor alone, load, and see whether the log-probabilities follow the reference.

        weights  those that are loaded; they are loaded again at the end
        kinds    which (`vllm_proof.kinds_of`); none: all of them
        EngineError names the kinds that vLLM did not take: a round trip of equal weights would hide it.
        EngineError too while requests run: they would sample from the changed weights.
        """
        self._check_idle("a proof changes the weights")
        before = self.score(self._probes), self._reference(weights, self._probes)
        proofs = []
        every = kinds_of(sorted(n for n, tensor in weights.items() if tensor.is_floating_point()))
        for kind, names in every.items():
            if kinds and kind not in kinds:
                continue
            other, moved = changed_enough(weights, names, self._reference, self._probes, before[1])
            self._load(other)
            after = self.score(self._probes)
            proofs.append(kind_proof(kind, (before[0], after), (before[1], moved)))
        self._load(weights)
        again = compare(self._version, self.score(self._probes), before[1], None)
        if not again.mean <= self._max_mismatch:
            self._fault = f"after the proof the weights are {again.mean:.3g} nats off on average"
            raise EngineError(self._fault)
        if stale := [proof for proof in proofs if proof.is_stale]:
            self._fault = "vLLM does not take new " + ", ".join(p.kind for p in stale)
            raise EngineError(self._fault)
        return proofs

    # ---- sleep --------------------------------------------------------------------------------

    def sleep(self, level: int = 1) -> None:
        """Give memory back between two phases: caches (0), weights to the host too (1), weights dropped (2).

        EngineError while requests run. vLLM's CPU build frees caches only, whatever the level.
        """
        self._check_idle("an engine sleeps between two phases")
        self._llm.sleep(level)
        self._rest = _ASLEEP
        self._has_weights = level < 2

    def wake(self) -> None:
        """Undo `sleep`, if it sleeps. After level 2 there are no weights: `publish` comes before a step."""
        if self._rest != _ASLEEP:  # who replaced one that died asleep is asked too
            return
        self._llm.wake_up()
        self._rest = "" if self._has_weights else "the weights were dropped at sleep; publish some"

    def close(self) -> None:
        """End vLLM's workers and free what they hold. One engine a process at a time: it has globals."""
        self._fault = "the engine is closed"
        llm, self._llm = self._llm, None
        if llm is not None:
            llm.engine_core.shutdown()  # no limit: in this process, it frees memory
        del llm
        gc.collect()

    def _check_idle(self, why: str) -> None:
        self._check_alive()
        if self._streams:
            raise EngineError(f"{len(self._streams)} requests run, and {why}; let them finish first")

    def _check_alive(self) -> None:
        if self._fault or self._rest:
            raise EngineError(self._fault or self._rest)


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, from the headers of a folder's safetensors."""
    from consilience.model.shards import read_folder

    return {name: tuple(stored.shape) for name, stored in read_folder(checkpoint).items()}
