"""What each rank is doing, where the one that watches can see it: who waits, and for whom.

A row a rank: calls begun, what it does now, since when (CLOCK_MONOTONIC of the rank's machine). Calls follow
each other in the same order on all ranks, so who has begun fewer is late. The rows lie in shared memory where
all ranks are on this machine, else in the store at which they meet.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from consilience.model.ranks import BROKE, HAS, WAITS, WAITS_FOR_FIRST, WAITS_FOR_WORK, WORKS

_ROW = struct.Struct("ddd")
_STATES = (HAS, WAITS, WAITS_FOR_FIRST, BROKE, WORKS, WAITS_FOR_WORK)
_BEGINS = (WAITS, WAITS_FOR_FIRST, WAITS_FOR_WORK, WORKS)


@dataclass(frozen=True)
class Row:
    """calls it has begun, `state` (what `Ranks.on_call` is told), and since when."""

    calls: int
    state: str
    since: float


class Rows(Protocol):
    """Where the bytes of the rows are."""

    def read(self, rank: int) -> bytes: ...

    def write(self, rank: int, row: bytes) -> None: ...

    def close(self) -> None: ...


class PageRows:
    """Rows in the file at `path`, which whoever comes first makes."""

    def __init__(self, path: Path, size: int) -> None:
        with path.open("a+b") as file:
            file.truncate(size * _ROW.size)
            self._map = mmap.mmap(file.fileno(), size * _ROW.size)

    def read(self, rank: int) -> bytes:
        return self._map[rank * _ROW.size : (rank + 1) * _ROW.size]

    def write(self, rank: int, row: bytes) -> None:
        self._map[rank * _ROW.size : (rank + 1) * _ROW.size] = row

    def close(self) -> None:
        self._map.close()


class StoreRows:
    """Rows in a `TCPStore`: a connection of this process's own, in which nobody else waits."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def read(self, rank: int) -> bytes:
        return self._store.get(f"row/{rank}") if self._store.check([f"row/{rank}"]) else bytes(_ROW.size)

    def write(self, rank: int, row: bytes) -> None:
        self._store.set(f"row/{rank}", row)

    def close(self) -> None:
        """It goes with the store."""


class Board:
    """`size` rows."""

    def __init__(self, rows: Rows, size: int) -> None:
        self.size, self._rows = size, rows

    def row(self, rank: int) -> Row:
        calls, state, since = _ROW.unpack(self._rows.read(rank))
        return Row(int(calls), _STATES[int(state)], since)

    def writer(self, rank: int) -> Callable[[str], None]:
        """What `Ranks.on_call` of this rank is to be."""
        calls = self.row(rank).calls

        def note(state: str) -> None:
            nonlocal calls
            calls += state in _BEGINS
            self._rows.write(rank, _ROW.pack(calls, _STATES.index(state), time.monotonic()))

        return note

    def late(self) -> tuple[int, list[int]] | None:
        """(the call that ranks wait in, the ranks that have not begun it), None where nobody waits.

        The list is empty where all are in the call. Work that the first rank does alone is not waited for,
        nor work of which ranks have unequal shares.
        """
        rows = [self.row(rank) for rank in range(self.size)]
        call = max(row.calls for row in rows)
        waiting = [row.state for row in rows if row.calls == call and row.state in _BEGINS]
        if not waiting:
            return None
        behind = [rank for rank, row in enumerate(rows) if row.calls < call]
        if behind == [0] and set(waiting) == {WAITS_FOR_FIRST}:
            return None
        if behind and set(waiting) == {WAITS_FOR_WORK}:
            return None
        return call, behind

    def close(self) -> None:
        self._rows.close()
