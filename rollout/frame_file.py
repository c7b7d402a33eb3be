"""An append-only file of checksummed frames: the one format of the token log and of the ledger.

    file   = header frame*
    header = "CSLF"  u16 format  u16 0  u64 identity  u32 crc of these 16 bytes       little endian, 20 bytes
    frame  = u32 length  u32 sequence  u32 safe  u32 crc  payload[length]             16 bytes and the payload
    crc    = CRC-32 of identity, length, sequence, safe and payload

The identity is drawn when a file is made, so a frame of another file is none here; the sequence counts from
0, so a lost or doubled frame shows; `safe` is the number of frames that were acknowledged when this one was
made, which tells a write that the disk lost from one that a crash interrupted (pages of an unfinished write
arrive in any order). CRC-32 is zlib's: the specification's CRC-32C detects the same bursts, and is not in the
standard library.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from consilience.conf.errors import EngineError

_MAGIC, _FORMAT = b"CSLF", 1
_HEADER = struct.Struct("<4sHHQ")
_CRC = struct.Struct("<I")
_FRAME = struct.Struct("<IIII")
_COVERED = struct.Struct("<QIII")  # what the checksum starts with
HEADER_BYTES = _HEADER.size + _CRC.size
FRAME_BYTES = _FRAME.size


@dataclass(frozen=True, slots=True)
class Frames:
    """What a file holds.

    payloads   of the whole frames, in order, up to the first that is not whole
    num_bytes  of the file up to there; 0 where not even the header is whole
    identity   of the file, None without a whole header
    is_torn    bytes follow that are not such a frame: what a crash leaves of the last writes
    has_hole   an acknowledged frame is missing: a later one says so, or the header is not what it was
    """

    payloads: list[bytes]
    num_bytes: int
    identity: int | None
    is_torn: bool
    has_hole: bool


def read_frames(path: Path) -> Frames:
    """The frames of a file, which somebody may be appending to. FileNotFoundError if there is none."""
    data = path.read_bytes()
    identity = _identity(data)
    if identity is None:
        return Frames([], 0, None, bool(data), any(data[HEADER_BYTES:]))
    payloads: list[bytes] = []
    at = HEADER_BYTES
    while (frame := _frame_at(data, at, identity)) is not None:
        sequence, _, payload = frame
        if sequence == len(payloads):
            payloads.append(payload)
        elif sequence > len(payloads) or payloads[sequence] != payload:
            break
        at += FRAME_BYTES + len(payload)
    has_hole = _has_hole(data, at, identity, len(payloads))
    return Frames(payloads, at, identity, at < len(data), has_hole)


class FrameFile:
    """One writer's file.

    survives_power  frames count as acknowledged after `sync`, which waits for the disk; without it, when
                    `append` returns: they then survive the end of every process, not that of the machine
    num_bytes       of the whole frames written
    """

    def __init__(self, path: Path, descriptor: int, identity: int, num_frames: int, num_bytes: int) -> None:
        self.path, self.num_bytes = path, num_bytes
        self.survives_power = True
        self._descriptor, self._identity, self._sequence = descriptor, identity, num_frames
        self._num_safe = num_frames
        self._pending = b"" if num_bytes else _header(identity)
        self._is_known = False  # whether the folder's entry is on the disk
        self._is_torn = False  # whether half a frame stands at the end

    @property
    def num_frames(self) -> int:
        """Frames appended, those found by `reopen` included."""
        return self._sequence

    @classmethod
    def create(cls, path: Path, *, survives_power: bool = True) -> FrameFile:
        """A new file. EngineError if it exists or cannot be made."""
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise EngineError(f"cannot make {path}: {error.strerror}; is it another run's?") from None
        file = cls(path, descriptor, int.from_bytes(os.urandom(8), "little"), 0, 0)
        file.survives_power = survives_power
        return file

    @classmethod
    def reopen(cls, path: Path) -> tuple[FrameFile, list[bytes]]:
        """Go on behind the whole frames of a file (a missing one is made); a torn tail is cut off.

        EngineError on a hole: frames that were there are gone, and to write behind them would hide it.
        """
        if not path.exists():
            return cls.create(path), []
        found = read_frames(path)
        if found.has_hole:
            raise EngineError(
                f"{path} is damaged behind frame {len(found.payloads)}: later frames are there, this one is "
                "not; restore the file from a copy, or move it away and start the stage again"
            )
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.ftruncate(descriptor, found.num_bytes)
        identity = found.identity if found.identity is not None else int.from_bytes(os.urandom(8), "little")
        return cls(path, descriptor, identity, len(found.payloads), found.num_bytes), found.payloads

    def append(self, payloads: Sequence[bytes]) -> None:
        """Write the payloads behind all before, with one call of the system.

        EngineError when the disk does not take them: the file then ends with its last whole frame, the
        payloads stay here, and the next `append` (of none, for that matter) tries them again first.
        """
        parts = [self._pending]
        for payload in payloads:
            head = _COVERED.pack(self._identity, len(payload), self._sequence, self._num_safe)
            crc = zlib.crc32(payload, zlib.crc32(head))
            parts += (_FRAME.pack(len(payload), self._sequence, self._num_safe, crc), payload)
            self._sequence += 1
        self._pending = b"".join(parts)
        if not payloads and self.num_bytes == 0 and self._sequence == 0:
            return  # a header alone says nothing
        self._write()

    def sync(self) -> None:
        """Everything appended is safe when this returns, as `survives_power` has it. EngineError if not."""
        if not self.survives_power:
            return
        try:
            os.fdatasync(self._descriptor)
            if not self._is_known:
                sync_folder(self.path.parent)
                self._is_known = True
        except OSError as error:
            # After a failed fsync the kernel may have dropped the pages: to try again would lie.
            raise EngineError(
                f"the disk did not take {self.path}: {error.strerror}; mend it and resume, what was "
                "acknowledged before is there"
            ) from None
        self._num_safe = self._sequence

    def close(self) -> None:
        """Safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self) -> None:
        if self._is_torn:
            raise EngineError(
                f"{self.path} ends with half a frame that the disk would not take back; resume the run: that "
                "cuts it off, nothing that was acknowledged is lost"
            )
        left = memoryview(self._pending)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            try:
                os.ftruncate(self._descriptor, self.num_bytes)
            except OSError:  # a reader drops the torn frame, and would drop all that came behind it
                self._is_torn = True
            raise EngineError(
                f"cannot write {self.path}: {error.strerror}; free space there and resume, nothing that was "
                "acknowledged is lost"
            ) from None
        self.num_bytes += len(self._pending)
        self._pending = b""
        if not self.survives_power:
            self._num_safe = self._sequence


