"""Prediction heads: read from a checkpoint by memory map, at most one on the device.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.digest import weights_digest
from consilience.teachers.registry import TeacherRecord

HEAD_NAME = "head.weight"
INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class TeacherDigests:
    """Digest of all weights, as the checkpoint's card states it, and of the prediction head alone."""

    weights: str
    head: str


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
    """`head.weight` [V, D] of a checkpoint folder in its stored type, memory-mapped (pages load on use)."""
    path = head_file(Path(folder))
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(HEAD_NAME)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot read {HEAD_NAME} ({error}); restore or retrain the checkpoint"
        ) from error


def head_shape(folder: Path | str) -> tuple[int, ...]:
    """Shape of `head.weight`, from the file's header alone."""
    path = head_file(Path(folder))
    try:
        with safe_open(path, framework="pt") as file:
            return tuple(file.get_slice(HEAD_NAME).get_shape())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: cannot read {HEAD_NAME} ({error}); restore or retrain the checkpoint"
        ) from error


def head_file(folder: Path) -> Path:
    """The safetensors file that holds the head: by the index, or the folder's only file.

    CheckpointError: index unreadable, no head in it, the file missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        try:
            name = json.loads(index.read_text())["weight_map"][HEAD_NAME]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{index} lists no {HEAD_NAME} ({error!r}); restore or retrain it"
            ) from error
        path = folder / name
    else:
        files = sorted(folder.glob("model*.safetensors"))
        if len(files) != 1:
            raise CheckpointError(
                f"{folder} has no {INDEX_NAME} and {len(files)} model*.safetensors files; one is needed"
            )
        path = files[0]
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, though the checkpoint's index names it; restore the folder"
        )
    return path


def head_digest(head: Tensor) -> str:
    """The weights digest of a head alone: how stored hidden states name the head they belong to."""
    return weights_digest({HEAD_NAME: head})


def read_digests(record: TeacherRecord) -> TeacherDigests:
    """Digests of a teacher without loading it. CheckpointError if its card names none."""
    path = Path(record.checkpoint) / "consilience.json"
    weights = read_json(path).get("digest")
    if not isinstance(weights, str) or not weights:
        raise CheckpointError(f"{path} names no digest; the checkpoint is incomplete, restore or retrain it")
    return TeacherDigests(weights, head_digest(read_head(record.checkpoint)))


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
