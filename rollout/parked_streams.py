"""Streams that wait, for a tool or for their turn, in the rows of a decode state behind the running ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from consilience.rollout.stream import Stream


class _Rows(Protocol):
    """Rows of a decode state, or of one that drafts."""

    def move(self, source: list[int], target: list[int]) -> None: ...

    def fork(self, source: list[int], target: list[int]) -> None: ...

    def free(self, row: int) -> None: ...


class ParkedStreams:
    """held: finished turns by uid; a continuation claims one, a fork copies one.

    Each has a slot of the state and its stream, whose last token the state has not consumed.
    """

    def __init__(self, rows: _Rows, slots: Sequence[int]) -> None:
        self._rows = rows
        self._free = list(slots)
        self.held: dict[str, tuple[int, Stream]] = {}
        self._claimed: dict[str, tuple[int, Stream]] = {}  # by the uid of the continuation, which waits

    def __len__(self) -> int:
        return len(self.held) + len(self._claimed)

    def __iter__(self) -> Iterator[tuple[int, Stream]]:
        yield from self.held.values()
        yield from self._claimed.values()

    def hold(self, rows: list[int], streams: list[Stream]) -> None:
        """Finished turns leave the rows they ran in; those are empty then."""
        slots = [self._free.pop() for _ in rows]
        self._rows.move(rows, slots)
        self.held |= {stream.request.uid: (slot, stream) for slot, stream in zip(slots, streams)}

    def claim(self, parent: str, uid: str) -> None:
        """The held stream `parent` is what `uid` will continue."""
        self._claimed[uid] = self.held.pop(parent)

    def fork(self, row: int, stream: Stream, uids: Sequence[str]) -> None:
        """A copy of `row`, where `stream` stands, for each of `uids` to continue."""
        slots = [self._free.pop() for _ in uids]
        self._rows.fork([row] * len(slots), slots)
        self._claimed |= {uid: (slot, stream) for uid, slot in zip(uids, slots)}

    def resume(self, uids: Sequence[str], first: int) -> None:
        """What `uids` claimed moves to rows first.."""
        slots = [self._claimed.pop(uid)[0] for uid in uids]
        self._rows.move(slots, list(range(first, first + len(slots))))
        self._free += slots

    def stream_of(self, uid: str) -> Stream:
        """The stream that `uid` claimed."""
        return self._claimed[uid][1]

    def release(self, uid: str) -> None:
        """Drop a held stream."""
        slot, _ = self.held.pop(uid)
        self._rows.free(slot)
        self._free.append(slot)

    def clear(self) -> list[str]:
        """Drop every stream; uids of those that were held."""
        uids, slots = list(self.held), [slot for slot, _ in self]
        for slot in slots:
            self._rows.free(slot)
        self._free += slots
        self.held.clear()
        self._claimed.clear()
        return uids


def moves_into(holes: Sequence[int], num_rows: int) -> tuple[list[int], list[int]]:
    """Rows from the back of `num_rows` and the holes (ascending) that they fill, so that no gap is left."""
    remaining, gone = num_rows - len(holes), set(holes)
    movers = [row for row in range(remaining, num_rows) if row not in gone]
    return movers, [row for row in holes if row < remaining]