def _header(identity: int) -> bytes:
    head = _HEADER.pack(_MAGIC, _FORMAT, 0, identity)
    return head + _CRC.pack(zlib.crc32(head))


def _identity(data: bytes) -> int | None:
    """The identity in a whole header, None without one. EngineError on a later format."""
    if len(data) < HEADER_BYTES:
        return None
    head, (crc,) = data[: _HEADER.size], _CRC.unpack_from(data, _HEADER.size)
    magic, number, _, identity = _HEADER.unpack(head)
    if magic != _MAGIC or zlib.crc32(head) != crc:
        return None
    if number != _FORMAT:
        raise EngineError(
            f"a log of format {number}, this version reads {_FORMAT}; use the one that wrote it"
        )
    return identity


def _frame_at(data: bytes, at: int, identity: int) -> tuple[int, int, bytes] | None:
    """(sequence, safe, payload) of the whole frame at byte `at`, None if there is none."""
    if at + FRAME_BYTES > len(data):
        return None
    length, sequence, safe, crc = _FRAME.unpack_from(data, at)
    if at + FRAME_BYTES + length > len(data):
        return None
    payload = data[at + FRAME_BYTES : at + FRAME_BYTES + length]
    if zlib.crc32(payload, zlib.crc32(_COVERED.pack(identity, length, sequence, safe))) != crc:
        return None
    return sequence, safe, payload


def _has_hole(data: bytes, at: int, identity: int, num_read: int) -> bool:
    """Whether a frame behind byte `at` says that more than `num_read` frames were acknowledged, or is the
    next one itself: an interrupted write would have left that at `at`, so something stands between."""
    tail = np.frombuffer(data, np.uint8, offset=at).astype(np.uint64)
    count = len(tail) - FRAME_BYTES + 1  # places where a frame may begin
    if count < 1:
        return False
    words = tail[:-3] | tail[1:-2] << 8 | tail[2:-1] << 16 | tail[3:] << 24  # u32 at every byte
    length, sequence, safe = words[:count], words[4 : 4 + count], words[8 : 8 + count]
    fits = length <= count - 1 - np.arange(count, dtype=np.uint64)
    # Almost no place is left to check.
    tells = (safe > num_read) | (sequence == num_read)
    likely = fits & tells & (safe <= sequence) & (sequence < num_read + len(tail))
    return any(_frame_at(data, at + int(i), identity) is not None for i in np.flatnonzero(likely))


def sync_folder(folder: Path) -> None:
    """What was created, renamed or removed in `folder` is so after a power cut too. OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
