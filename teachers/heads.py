"""Prediction heads: read from a checkpoint of any layout, at most one on the device.

Rebuilding a teacher's logits needs its head [V, D] and nothing else of the teacher. A mini-batch runs
sorted by teacher, so each head in it is loaded once: loads = distinct teachers, reported for every
mini-batch (post-training notes 7.1 and 7.3).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.digest import weights_digest
from consilience.model.released_checkpoint import find_tensor
from consilience.model.shards import read_rows
from consilience.teachers.registry import TeacherRecord
from consilience.training.checkpoint import META
from consilience.training.released_weights import released_digest

HEAD, EMBEDDING = "head.weight", "embed.weight"


@dataclass(frozen=True)
class TeacherDigests:
    """Digests of all weights and of the prediction head alone, and the type that its states come in."""

    weights: str
    head: str
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class HeadLoads:
    """Of one mini-batch: distinct teachers whose head was used, and how often a head was loaded."""

    distinct: int
    loads: int


class HeadCache:
    """At most one prediction head on the device.

        heads.begin()                       # of a mini-batch: forgets counts and the head of the last one
        W = heads.take(registry.get(name))  # for each segment, in teacher order
        heads.finish()                      # HeadLoads(distinct, loads); releases the head

    `read` turns a record into a head on the host and is `read_head` of its folder unless a test or an
    engine has another source.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        read: Callable[[TeacherRecord], Tensor] | None = None,
    ) -> None:
        self._device, self._dtype = torch.device(device), dtype
        self._read = read or (lambda record: read_head(record.checkpoint))
        self._name: str | None = None
        self._head: Tensor | None = None
        self.begin()

    def begin(self) -> None:
        self._seen: set[str] = set()
        self._loads = 0
        self._name = self._head = None

    def take(self, record: TeacherRecord) -> Tensor:
        """Head [V, D] of a teacher on the device; replaces the one that was there."""
        self._seen.add(record.name)
        if self._head is None or self._name != record.name:
            self._name = self._head = None  # released before the next is read: never two
            self._head = self._read(record).to(self._device, self._dtype)
            self._name = record.name
            self._loads += 1
        return self._head

    def finish(self) -> HeadLoads:
        """Counts since `begin`; the head is released."""
        counts = HeadLoads(len(self._seen), self._loads)
        self.begin()
        return counts


def read_head(folder: Path | str) -> Tensor:
    """The head [V, D] of a checkpoint folder in any layout that `model/` reads, as the loaded model has it.

    Its type is that of the embedding, in which such a model computes. CheckpointError if the folder has no
    head or its file cannot be read; it names file and tensor.
    """
    head, embedding = (find_tensor(Path(folder), name) for name in (HEAD, EMBEDDING))
    return read_rows(head).to(embedding.dtype)


def head_shape(folder: Path | str) -> tuple[int, ...]:
    """Shape of the head, from the header of its file alone."""
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
    weights = read_json(path).get("digest") if path.is_file() else released_digest(folder)
    if not isinstance(weights, str) or not weights:
        raise CheckpointError(f"{path} names no digest; the checkpoint is incomplete, restore or retrain it")
    head = read_head(folder)
    return TeacherDigests(weights, head_digest(head), head.dtype)


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
