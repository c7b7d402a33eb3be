"""A folder of named, checksummed entries that several processes share and that never outgrows its budget.

What an engine keeps of prefixes it has computed (report 3.5): names come from content, so two writers of one
name write the same. An entry is whole or absent: written beside, renamed. It is a cache: nothing waits for
the disk, and what a power cut or a bad disk leaves is found by its checksum, counted,
removed, and computed again.

    entry = "CSPREFIX" sha256 of (name, payload) [32 bytes], payload = safetensors

Times of modification say who was used last. Whoever takes the budget's last room removes the oldest entries,
one process at a time; a process looks when it has written a sixteenth of the budget at the latest, so several
writers together exceed it by a sixteenth each at most, for so long.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

MAGIC = b"CSPREFIX"
HEAD_BYTES = len(MAGIC) + hashlib.sha256().digest_size
ABANDONED_S = 600.0  # an unfinished file older than this belongs to a dead process


class PrefixStore:
    """num_corrupted, num_evicted, num_failed: entries found damaged, removed for room, not written (disk)."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.num_corrupted = self.num_evicted = self.num_failed = 0
        self._counter = itertools.count()
        folder.mkdir(parents=True, exist_ok=True)
        self._found_bytes, self._written_bytes = 0, 0  # at the last look, and since by this process
        self._make_room()

    def has(self, name: str) -> bool:
        return self._path(name).exists()

    def read(self, name: str) -> dict[str, Tensor] | None:
        """The entry's tensors, on the CPU; None where there is none, or a damaged one, which is removed."""
        path = self._path(name)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        payload = memoryview(data)[HEAD_BYTES:]
        if data[:HEAD_BYTES] == _head(name, payload):
            # What fails here was not written by this class, though by somebody who knows its checksum.
            with contextlib.suppress(SafetensorError, ValueError):
                return load(bytes(payload))
        self.num_corrupted += 1
        path.unlink(missing_ok=True)
        return None

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> bool:
        """Store an entry, unless it is there; whether it is there now. A full disk is counted, not raised."""
        path = self._path(name)
        if path.exists():
            return True
        payload = save({key: tensor.to("cpu").contiguous() for key, tensor in tensors.items()})
        beside = path.with_name(f".{os.getpid()}-{next(self._counter)}-{time.time_ns()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            with open(beside, "wb") as file:
                file.write(_head(name, memoryview(payload)))
                file.write(payload)
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            self.num_failed += 1
            return False
        self._written_bytes += HEAD_BYTES + len(payload)
        is_full = self._found_bytes + self._written_bytes > self.limit_bytes
        if is_full or self._written_bytes > self.limit_bytes // 16:
            self._make_room()
        return path.exists()

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def touch(self, names: Sequence[str]) -> None:
        """These were used now, the first of them last: without a prefix's first block no other is found."""
        now = time.time_ns()
        for older, name in enumerate(names):
            try:
                os.utime(self._path(name), ns=(now - older, now - older))
            except OSError:
                continue  # another process made room

    def num_bytes(self) -> int:
        return sum(size for _, size, _ in self._entries())

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every entry; what dead processes left unfinished is removed."""
        for folder in self.folder.iterdir():
            for file in os.scandir(folder) if folder.is_dir() else ():
                try:
                    status = file.stat()
                    if not file.name.startswith("."):
                        yield status.st_mtime_ns, status.st_size, Path(file.path)
                    elif time.time() - status.st_mtime > ABANDONED_S:
                        os.unlink(file.path)
                except FileNotFoundError:
                    continue

    def _make_room(self) -> None:
        """Remove the entries that were used longest ago, down to seven eighths of an exceeded budget."""
        with open(self.folder / "lock", "wb") as lock:  # held by this process's life, whatever ends it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # somebody else does it
            entries = sorted(self._entries(), key=lambda entry: entry[0])
            total = sum(size for _, size, _ in entries)
            if total > self.limit_bytes:
                for _, size, path in entries:
                    if total <= self.limit_bytes - self.limit_bytes // 8:
                        break
                    path.unlink(missing_ok=True)
                    self.num_evicted += 1
                    total -= size
        self._found_bytes, self._written_bytes = total, 0


def _head(name: str, payload: memoryview) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(payload)
    return MAGIC + digest.digest()
