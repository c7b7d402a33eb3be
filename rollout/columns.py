"""Per-token fields of long records, in files of the node: a record carries references, a reader maps them.

    <phase>.tokens/00000003-5f0a2c11.tokens    columns of the records that lease 3's owner finished, end to
                                               end, each at a multiple of 8 bytes; where, the references say

Routing and kept sets lie there as bytes. What shuffles, packs and counts needs lengths and sums, which a
reference has; the numbers are read where they are needed and go with the array. All processes of a node share
the one copy in the page cache.
"""

from __future__ import annotations

import base64
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from consilience.conf.errors import EngineError, RunError
from consilience.rollout.frame_file import sync_folder

if TYPE_CHECKING:
    from consilience.rollout.records import RolloutRecord

DTYPES = {
    "prompt_ids": "<i4",
    "token_ids": "<i4",
    "logprobs": "<f4",
    "loss_mask": "|u1",
    "weight_version": "<i4",
}
"""Per-token fields of a record and how they lie in a file; a log-probability is a number that fp32 holds."""

_ALIGNMENT = 8
_CHUNK = 1 << 16  # numbers that iteration turns into Python's at once


class Column(Sequence[Any]):
    """A per-token field in a file: a sequence of numbers, light to hold, to send and to store.

    root, name     the file is root / name; only the name is stored, so a run's folder may move
    offset, length  its first byte and its numbers;  crc CRC-32 of the bytes
    total          sum of an integer column, None of others
    """

    __slots__ = ("crc", "dtype", "length", "name", "offset", "root", "total")

    def __init__(
        self, root: Path, name: str, dtype: str, offset: int, length: int, crc: int, total: int | None
    ) -> None:
        self.root, self.name, self.dtype = root, name, dtype
        self.offset, self.length, self.crc, self.total = offset, length, crc, total

    def array(self) -> np.ndarray:
        """[length] read-only, mapped from the file, checked. RunError if that is gone or not as written."""
        path = self.root / self.name
        if not self.length:
            return np.empty(0, self.dtype)
        try:
            found = np.memmap(path, self.dtype, "r", self.offset, (self.length,))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot map {path}: {error}; its phase has to be sampled again") from None
        if zlib.crc32(found.data) != self.crc:
            raise RunError(
                f"{path} is damaged between bytes {self.offset} and {self.offset + found.nbytes}; restore it "
                "from a copy, or remove its phase and resume the stage"
            )
        return found

    def raw(self) -> bytes:
        """The column's bytes, in memory."""
        return self.array().tobytes()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        found = np.asarray(self.array())
        return found if dtype is None and not copy else np.array(found, dtype)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        found = self.array()
        for start in range(0, self.length, _CHUNK):
            yield from found[start : start + _CHUNK].tolist()

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: int | slice) -> Any:
        found = self.array()[index]
        return tuple(found.tolist()) if isinstance(index, slice) else found.item()

    def __eq__(self, other: object) -> bool:
        """Equal numbers; NaN where the other has NaN."""
        if not isinstance(other, (Column, tuple, bytes)) or len(other) != len(self):
            return False
        if isinstance(other, bytes):
            return self.raw() == other
        is_float = self.dtype == DTYPES["logprobs"]
        return np.array_equal(np.asarray(self), np.asarray(other), equal_nan=is_float)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return Column, (self.root, self.name, self.dtype, self.offset, self.length, self.crc, self.total)

    def __deepcopy__(self, memo: Any) -> Column:
        return self  # nothing in it changes

    def to_dict(self) -> dict[str, Any]:
        """JSON-plain reference; `from_dict` needs the root again."""
        return {key: getattr(self, key) for key in ("name", "dtype", "offset", "length", "crc", "total")}

    @classmethod
    def from_dict(cls, row: dict[str, Any], root: Path) -> Column:
        return cls(root, **row)


def bytes_of(data: bytes | Column) -> bytes:
    """Bytes that a record holds itself, or that it refers to."""
    return data.raw() if isinstance(data, Column) else data


def plain_bytes(data: bytes | Column) -> Any:
    """JSON-plain: base64, or the reference; `bytes_from` is its inverse."""
    return data.to_dict() if isinstance(data, Column) else base64.b64encode(data).decode("ascii")


def bytes_from(row: Any, root: Path | None) -> bytes | Column:
    return (
        Column.from_dict(row, root or Path())
        if isinstance(row, dict)
        else base64.b64decode(row, validate=True)
    )


class ColumnFile:
    """Where one owner puts the per-token fields of its finished records: its own file, made when needed."""

    def __init__(self, folder: Path, epoch: int) -> None:
        self._root, self._name = folder.parent, f"{folder.name}/{epoch:08d}-{os.urandom(4).hex()}.tokens"
        self._descriptor = -1
        self._num_bytes = 0

    def put(self, record: RolloutRecord) -> RolloutRecord:
        """The same record with references in place of its per-token fields, which are on the disk.

        EngineError when the disk does not take them.
        """
        streams = [record, *record.earlier]
        parts: list[bytes | memoryview] = []
        moved = []
        end = self._num_bytes

        def put(values: np.ndarray, dtype: str, total: int | None) -> Column:
            nonlocal end
            column = Column(self._root, self._name, dtype, end, len(values), zlib.crc32(values.data), total)
            parts.extend((values.data, bytes(-values.nbytes % _ALIGNMENT)))
            end += values.nbytes + len(parts[-1])
            return column

        def put_bytes(data: bytes | Column) -> Column:
            return put(np.frombuffer(bytes_of(data), np.uint8), "|u1", None)

        for stream in streams:
            fields: dict[str, Any] = {}
            for field, dtype in DTYPES.items():
                values = np.ascontiguousarray(np.asarray(getattr(stream, field), dtype))
                fields[field] = put(values, dtype, None if values.dtype.kind == "f" else int(values.sum()))
            if (routing := stream.routing) is not None:
                fields["routing"] = replace(routing, data=put_bytes(routing.data))
            if (kept := stream.kept) is not None:
                fields["kept"] = replace(kept, sizes=put_bytes(kept.sizes), ids=put_bytes(kept.ids))
            moved.append(replace(stream, **fields))
        self._write(parts)
        self._num_bytes = end
        return replace(moved[0], earlier=tuple(moved[1:]))

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, parts: list[bytes | memoryview]) -> None:
        path = self._root / self._name
        try:
            if self._descriptor < 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                sync_folder(path.parent)
                sync_folder(self._root)
            at = self._num_bytes  # what an attempt that failed has left behind it is written over
            for part in parts:
                left = memoryview(part).cast("B") if len(part) else memoryview(b"")
                while left:
                    written = os.pwrite(self._descriptor, left, at)
                    at, left = at + written, left[written:]
            os.fdatasync(self._descriptor)
        except OSError as error:
            raise EngineError(f"cannot write {path}: {error.strerror}; free space there and resume") from None
