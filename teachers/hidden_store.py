"""Teachers' hidden states at loss positions: on disk, checked, read by memory map, used once.

A state costs D numbers a token where logits would cost V, and it is exact: the trainer rebuilds the logits
with the teacher's head (post-training notes 7.1 to 7.3). One file a teacher batch, written beside and
renamed, so a killed run finds on restart everything that was scored before the kill, and scores nothing
twice. Entries name all they depend on; two samples with the same tokens share one.

    store.reserve(keys)      # once for each use to come
    store.put({key: states}) # for the keys that are missing
    store.take(key)          # uses one reservation up
    store.free_taken()       # after the mini-batch: entries without reservations go, with their files

Shapes: n loss positions of a sample, D teacher width.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.digest import tensor_bytes
from consilience.training.durable_files import fsync_file, fsync_folder

SUFFIX = ".safetensors"
PARTIAL = ".partial"


@dataclass(frozen=True)
class _Place:
    path: Path
    num_bytes: int


def hidden_key(
    teacher_digest: str,
    head_digest: str,
    token_ids: Sequence[int],
    positions: Sequence[int],
    dtype: torch.dtype,
) -> str:
    """sha256 over everything a sample's hidden states depend on: the name under which they are stored.

    Also covers the head's digest, so a state is never multiplied with another head than its own.
    """
    sha = hashlib.sha256(
        f"{teacher_digest} {head_digest} {dtype} {len(token_ids)} {len(positions)} ".encode()
    )
    for values in (token_ids, positions):
        sha.update(np.asarray(list(values), dtype="<i8").tobytes())
    return sha.hexdigest()


class HiddenStore:
    """The store of one run, in one folder; a folder left by a killed run is taken over as it is.

    One process writes; others may read what it wrote (`is_reader`, `expect`) as long as it keeps it, and
    remove nothing. EngineError: the disk refused a file, an entry that is missing, corrupt or was reserved
    fewer times than it is taken.
    """

    def __init__(self, folder: Path | str, *, is_reader: bool = False) -> None:
        self.folder, self._is_reader = Path(folder), is_reader
        self._places: dict[str, _Place] = {}
        self._entries: dict[Path, set[str]] = {}  # entries of a file that are still wanted
        self._reserved: Counter[str] = Counter()
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_reader:
            return
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            leftover.unlink()
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self._adopt(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Bytes of hidden states in the store, headers not counted."""
        return sum(place.num_bytes for place in self._places.values())

    def expect(self, keys: Iterable[str]) -> None:
        """(reader) What `score` did for the writer: see the files it has written since, reserve the keys."""
        for path in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._entries.keys()):
            self._adopt(path)
        self.reserve(keys)

    def reserve(self, keys: Iterable[str]) -> None:
        """Announce one use of each key; a key given twice will be taken twice."""
        self._reserved.update(keys)

    def put(self, states: Mapping[str, Tensor]) -> None:
        """Store one teacher batch, key -> [n, D], durably: when this returns, a kill loses nothing.

        Keys already stored are left as they are. EngineError if the file cannot be written; nothing of
        it is left behind then.
        """
        new = {key: value.detach().cpu().contiguous() for key, value in states.items() if key not in self}
        if not new:
            return
        name = hashlib.sha256(" ".join(sorted(new)).encode()).hexdigest()[:32]
        path, partial = self.folder / f"{name}{SUFFIX}", self.folder / f"{name}{PARTIAL}"
        checks = {key: str(_checksum(value)) for key, value in new.items()}
        try:
            # safetensors refuses tensors that share memory; entries are cut from one batch.
            save_file(
                {key: value.clone() for key, value in new.items()}, partial, {"crc32": json.dumps(checks)}
            )
            fsync_file(partial)
            partial.rename(path)
            fsync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            size = sum(value.nbytes for value in new.values())
            raise EngineError(
                f"cannot write {size} bytes of hidden states to {self.folder} ({error}); "
                "free space or move the run folder, then run again: what is stored is kept"
            ) from error
        self._register(path, {key: value.nbytes for key, value in new.items()})

    def take(self, key: str) -> Tensor:
        """States [n, D] of a key, memory-mapped and checked; uses up one reservation."""
        if self._reserved[key] < 1:
            raise EngineError(
                f"hidden states {key[:12]} were already used up; each reservation allows one take"
            )
        if key not in self._places:
            raise EngineError(
                f"hidden states {key[:12]} are not stored; score the sample before training on it"
            )
        path = self._places[key].path
        try:
            with safe_open(path, framework="pt") as file:
                states = file.get_tensor(key)
                expected = int(json.loads(file.metadata()["crc32"])[key])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            self._forget(path)
            raise EngineError(f"{path} cannot be read ({error}); {_AGAIN}") from error
        if _checksum(states) != expected:
            self._forget(path)
            raise EngineError(f"{path}: checksum of {key[:12]} differs from what was written; {_AGAIN}")
        self._reserved[key] -= 1
        return states

    def free_taken(self) -> int:
        """Drop every entry without reservations left; returns the bytes freed.

        A file goes when the last of its entries goes. Tensors taken before stay valid while held.
        """
        before = self.size_bytes
        for key in [key for key in self._places if self._reserved[key] < 1]:
            path = self._places.pop(key).path
            self._entries[path].discard(key)
            if not self._entries[path]:
                del self._entries[path]
                self._remove(path)
        self._reserved = +self._reserved
        return before - self.size_bytes

    def _adopt(self, path: Path) -> None:
        """Take over a file of an earlier run; one whose header does not read is removed (scored anew)."""
        try:
            with safe_open(path, framework="pt") as file:
                checks = json.loads(file.metadata()["crc32"])
                sizes = {key: file.get_tensor(key).nbytes for key in file.keys() if key in checks}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            self._remove(path)
            return
        self._register(path, sizes)

    def _register(self, path: Path, sizes: Mapping[str, int]) -> None:
        fresh = {key: size for key, size in sizes.items() if key not in self._places}
        self._places.update({key: _Place(path, size) for key, size in fresh.items()})
        self._entries[path] = self._entries.get(path, set()) | set(fresh)

    def _forget(self, path: Path) -> None:
        """Remove a damaged file, so that the next scoring replaces it."""
        for key in self._entries.pop(path, set()):
            self._places.pop(key, None)
        self._remove(path)

    def _remove(self, path: Path) -> None:
        if not self._is_reader:
            path.unlink(missing_ok=True)


_AGAIN = "the file was removed, run again and its samples are scored anew"


def _checksum(states: Tensor) -> int:
    return zlib.crc32(tensor_bytes(states))
