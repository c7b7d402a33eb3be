"""Every sample scored by its own teacher, with at most one teacher in memory.

    for teacher in (largest queue first):
        load → score all its samples in batches, each written to the store beside the next → release
        meanwhile the next teacher is read

Two names of one checkpoint are one teacher. Samples whose hidden states are already stored (an earlier run
was killed, or two samples are the same) are not scored again, and a teacher with nothing left to score is
not loaded (post-training notes 7.2, step 5). Several ranks share the batches out (`score_batches.py`), each
with at most one teacher in its memory; batches are cut as they are for one rank that scores them all.

A sample whose states cannot be right is not stored and named in the report: the trainer leaves it out of
the loss and its denominators. A teacher all of whose samples are so is an error.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor

from consilience.conf.errors import AdmissionError, CheckpointError, EngineError
from consilience.model.ranks import ALONE, Ranks
from consilience.teachers.heads import TeacherDigests, read_digests
from consilience.teachers.hidden_store import HiddenStore, hidden_key
from consilience.teachers.read_ahead import WarmFiles
from consilience.teachers.registry import TeacherRecord, TeacherRegistry
from consilience.teachers.score_batches import cut_batches, share_out
from consilience.teachers.store_threads import WriteBehind
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
    """What one call did, on all ranks together.

    keys         uid -> key in the store
    loads        teachers loaded, in order, by whichever ranks
    num_scored   samples scored now;  num_reused  samples whose states were stored already
    num_tokens   tokens the teachers read
    bad          uid -> what is wrong with its states; nothing is stored or reserved for it
    """

    keys: dict[str, str]
    loads: tuple[str, ...]
    num_scored: int
    num_reused: int
    num_tokens: int
    bad: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Queue:
    """All samples of a teacher by key, and the batches of them of which something is to be scored."""

    record: TeacherRecord
    samples: dict[str, ScoreRequest]
    batches: list[list[str]]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each batch."""
        return [sum(len(self.samples[key].token_ids) for key in keys) for keys in self.batches]


class TeacherLoader(Protocol):
    """Puts teachers on the device, one after the other."""

    def load(self, record: TeacherRecord) -> Teacher:
        """The teacher, to which the loader keeps no reference."""
        ...

    def announce(self, record: TeacherRecord) -> None:
        """This one is loaded next: what of that can be done while another scores may begin. Never raises."""
        ...

    def stop(self) -> None:
        """What was announced is not wanted, or not yet."""
        ...


class PlainLoader:
    """A function that builds a teacher; of what is announced the files are read, for the page cache."""

    def __init__(self, build: Callable[[TeacherRecord], Teacher]) -> None:
        self._build = build
        self._warm: WarmFiles | None = None

    def load(self, record: TeacherRecord) -> Teacher:
        return self._build(record)

    def announce(self, record: TeacherRecord) -> None:
        self.stop()
        self._warm = WarmFiles(record.checkpoint)

    def stop(self) -> None:
        if self._warm is not None:
            self._warm.stop()


