"""Teachers' hidden states at loss positions: on disk, checked, read by memory map, used once.

A state costs D numbers a token where logits would cost V, and it is exact: the trainer rebuilds the logits
with the teacher's head (post-training notes 7.1 to 7.3). One file a teacher batch, written beside and
renamed, so a killed run finds on restart everything that was scored before the kill, and scores nothing
twice. Entries name all they depend on; two samples with the same tokens share one.

    store.reserve(keys)      # once for each use to come
    store.put({key: states}) # for the keys that are missing
    store.take(key)          # uses one reservation up
    store.free_taken()       # after the mini-batch: entries without reservations go, with their files

A store that keeps what was taken serves other losses and weights on the same samples, in this stage or,
as `also`, in another: no teacher is asked again while it holds what is wanted.

Shapes: n loss positions of a sample, D teacher width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.digest import tensor_bytes
from consilience.training.durable_files import fsync_file, fsync_folder, is_disk_full

SUFFIX = ".safetensors"
PARTIAL = ".partial"
UNFINISHED = ".tmp"  # how safetensors names what it has not finished writing


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

    budget_bytes  most bytes of states it may hold at once, headers not counted; None: what the disk takes
    keeps         states stay when they were taken, for other losses and weights on the same samples
    also          folders of stores that are only read: nothing of them is changed or removed

    One process minds the folder: it makes room and removes. Others (`is_reader`) add what it has made room
    for, read what any of them wrote (`expect`) as long as that is kept, and remove nothing.
    EngineError: the disk refused a file or the folder, no room in the budget, an entry that is missing,
    corrupt or was reserved fewer times than it is taken.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        budget_bytes: int | None = None,
        keeps: bool = False,
        also: Iterable[Path | str] = (),
        is_reader: bool = False,
    ) -> None:
        self.folder, self._is_reader = Path(folder), is_reader
        self.keeps, self.budget_bytes = keeps, budget_bytes
        self._places: dict[str, _Place] = {}
        self._entries: dict[Path, set[str]] = {}  # entries of a file that are still wanted
        self._origins: dict[Path, str] = {}
        self._reserved: Counter[str] = Counter()
        self._later: tuple[str, ...] = ()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not is_reader:
                for leftover in (*self.folder.glob(f"*{PARTIAL}"), *self.folder.glob(f"{UNFINISHED}*")):
                    leftover.unlink()
                for path in sorted(self.folder.glob(f"*{SUFFIX}")):
                    self._adopt(path)
        except OSError as error:
            raise EngineError(
                f"hidden states cannot be kept in {self.folder} ({error.strerror or error}); "
                "make the run folder writable or move the run, then run again"
            ) from error
        for other in map(Path, also):
            if not other.is_dir():
                raise EngineError(f"no hidden states to read in {other}: there is no such folder")
            for path in sorted(other.glob(f"*{SUFFIX}")):
                self._adopt(path)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size_bytes(self) -> int:
        """Bytes of hidden states in its own folder, headers not counted."""
        return sum(place.num_bytes for place in self._places.values() if place.path.parent == self.folder)

    def num_bytes(self, keys: Iterable[str]) -> int:
        """Bytes of the states of these keys, of those that are stored."""
        return sum(self._places[key].num_bytes for key in keys if key in self._places)

    @property
    def origins(self) -> dict[str, int]:
        """Whose states it holds, as `put` was told -> number of entries."""
        counts: Counter[str] = Counter()
        for path, keys in self._entries.items():
            counts[self._origins[path]] += len(keys)
        return dict(counts)

    def make_room(self, num_bytes: int, wanted: Container[str] = ()) -> None:
        """EngineError unless `num_bytes` more fit the budget; to be asked before anything is computed.

        What nobody has reserved and is not `wanted` goes first (left by a killed run, or of other weights);
        then, as far as it must, what is held for later, the last of it first.
        """
        if not self.keeps and not self._has_room(num_bytes):
            idle = [key for key in self._places if self._reserved[key] < 1 and key not in wanted]
            self._free([key for key in idle if key not in set(self._later)])
            for key in reversed([key for key in self._later if key in set(idle)]):
                if not self._has_room(num_bytes):
                    self._free([key])
        self._must_have_room(num_bytes)

    def _has_room(self, num_bytes: int) -> bool:
        return self.budget_bytes is None or self.size_bytes + num_bytes <= self.budget_bytes

    def _must_have_room(self, num_bytes: int) -> None:
        if self._has_room(num_bytes):
            return
        held = self.size_bytes
        kept = "; distill.keep_states=false frees them after each mini-batch" if self.keeps and held else ""
        raise EngineError(
            f"{num_bytes} bytes of hidden states do not fit: the store may hold {self.budget_bytes} and "
            f"holds {held}{kept}; nothing was written. Raise distill.store_bytes, or sample fewer prompts "
            "a phase"
        )

    def hold(self, keys: Iterable[str]) -> None:
        """Keys that are wanted later, the soonest first: while there is room they stay without a reservation.

        Replaces what was held before.
        """
        self._later = tuple(dict.fromkeys(keys))

    def expect(self, keys: Iterable[str], later: Iterable[str] = ()) -> None:
        """See what other processes wrote or removed since; reserve one use of each key, hold `later`."""
        self.hold(later)
        # A reader does not hear which entries of a file are no longer wanted: it looks at all anew.
        gone = lambda path: (path.parent == self.folder and self._is_reader) or not path.exists()
        for path in [path for path in self._entries if gone(path)]:
            for key in self._entries.pop(path):
                self._places.pop(key, None)
        for path in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._entries.keys()):
            self._adopt(path)
        self.reserve(keys)

    def reserve(self, keys: Iterable[str]) -> None:
        """Announce one use of each key; a key given twice will be taken twice."""
        self._reserved.update(keys)

    def put(self, states: Mapping[str, Tensor], origin: str = "") -> None:
        """Store one teacher batch, key -> [n, D], durably: when this returns, a kill loses nothing.

        origin  whose states they are, in words for messages

        Keys already stored are left as they are. EngineError if the file cannot be written or goes beyond
        the budget; nothing of it is left behind then.
        """
        # What a reader knows of others' files is from the last `expect`: it writes what it was asked for.
        is_new = lambda key: self._is_reader or key not in self
        new = {key: value.detach().cpu().contiguous() for key, value in states.items() if is_new(key)}
        if not new:
            return
        if not self._is_reader:
            self._must_have_room(sum(value.nbytes for value in new.values()))
        name = hashlib.sha256(" ".join(sorted(new)).encode()).hexdigest()[:32]
        path, partial = self.folder / f"{name}{SUFFIX}", self.folder / f"{name}{PARTIAL}"
        checks = {key: str(_checksum(value)) for key, value in new.items()}
        try:
            # safetensors refuses tensors that share memory; entries are cut from one batch.
            header = {"crc32": json.dumps(checks), "origin": origin}
            save_file({key: value.clone() for key, value in new.items()}, partial, header)
            fsync_file(partial)
            partial.rename(path)
            fsync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            size = sum(value.nbytes for value in new.values())
            what = "the disk is full, free space" if is_disk_full(error) else "free space, make it writable"
            raise EngineError(
                f"cannot write {size} bytes of hidden states to {self.folder} ({error}); "
                f"{what} or move the run folder, then run again: what is stored is kept"
            ) from error
        self._origins[path] = origin
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
            advice = self._forget(path)
            raise EngineError(f"{path} cannot be read ({error}); {advice}") from error
        if _checksum(states) != expected:
            advice = self._forget(path)
            raise EngineError(f"{path}: checksum of {key[:12]} differs from what was written; {advice}")
        self._reserved[key] -= 1
        return states

    def free_taken(self) -> int:
        """Drop entries neither reserved nor held for later; returns the bytes freed: 0 in a store that keeps.

        A file goes when the last of its entries goes. Tensors taken before stay valid while held.
        """
        before = self.size_bytes
        if not self.keeps:
            later = set(self._later)
            self._free([key for key in self._places if self._reserved[key] < 1 and key not in later])
        self._reserved = +self._reserved
        return before - self.size_bytes

    def _free(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._places[key].path
            if path.parent != self.folder:
                continue
            del self._places[key]
            self._entries[path].discard(key)
            if not self._entries[path]:
                del self._entries[path]
                if self._is_own(path):
                    path.unlink(missing_ok=True)

    def _is_own(self, path: Path) -> bool:
        """Whether this store may remove it."""
        return path.parent == self.folder and not self._is_reader

    def _adopt(self, path: Path) -> None:
        """Take over a file of an earlier run; an own one whose header does not read goes (scored anew)."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata()
                checks = json.loads(header["crc32"])
                sizes = {key: file.get_tensor(key).nbytes for key in file.keys() if key in checks}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            if self._is_own(path):
                path.unlink(missing_ok=True)
            return
        self._origins[path] = header.get("origin", "")
        self._register(path, sizes)

    def _register(self, path: Path, sizes: Mapping[str, int]) -> None:
        fresh = {key: size for key, size in sizes.items() if key not in self._places}
        self._places.update({key: _Place(path, size) for key, size in fresh.items()})
        self._entries[path] = self._entries.get(path, set()) | set(fresh)

    def _forget(self, path: Path) -> str:
        """Leave a damaged file out, so that the next scoring replaces it; what to do, in words."""
        for key in self._entries.pop(path, set()):
            self._places.pop(key, None)
        if path.parent != self.folder:
            return "it belongs to another stage and is only read: remove it, or score without that store"
        if self._is_reader:
            return "the first rank removes it when it reads it; run again"
        path.unlink(missing_ok=True)
        return "the file was removed, run again and its samples are scored anew"


def _checksum(states: Tensor) -> int:
    return zlib.crc32(tensor_bytes(states))
