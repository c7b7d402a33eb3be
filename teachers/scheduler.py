"""Every sample scored by its own teacher, with at most one teacher in memory.

    for teacher in (largest queue first):
        load → score all its samples in batches, each written to the store → release
        meanwhile the next teacher's files are read

Two names of one checkpoint are one teacher. Samples whose hidden states are already stored (an earlier run
was killed, or two samples are the same) are not scored again, and a teacher with nothing left to score is
not loaded (post-training notes 7.2, step 5).
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor

from consilience.conf.errors import AdmissionError, EngineError
from consilience.teachers.heads import TeacherDigests, read_digests
from consilience.teachers.hidden_store import HiddenStore, hidden_key
from consilience.teachers.read_ahead import WarmFiles
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.teacher import Teacher


@dataclass(frozen=True)
class ScoreRequest:
    """One sample to score: token_ids [T] as the student produced them, positions [n] that have a loss.

    The state at position t predicts token t + 1, so 0 ≤ t < T − 1 for a loss position.
    """

    uid: str
    teacher: str
    token_ids: tuple[int, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class ScoreReport:
    """What one call did.

    keys         uid -> key in the store
    loads        teachers loaded, in order
    num_scored   samples scored now;  num_reused  samples whose states were stored already
    num_tokens   tokens the teachers read
    """

    keys: dict[str, str]
    loads: tuple[str, ...]
    num_scored: int
    num_reused: int
    num_tokens: int


class TeacherScheduler:
    """Scores requests teacher by teacher.

    `loader` builds a teacher from its record and keeps no reference to it. `batch_tokens` bounds the tokens
    of one scored and stored batch (a longer single sample is a batch of its own). `digests` reads a
    teacher's digests, and the type of its states, without loading it.
    """

    def __init__(
        self,
        registry: TeacherRegistry,
        loader: Callable[[TeacherRecord], Teacher],
        store: HiddenStore,
        *,
        batch_tokens: int = 8192,
        digests: Callable[[TeacherRecord], TeacherDigests] = read_digests,
    ) -> None:
        self._registry, self._loader, self._store = registry, loader, store
        self._batch_tokens, self._read_digests = batch_tokens, digests
        self._digests: dict[str, TeacherDigests] = {}
        self._resident: weakref.ref[Teacher] | None = None

    def score(self, requests: Sequence[ScoreRequest]) -> ScoreReport:
        """Score what is not stored yet and reserve one use of every request's states.

        ConfigError: an unknown teacher. ValueError: two requests with one uid, positions outside the
        sample. AdmissionError: a loaded teacher whose digest is not its checkpoint's. EngineError: states
        of another shape, type or not finite, or a teacher still in memory when the next is due.
        What was stored before an error stays stored.
        """
        keys = self._keys(requests)
        missing: dict[TeacherDigests, tuple[str, dict[str, ScoreRequest]]] = {}
        for request in requests:
            key = keys[request.uid]
            if key not in self._store:
                digests = self._digests[request.teacher]
                missing.setdefault(digests, (request.teacher, {}))[1].setdefault(key, request)
        queues = sorted(missing.values(), key=lambda queue: (-_num_tokens(queue[1].values()), queue[0]))
        self._score_all([(self._registry.get(name), queue) for name, queue in queues])
        self._store.reserve(keys.values())
        num_scored = sum(len(queue) for _, queue in queues)
        return ScoreReport(
            keys=keys,
            loads=tuple(name for name, _ in queues),
            num_scored=num_scored,
            num_reused=len(requests) - num_scored,
            num_tokens=sum(_num_tokens(queue.values()) for _, queue in queues),
        )

    def digests(self, name: str) -> TeacherDigests:
        """Digests of a teacher, read once. ConfigError on an unknown name, CheckpointError as `digests`."""
        if name not in self._digests:
            self._digests[name] = self._read_digests(self._registry.get(name))
        return self._digests[name]

    def _score_all(self, queues: Sequence[tuple[TeacherRecord, dict[str, ScoreRequest]]]) -> None:
        """Each teacher's queue; the files of the next are read while one scores."""
        warm: WarmFiles | None = None
        try:
            for (record, queue), following in zip_longest(queues, queues[1:]):
                if warm is not None:
                    warm.finish()
                warm = None if following is None else WarmFiles(following[0].checkpoint)
                self._score_queue(record, queue)
        finally:
            if warm is not None:
                warm.stop()

    def _keys(self, requests: Sequence[ScoreRequest]) -> dict[str, str]:
        keys: dict[str, str] = {}
        for request in requests:
            if request.uid in keys:
                raise ValueError(f"two requests have the uid '{request.uid}'; uids must differ")
            if any(not 0 <= t < len(request.token_ids) for t in request.positions):
                raise ValueError(f"{request.uid}: positions outside its {len(request.token_ids)} tokens")
            digests = self.digests(request.teacher)
            keys[request.uid] = hidden_key(
                digests.weights, digests.head, request.token_ids, request.positions, digests.dtype
            )
        return keys

    def _score_queue(self, record: TeacherRecord, queue: dict[str, ScoreRequest]) -> None:
        self._check_released(record.name)
        teacher = self._loader(record)
        self._resident = weakref.ref(teacher)
        stated = self._digests[record.name]
        found = replace(stated, weights=teacher.digest, head=teacher.head_digest)
        if found != stated:
            raise AdmissionError(
                f"teacher '{record.name}': loaded digests {found}, its checkpoint states "
                f"{stated}; the folder changed during the run or is corrupt"
            )
        for keys in _batches(queue, self._batch_tokens):
            batch = [queue[key] for key in keys]
            states = teacher.score([r.token_ids for r in batch], [r.positions for r in batch])
            self._check_states(record.name, batch, states)
            self._store.put(dict(zip(keys, states, strict=True)))
        del teacher
        self._check_released(None)

    def _check_states(self, name: str, batch: Sequence[ScoreRequest], states: Sequence[Tensor]) -> None:
        dtype = self._digests[name].dtype
        if len(states) != len(batch):
            raise EngineError(f"teacher '{name}' returned {len(states)} tensors for {len(batch)} samples")
        for request, state in zip(batch, states):
            if state.dim() != 2 or state.shape[0] != len(request.positions) or state.dtype != dtype:
                raise EngineError(
                    f"teacher '{name}', {request.uid}: states {list(state.shape)} {state.dtype}; "
                    f"[{len(request.positions)}, D] {dtype} was expected"
                )
            if not torch.isfinite(state).all():
                raise EngineError(
                    f"teacher '{name}', {request.uid}: hidden states are not finite; check its checkpoint"
                )

    def _check_released(self, coming: str | None) -> None:
        """EngineError if the previous teacher still lives: two would be in memory."""
        if self._resident is None or self._resident() is None:
            return
        gc.collect()  # modules may sit in reference cycles
        resident = self._resident()
        if resident is not None:
            wanted = f"'{coming}' is due" if coming else "its queue is empty"
            raise EngineError(
                f"teacher '{resident.name}' is still in memory while {wanted}; the loader must not keep it"
            )


def _num_tokens(requests: Iterable[ScoreRequest]) -> int:
    return sum(len(request.token_ids) for request in requests)


def _batches(queue: dict[str, ScoreRequest], batch_tokens: int) -> Iterator[list[str]]:
    """Keys in order, cut so that a batch has at most `batch_tokens` tokens (one sample may have more)."""
    batch: list[str] = []
    total = 0
    for key, request in queue.items():
        size = len(request.token_ids)
        if batch and total + size > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(key)
        total += size
    if batch:
        yield batch