class TeacherScheduler:
    """Scores requests teacher by teacher.

    `loader`, or a function that builds a teacher from its record, keeps no reference to one. `batch_tokens`
    bounds the tokens of one scored and stored batch (a longer single sample is a batch of its own).
    `digests` reads a teacher's digests, and the type and width of its states, without loading it.
    `may_load=False` is for samples whose states must all be stored already. `check` sees every distinct
    teacher when a rank first loads it, and raises where it may not teach. Of the ranks the first
    `most_scorers` score (None: all). `arithmetic` names how teachers compute where that is not by their
    weights alone; states of another are not taken for theirs.
    """

    def __init__(
        self,
        registry: TeacherRegistry,
        loader: TeacherLoader | Callable[[TeacherRecord], Teacher],
        store: HiddenStore,
        *,
        batch_tokens: int = 8192,
        digests: Callable[[TeacherRecord], TeacherDigests] = read_digests,
        may_load: bool = True,
        check: Callable[[Teacher], object] | None = None,
        most_scorers: int | None = None,
        arithmetic: str = "",
    ) -> None:
        self._registry, self._store = registry, store
        self._most_scorers, self._arithmetic = most_scorers, arithmetic
        self._loader: TeacherLoader = PlainLoader(loader) if callable(loader) else loader
        self._writer = WriteBehind(store)
        self._may_load, self._check = may_load, check
        self._checked: set[TeacherDigests] = set()
        self._batch_tokens, self._read_digests = batch_tokens, digests
        self._digests: dict[str, TeacherDigests] = {}
        self._resident: weakref.ref[Teacher] | None = None

    def score(
        self, requests: Sequence[ScoreRequest], later: Sequence[str] = (), ranks: Ranks = ALONE
    ) -> ScoreReport:
        """Score what is not stored yet and reserve one use of every request's states.

        later  keys that another call will want: what is stored of them stays while there is room
        ranks  all of them call this with the same requests, over stores in one folder, of which the first's
               alone is no reader; the report is the same on all

        ConfigError: an unknown teacher. ValueError: two requests with one uid, positions outside the
        sample. AdmissionError: a loaded teacher whose digest is not its checkpoint's. CheckpointError: a
        teacher whose folder cannot be read, or no longer. EngineError: no room in the store (before
        anything is loaded), states missing that may not be scored, a teacher none of whose states is of
        the right shape, type and finite, or one still in memory when the next is due.
        What was stored before an error stays stored.
        """
        keys = self.keys(requests)
        samples: dict[TeacherDigests, tuple[str, dict[str, ScoreRequest]]] = {}
        for request in requests:
            digests = self._digests[request.teacher]
            samples.setdefault(digests, (request.teacher, {}))[1].setdefault(keys[request.uid], request)
        missing = ranks.first(self._missing, samples, set(keys.values()), later)
        queues = self._queues(samples, missing)
        own = self._score_all(self._own_share(queues, ranks))
        faults = {key: fault for found in ranks.gather(own, is_uneven=True) for key, fault in found.items()}
        for queue in queues:
            _check_some_good(queue, faults)
        self._store.expect((key for key in keys.values() if key not in faults), later)
        return ScoreReport(
            keys=keys,
            loads=tuple(queue.record.name for queue in queues),
            num_scored=len(missing),
            num_reused=len(requests) - len(missing),
            num_tokens=sum(sum(queue.sizes) for queue in queues),
            bad={uid: faults[key] for uid, key in keys.items() if key in faults},
        )

    def _missing(
        self,
        samples: dict[TeacherDigests, tuple[str, dict[str, ScoreRequest]]],
        wanted: set[str],
        later: Sequence[str],
    ) -> set[str]:
        """Keys of what is to be scored, once there is room for it."""
        self._store.hold(later)
        missing = {d: [k for k in queue if k not in self._store] for d, (_, queue) in samples.items()}
        self._check_room(samples, missing, wanted)
        return {key for keys in missing.values() for key in keys}

    def _queues(
        self, samples: dict[TeacherDigests, tuple[str, dict[str, ScoreRequest]]], missing: set[str]
    ) -> list[_Queue]:
        """Of every teacher with something to score, the one with the most tokens first."""
        found: list[_Queue] = []
        for name, queue in samples.values():
            cut = cut_batches({key: len(r.token_ids) for key, r in queue.items()}, self._batch_tokens)
            batches = [[key for key in keys if key in missing] for keys in cut]
            if batches := [keys for keys in batches if keys]:
                found.append(_Queue(self._registry.get(name), queue, batches))
        return sorted(found, key=lambda queue: (-sum(queue.sizes), queue.record.name))

    def _own_share(self, queues: Sequence[_Queue], ranks: Ranks) -> list[_Queue]:
        """The queues with this rank's batches, of those with any."""
        num = min(ranks.size, self._most_scorers or ranks.size)
        owners = iter(share_out([size for queue in queues for size in queue.sizes], num))
        own = [
            replace(queue, batches=[keys for keys in queue.batches if next(owners) == ranks.rank])
            for queue in queues
        ]
        return [queue for queue in own if queue.batches]

    def _check_room(
        self,
        queues: dict[TeacherDigests, tuple[str, dict[str, ScoreRequest]]],
        missing: dict[TeacherDigests, list[str]],
        wanted: set[str],
    ) -> None:
        """EngineError if what is missing does not fit the store's budget, or may not be scored."""
        num_bytes = 0
        for digests, keys in missing.items():
            name, queue = queues[digests]
            if keys and not self._may_load:
                held = ", ".join(sorted(self._store.origins)) or "nothing"
                raise EngineError(
                    f"{len(keys)} of {len(queue)} samples have no stored states of "
                    f"{self._origin(name, digests)}; the store holds those of {held}. Its weights, its head "
                    "or the samples are others: score them again without distill.replay"
                )
            num_bytes += sum(len(queue[key].positions) for key in keys) * digests.state_bytes
        self._store.make_room(num_bytes, wanted)

    def digests(self, name: str) -> TeacherDigests:
        """Digests of a teacher, read once. ConfigError on an unknown name, CheckpointError as `digests`."""
        if name not in self._digests:
            record = self._registry.get(name)
            with naming(record):
                self._digests[name] = self._read_digests(record)
        return self._digests[name]

    def _score_all(self, queues: Sequence[_Queue]) -> dict[str, str]:
        """Each teacher's queue; the next teacher is read while one scores. Key -> what is wrong."""
        faults: dict[str, str] = {}
        try:
            for queue, following in zip_longest(queues, queues[1:]):
                faults |= self._score_queue(queue, None if following is None else following.record)
        finally:
            self._loader.stop()
            self._writer.finish()
        return faults

    def keys(self, requests: Sequence[ScoreRequest]) -> dict[str, str]:
        """uid -> key of its states in the store. Errors as `score`, of what it is given."""
        keys: dict[str, str] = {}
        for request in requests:
            if request.uid in keys:
                raise ValueError(f"two requests have the uid '{request.uid}'; uids must differ")
            ends = (min(request.positions), max(request.positions)) if request.positions else ()
            if any(not 0 <= t < len(request.token_ids) for t in ends):
                raise ValueError(f"{request.uid}: positions outside its {len(request.token_ids)} tokens")
            digests = self.digests(request.teacher)
            weights = " ".join(filter(None, [digests.weights, self._arithmetic]))
            keys[request.uid] = hidden_key(
                weights, digests.head, request.token_ids, request.positions, digests.dtype
            )
        return keys

    def _score_queue(self, queue: _Queue, following: TeacherRecord | None) -> dict[str, str]:
        """Score the batches of a queue; key -> what is wrong, of states that cannot be right."""
        record = queue.record
        self._check_released(record.name)
        with naming(record):
            teacher = self._loader.load(record)
        self._resident = weakref.ref(teacher)
        stated = self._digests[record.name]
        found = replace(stated, weights=teacher.digest, head=teacher.head_digest)
        if found != stated:
            raise AdmissionError(
                f"teacher '{record.name}': loaded digests {found}, its checkpoint states "
                f"{stated}; the folder changed during the run or is corrupt"
            )
        if self._check is not None and stated not in self._checked:
            self._check(teacher)
            self._checked.add(stated)
        if following is not None:
            self._loader.announce(following)
        faults: dict[str, str] = {}
        for keys in queue.batches:
            batch = [queue.samples[key] for key in keys]
            states = teacher.score([r.token_ids for r in batch], [r.positions for r in batch])
            if len(states) != len(batch):
                raise EngineError(
                    f"teacher '{record.name}' returned {len(states)} tensors for {len(batch)} samples"
                )
            wrong = self._faults(record.name, dict(zip(keys, batch)), states)
            faults |= wrong
            good = {key: state for key, state in zip(keys, states) if key not in wrong}
            self._writer.put(dict(zip(good, on_host(good.values()))), self._origin(record.name, stated))
        _check_some_good(queue, faults)
        del teacher
        self._check_released(None)
        return faults

    def _faults(
        self, name: str, requests: Mapping[str, ScoreRequest], states: Sequence[Tensor]
    ) -> dict[str, str]:
        """Key -> what is wrong with the states of a sample, of those with which something is."""
        dtype, width = self._digests[name].dtype, self._digests[name].width
        faults: dict[str, str] = {}
        fitting: dict[str, Tensor] = {}
        for (key, request), state in zip(requests.items(), states):
            num, shape = len(request.positions), list(state.shape)
            if len(shape) == 2 and shape == [num, width or shape[1]] and state.dtype == dtype:
                fitting[key] = state.isfinite().all()
                continue
            faults[key] = (
                f"teacher '{name}', {request.uid}: states {shape} {state.dtype}; "
                f"[{num}, {width or 'D'}] {dtype} was expected"
            )
        if fitting:
            for key, is_finite in zip(fitting, torch.stack(list(fitting.values())).tolist()):
                if not is_finite:
                    uid = requests[key].uid
                    faults[key] = f"teacher '{name}', {uid}: hidden states are not finite"
        return faults

    def _origin(self, name: str, digests: TeacherDigests) -> str:
        """Whose states they are, in words for messages."""
        parts = [f"weights {digests.weights[:12]}", f"head {digests.head[:12]}", str(digests.dtype)]
        return f"teacher '{name}' ({', '.join([*parts, *filter(None, [self._arithmetic])])})"

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


def on_host(states: Iterable[Tensor]) -> list[Tensor]:
    """The states in host memory; those of a GPU in pinned memory, all copied before the one wait."""
    given = [state.detach() for state in states]
    pinned = lambda s: torch.empty_like(s, device="cpu", pin_memory=True).copy_(s, non_blocking=True)
    found = [pinned(state) if state.is_cuda else state.cpu() for state in given]
    for device in {state.device for state in given if state.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return found


@contextmanager
def naming(record: TeacherRecord) -> Iterator[None]:
    """What reading a teacher's folder raises, as one CheckpointError that names the teacher."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"teacher '{record.name}' cannot be read from {record.checkpoint} ({error}); put its folder back "
            "and run again: what is scored is kept"
        ) from error


def _check_some_good(queue: _Queue, faults: Mapping[str, str]) -> None:
    """EngineError if all states of a teacher are bad."""
    wrong = [faults[key] for key in queue.samples if key in faults]
    if len(wrong) == len(queue.samples):
        raise EngineError(f"{wrong[0]}; so are all its samples: check its checkpoint")
