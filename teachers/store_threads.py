"""Hidden states on their way to the store and from it, a batch at a time beside the compute.

Small batches go at once: a thread for them takes the interpreter from the compute for longer than it hides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.read_ahead import ReadAhead

SMALL_BYTES = 4 << 20


class WriteBehind:
    """Stores one teacher batch while the next is scored; nobody else changes the store until `finish`.

    What was put last is durable when `finish` returns; a kill before loses that batch at most.
    """

    def __init__(self, store: HiddenStore, small_bytes: int = SMALL_BYTES) -> None:
        self._store, self._small_bytes = store, small_bytes
        self._writing: ReadAhead[None] | None = None

    def put(self, states: Mapping[str, Tensor], origin: str = "") -> None:
        """Store these once the former are stored. Errors of the former, or of a small batch, as in `put`."""
        self.finish()
        if sum(state.nbytes for state in states.values()) <= self._small_bytes:
            self._store.put(states, origin)
            return
        self._writing = ReadAhead(lambda: self._store.put(states, origin), "hidden states")

    def finish(self) -> None:
        """Wait until all are stored, or raise what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.take()


class StatesAhead:
    """The states of a mini-batch's segments in their order, those of the next read while one is trained on.

    segments  keys of each; nobody else uses the store until the last are taken
    """

    def __init__(
        self, store: HiddenStore, segments: Sequence[Sequence[str]], small_bytes: int = SMALL_BYTES
    ) -> None:
        self._store, self._coming, self._small_bytes = store, list(segments), small_bytes
        self._next = self._read()

    def take(self) -> list[Tensor]:
        """States [n, D] of the next segment. Errors are those of `HiddenStore.take`."""
        keys, reading = self._next
        found = self._taken(keys) if reading is None else reading.take()
        self._next = self._read()
        return found

    def _read(self) -> tuple[Sequence[str], ReadAhead[list[Tensor]] | None]:
        """Keys of the next segment, and who reads it: nobody where it is small, or there is none."""
        keys = self._coming.pop(0) if self._coming else ()
        if self._store.num_bytes(keys) <= self._small_bytes:
            return keys, None
        return keys, ReadAhead(lambda: self._taken(keys), "hidden states")

    def _taken(self, keys: Sequence[str]) -> list[Tensor]:
        return [self._store.take(key) for key in keys]
