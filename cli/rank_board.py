"""What each rank of this machine is doing, where the one that watches can see it: who waits, and for whom.

A file in shared memory, a row a rank: calls begun, what it does now, since when (CLOCK_MONOTONIC, one clock
for all processes). Calls follow each other in the same order on all ranks, so who has begun fewer is late.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from consilience.model.ranks import BROKE, HAS, WAITS, WAITS_FOR_FIRST

_ROW = struct.Struct("ddd")
_STATES = (HAS, WAITS, WAITS_FOR_FIRST, BROKE)


@dataclass(frozen=True)
class Row:
    """calls it has begun, `state` (what `Ranks.on_call` is told), and since when."""

    calls: int
    state: str
    since: float


class Board:
    """`size` rows in the file at `path`, which whoever comes first makes."""

    def __init__(self, path: Path, size: int) -> None:
        self.size = size
        with path.open("a+b") as file:
            file.truncate(size * _ROW.size)
            self._map = mmap.mmap(file.fileno(), size * _ROW.size)

    def row(self, rank: int) -> Row:
        calls, state, since = _ROW.unpack_from(self._map, rank * _ROW.size)
        return Row(int(calls), _STATES[int(state)], since)

    def writer(self, rank: int) -> Callable[[str], None]:
        """What `Ranks.on_call` of this rank is to be."""
        calls = self.row(rank).calls

        def note(state: str) -> None:
            nonlocal calls
            calls += state in (WAITS, WAITS_FOR_FIRST)
            _ROW.pack_into(self._map, rank * _ROW.size, calls, _STATES.index(state), time.monotonic())

        return note

    def late(self) -> tuple[int, list[int]] | None:
        """(the call that ranks wait in, the ranks that have not begun it), None where nobody waits.

        The list is empty where all are in the call. Work that the first rank does alone is not waited for.
        """
        rows = [self.row(rank) for rank in range(self.size)]
        call = max(row.calls for row in rows)
        waiting = [row.state for row in rows if row.calls == call and row.state in (WAITS, WAITS_FOR_FIRST)]
        if not waiting:
            return None
        behind = [rank for rank, row in enumerate(rows) if row.calls < call]
        if behind == [0] and set(waiting) == {WAITS_FOR_FIRST}:
            return None
        return call, behind

    def close(self) -> None:
        self._map.close()
