"""Hidden states on their way to the store and from it, a batch at a time beside the compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.read_ahead import ReadAhead


class WriteBehind:
    """Stores one teacher batch while the next is scored; nobody else changes the store until `finish`.

    What was put last is durable when `finish` returns; a kill before loses that batch at most.
    """

    def __init__(self, store: HiddenStore) -> None:
        self._store = store
        self._writing: ReadAhead[None] | None = None

    def put(self, states: Mapping[str, Tensor], origin: str = "") -> None:
        """Store these once the former are stored. Errors of the former, as `HiddenStore.put`."""
        self.finish()
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

    def __init__(self, store: HiddenStore, segments: Sequence[Sequence[str]]) -> None:
        self._store, self._coming = store, list(segments)
        self._next = self._read()

    def take(self) -> list[Tensor]:
        """States [n, D] of the next segment. Errors are those of `HiddenStore.take`."""
        assert self._next is not None, "all segments were taken"
        found = self._next.take()
        self._next = self._read()
        return found

    def _read(self) -> ReadAhead[list[Tensor]] | None:
        if not self._coming:
            return None
        keys = self._coming.pop(0)
        return ReadAhead(lambda: [self._store.take(key) for key in keys], "hidden states")
