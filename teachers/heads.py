"""Prediction heads: read from a checkpoint of any layout, at most one on the device.

Rebuilding a teacher's logits needs its head [V, D] and nothing else of the teacher. A mini-batch runs
sorted by head, so each is loaded once: loads = distinct heads, asserted and reported for every mini-batch
(post-training notes 7.1 and 7.3).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import AdmissionError, CheckpointError
from consilience.model.digest import weights_digest
from consilience.model.released_checkpoint import find_tensor
from consilience.model.shards import read_rows
from consilience.teachers.causal_folder import find_head, folder_digest, is_other_model, read_causal_head
from consilience.teachers.read_ahead import ReadAhead
from consilience.teachers.registry import TeacherRecord
from consilience.training.checkpoint import META
from consilience.training.released_weights import released_digest

HEAD, EMBEDDING = "head.weight", "embed.weight"


@dataclass(frozen=True)
class TeacherDigests:
    """Digests of all weights and of the prediction head alone, and the type that its states come in.

    width  D of its states; None: not known before they come
    """

    weights: str
    head: str
    dtype: torch.dtype = torch.float32
    width: int | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of one state; 0 while the width is not known."""
        return (self.width or 0) * self.dtype.itemsize


@dataclass(frozen=True)
class HeadLoads:
    """Of one mini-batch: distinct heads that were used, and how often one was put on the device."""

    distinct: int
    loads: int


class HeadCache:
    """At most one prediction head on the device, and the next one on its way.

        heads.begin([(math, digest), (code, digest)])  # of a mini-batch, in the order of its segments
        W = heads.take(math, digest)                   # for each segment
        heads.finish()                                 # HeadLoads(distinct, loads); releases the head

    A head is known by its digest, so two names of one checkpoint share a load; without a digest, by the
    teacher's name. On a GPU heads stay in pinned host memory, the longest unused going first when they
    exceed `host_bytes`; on a CPU the host is the device and nothing is kept. While one head is used the
    next of the announced order is read. `read` turns a record into a head on the host and is `read_head`
    of its folder unless a test or an engine has another source.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        read: Callable[[TeacherRecord], Tensor] | None = None,
        host_bytes: int = 32 << 30,
    ) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._read = read or (lambda record: read_head(record.checkpoint))
        self._host: OrderedDict[str, Tensor] = OrderedDict()
        self._host_bytes = host_bytes
        self._key: str | None = None
        self._head: Tensor | None = None
        self._ahead: tuple[str, ReadAhead[Tensor]] | None = None
        self.begin()

    def begin(self, order: Sequence[tuple[TeacherRecord, str | None]] = ()) -> None:
        """A mini-batch whose segments take these heads in this order; forgets counts and the last head."""
        self._seen: set[str] = set()
        self._loads = 0
        self._key = self._head = None
        self._coming = list(order)
        self._drop_ahead()

    def take(self, record: TeacherRecord, digest: str | None = None) -> Tensor:
        """Head [V, D] of a teacher on the device; replaces the one that was there.

        AdmissionError if what is read has another digest. CheckpointError as `read_head`.
        """
        key = digest or record.name
        self._seen.add(key)
        while self._coming and (self._coming[0][1] or self._coming[0][0].name) == key:
            self._coming.pop(0)
        if self._head is None or self._key != key:
            self._key = self._head = None  # released before the next is on the device: never two
            self._head = self._from_host(record, digest).to(self._device, self._dtype, non_blocking=True)
            self._key = key
            self._loads += 1
            self._read_next()
        return self._head

    def finish(self) -> HeadLoads:
        """Counts since `begin`; the head is released."""
        counts = HeadLoads(len(self._seen), self._loads)
        self.begin()
        return counts

    def _from_host(self, record: TeacherRecord, digest: str | None) -> Tensor:
        """From host memory, from the thread that reads ahead, or read now."""
        key = digest or record.name
        if key in self._host:
            self._host.move_to_end(key)
            return self._host[key]
        if self._ahead is not None and self._ahead[0] == key:
            head = self._ahead[1].take()
            self._ahead = None
        else:
            self._drop_ahead()
            head = self._load(record, digest)
        if self._device.type != "cpu":
            self._host[key] = head
            while len(self._host) > 1 and sum(h.nbytes for h in self._host.values()) > self._host_bytes:
                self._host.popitem(last=False)
        return head

    def _read_next(self) -> None:
        """Begin to read the next head of the order, unless it is on the host."""
        if not self._coming:
            return
        record, digest = self._coming[0]
        key = digest or record.name
        if key not in self._host and (self._ahead is None or self._ahead[0] != key):
            self._ahead = key, ReadAhead(lambda: self._load(record, digest), f"head of '{record.name}'")

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead[1].drop()
            self._ahead = None

    def _load(self, record: TeacherRecord, digest: str | None) -> Tensor:
        try:
            head = self._read(record)
        except (CheckpointError, OSError) as error:
            raise CheckpointError(
                f"the head of teacher '{record.name}' cannot be read from {record.checkpoint} ({error}); put "
                "its folder back and run again"
            ) from error
        if digest is not None and (found := head_digest(head)) != digest:
            raise AdmissionError(
                f"head of teacher '{record.name}' ({record.checkpoint}) has digest {found[:12]}, its stored "
                f"states belong to {digest[:12]}; the folder changed during the run or is corrupt"
            )
        return head if self._device.type == "cpu" else head.pin_memory()


def read_head(folder: Path | str) -> Tensor:
    """The head [V, D] of a checkpoint folder in any layout that is read here, as the loaded model has it.

    Its type is that of the embedding, in which such a model computes; of another model than V4 its own.
    CheckpointError if the folder has no head or its file cannot be read; it names file and tensor.
    """
    if is_other_model(folder):
        return read_causal_head(folder)
    head, embedding = (find_tensor(Path(folder), name) for name in (HEAD, EMBEDDING))
    return read_rows(head).to(embedding.dtype)


def head_shape(folder: Path | str) -> tuple[int, ...]:
    """Shape of the head, from the header of its file alone."""
    if is_other_model(folder):
        return find_head(folder).shape
    return find_tensor(Path(folder), HEAD).shape


def head_digest(head: Tensor) -> str:
    """The weights digest of a head alone: how stored hidden states name the head they belong to."""
    return weights_digest({HEAD: head})


def read_digests(record: TeacherRecord) -> TeacherDigests:
    """Digests of a teacher without loading it. CheckpointError if its card names none.

    A folder without a card was released: all of its weights are read, a tensor at a time, to know them.
    """
    folder = Path(record.checkpoint)
    path = folder / META
    if path.is_file():
        weights = read_json(path).get("digest")
    else:
        weights = folder_digest(folder) if is_other_model(folder) else released_digest(folder)
    if not isinstance(weights, str) or not weights:
        raise CheckpointError(f"{path} names no digest; the checkpoint is incomplete, restore or retrain it")
    head = read_head(folder)
    return TeacherDigests(weights, head_digest(head), head.dtype, head.shape[1])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. CheckpointError if the file is missing, no JSON, or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); the checkpoint is incomplete, restore or retrain it"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; a JSON object is needed")
    return content
