"""Decode states of streams whose worker was paused, on disk until somebody goes on with them.

    <folder>/xx/<sha256 of the uid>.stream   what a stream needs besides its complete blocks, what it recorded
                                             of its tokens, the key of all it has consumed
             xx/<key>.block                  entries of a complete block, which a group shares

Entries are those of a `PrefixStore`: whole or absent, checked by sha256. Nothing depends on them: a state
that is missing or damaged, of other weights, another build or other tokens is computed again. Whoever looked
at one removes it, and the folder with the last one.

n tokens fed, L layers with a learned router, K experts a token.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.prefix_state import block_of, rest_of, restore
from consilience.model.state import DecodeState
from consilience.rollout.engine import SavedStream
from consilience.rollout.kept_sets import KeptSets
from consilience.rollout.prefix_keys import PrefixKeys
from consilience.rollout.prefix_store import PrefixStore
from consilience.rollout.stream import Stream

_NO_LIMIT = 1 << 62  # the time a pause may take is the limit


@dataclass(frozen=True, slots=True)
class Found:
    """num_tokens   of the stream that its row has consumed now
    routing      chunks [n, L, K] of what was fed before, if that was recorded
    kept         ids that each sampled token was drawn from, where the distribution was cut
    """

    num_tokens: int
    routing: list[np.ndarray]
    kept: list[np.ndarray | None]

    def give_to(self, stream: Stream) -> None:
        """The stream's routing goes on behind what was recorded before; so do the sets of the same turn."""
        if stream.routing:  # this engine records
            stream.routing[:0] = self.routing
        if stream.request.prefix is not None:
            stream.kept[: len(self.kept)] = self.kept


class SavedStreams:
    """Those of one engine. num_tokens: that were taken from the disk and not computed."""

    def __init__(self, state: DecodeState, keys: PrefixKeys) -> None:
        self._state, self._keys = state, keys
        self._stores: dict[Path, PrefixStore] = {}
        self.num_tokens = 0

    def save_all(self, folder: Path, rows: Iterable[tuple[int, Stream]], limit_s: float) -> int:
        """Save these rows for `limit_s`, the longest first; how many were."""
        until, num_saved = time.monotonic() + limit_s, 0
        for row, stream in sorted(rows, key=lambda pair: -pair[1].length):
            if time.monotonic() >= until:
                break
            num_saved += self.save(folder, row, stream)
        return num_saved

    def save(self, folder: Path, row: int, stream: Stream) -> bool:
        """Store all that `row`, which has consumed all but the last token of `stream`, needs to go on; False
        where the disk did not take it."""
        ids = stream.ids[:-1]
        try:
            store = self._store(folder)
        except OSError:
            return False
        keys = self._keys.of_blocks(ids)
        entry = {f"rest.{name}": tensor for name, tensor in rest_of(self._state, row).items()} if ids else {}
        entry["key"] = torch.frombuffer(bytearray.fromhex(self._keys.of_all(ids, keys)), dtype=torch.uint8)
        entry["num_tokens"] = torch.tensor(len(ids))
        entry |= _recorded(stream)
        blocks = enumerate(f"{key}.block" for key in keys)
        are_there = [store.write(name, block_of(self._state, row, number)) for number, name in blocks]
        return all(are_there) and store.write(_name_of(stream.request.uid), entry)

    def take(self, row: int, saved: SavedStream, ids: tuple[int, ...]) -> Found | None:
        """Restore `row` to where the saved stream stood, if that consumed a beginning of `ids`; its file
        goes.

        None, and the row as it was or empty, where there is no such state.
        """
        if not saved.folder.is_dir():
            return None
        name = _name_of(saved.uid)
        try:
            store = self._store(saved.folder)
            entry = store.read(name)
            found = None if entry is None else self._restored(store, row, entry, ids)
            store.remove(name)
        except OSError:
            return None
        if not any(saved.folder.glob("*/*.stream")):
            shutil.rmtree(saved.folder, ignore_errors=True)
            self._stores.pop(saved.folder, None)
        return found

    def _store(self, folder: Path) -> PrefixStore:
        if folder not in self._stores:
            self._stores[folder] = PrefixStore(folder, _NO_LIMIT)
        return self._stores[folder]

    def _restored(
        self, store: PrefixStore, row: int, entry: dict[str, Tensor], ids: tuple[int, ...]
    ) -> Found | None:
        length = int(entry["num_tokens"])
        keys = self._keys.of_blocks(ids[:length])
        wanted = self._keys.of_all(ids[:length], keys)
        if length > len(ids) or entry["key"].numpy().tobytes().hex() != wanted:
            return None
        blocks = [store.read(f"{key}.block") for key in keys]
        there = [block for block in blocks if block is not None]
        if len(there) < len(blocks):
            return None
        rest = {key.removeprefix("rest."): tensor for key, tensor in entry.items() if key.startswith("rest.")}
        if length:
            try:
                restore(self._state, row, length, there, rest)
            except EngineError:  # made by a build that kept other things
                return None
        self.num_tokens += length
        routing = [entry["routing"].numpy()] if "routing" in entry else []
        return Found(length, routing, _kept_of(entry))


def _recorded(stream: Stream) -> dict[str, Tensor]:
    """What a stream took down of its tokens, as tensors."""
    entry: dict[str, Tensor] = {}
    if fed := [*stream.earlier_routing, *stream.routing]:
        entry["routing"] = torch.from_numpy(np.concatenate(fed))
    if stream.request.sampling.is_cut:
        kept = KeptSets.of(stream.kept)
        entry["kept.sizes"] = torch.from_numpy(kept.num_ids())
        entry["kept.ids"] = torch.from_numpy(kept.token_ids())
    return entry


def _kept_of(entry: dict[str, Tensor]) -> list[np.ndarray | None]:
    if "kept.sizes" not in entry:
        return []
    sizes: Sequence[int] = entry["kept.sizes"].tolist()
    sets = np.split(entry["kept.ids"].numpy(), np.cumsum(sizes)[:-1]) if sizes else []
    return [ids if size else None for size, ids in zip(sizes, sets)]


def _name_of(uid: str) -> str:
    return f"{hashlib.sha256(uid.encode()).hexdigest()}.stream"
