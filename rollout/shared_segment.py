"""Weights in shared memory that a trainer writes once and the workers of its host map.

A segment is an anonymous file in memory (`memfd_create`): the pages of POSIX shared memory without a name.
A worker opens it through `/proc/<pid>/fd/<fd>` of its publisher, which is possible for processes of one user
and one process namespace. Nothing can be left behind: the kernel frees the pages when the last process that
holds or maps them has ended, however it ended. The size of /dev/shm, 64 MiB in many containers, is no limit.

A finished segment is sealed: neither side can change, shrink or grow it any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.rollout.publishing import Publication
from consilience.rollout.weight_bytes import ALIGNMENT, check_fits, flat_bytes, places, tensors_in

_MARK_BYTES = ALIGNMENT  # in front of the tensors: says whose segment it is
_CHUNK = 1 << 30  # Linux writes less than 2 GiB at once


@dataclass(frozen=True, slots=True)
class SegmentAddress:
    """Where a segment is found: process and descriptor of its publisher, a mark against reused numbers."""

    pid: int
    descriptor: int
    mark: bytes
    num_bytes: int


class SharedSegment:
    """The publisher's side: the weights of one version, held until `close` or until it is collected."""

    def __init__(self, weights: Mapping[str, Tensor], publication: Publication) -> None:
        """EngineError where there is no memory for it; WeightsRefused if the weights are not as announced."""
        those, size = places(publication)
        check_fits(weights, those)
        mark = secrets.token_bytes(_MARK_BYTES)
        descriptor = new_descriptor()
        self._close = weakref.finalize(self, _close, descriptor)
        try:
            _write(descriptor, memoryview(mark), 0)
            for place in those:
                raw = flat_bytes(weights[place.name]).to("cpu").numpy()
                _write(descriptor, raw.data, _MARK_BYTES + place.first)
            os.ftruncate(descriptor, _MARK_BYTES + size)
            seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
        except OSError as error:
            self.close()
            raise EngineError(
                f"no shared memory for {size} bytes of weights: {error.strerror}; free memory or take "
                "rollout.transport=object_store"
            ) from None
        except BaseException:
            self.close()
            raise
        self.address = SegmentAddress(os.getpid(), descriptor, mark, _MARK_BYTES + size)

    def close(self) -> None:
        """The publisher's hold ends; workers that map it keep what they mapped. Safe to call twice."""
        self._close()


def is_available() -> bool:
    """Whether this system has anonymous files in memory (Linux)."""
    return hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def new_descriptor() -> int:
    """EngineError where the system has no such memory, or no descriptor left."""
    try:
        return os.memfd_create("consilience-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise EngineError(
            f"no shared memory here ({error}); take rollout.transport=object_store"
        ) from None  # fmt: skip


def map_segment(address: SegmentAddress, publication: Publication) -> dict[str, Tensor]:
    """The tensors of a segment, mapped, not copied; a write to one changes a private copy of its page.

    The mapping lives as long as any of them. EngineError when the segment cannot be reached or is another
    one: its publisher has ended, runs on another host or as another user, or has closed it.
    """
    path = f"/proc/{address.pid}/fd/{address.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise EngineError(
            f"cannot reach the weights of process {address.pid} at {path}: {error.strerror}"
        ) from None
    try:
        if (
            os.fstat(descriptor).st_size != address.num_bytes
            or os.pread(descriptor, _MARK_BYTES, 0) != address.mark
        ):
            raise EngineError(f"{path} is no longer the segment that was published; publish again")
        mapped = mmap.mmap(descriptor, address.num_bytes, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise EngineError(f"cannot map {path}: {error.strerror}") from None
    finally:
        os.close(descriptor)
    data = torch.from_numpy(np.frombuffer(mapped, np.uint8))[_MARK_BYTES:]
    those, size = places(publication)
    if size != len(data):
        raise EngineError(f"{path} holds {len(data)} bytes of weights, announced were {size}; publish again")
    return tensors_in(data, those)


def _write(descriptor: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(descriptor, data[:_CHUNK], at)
        data, at = data[written:], at + written


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        os.close(descriptor)
