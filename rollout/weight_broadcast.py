"""Weights sent by a broadcast of torch.distributed: gloo between CPUs, NCCL between GPUs.

The publisher is rank 0, worker i is rank i + 1, in a process group of their own that no other part of the
program sees (a trainer's default group stays free). Tensors travel in buckets, so small ones share a message.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from consilience.conf.errors import EngineError
from consilience.rollout.publishing import Publication
from consilience.rollout.weight_bytes import Place, buckets, check_fits, flat_bytes, places, tensors_in

BUCKET_BYTES = 64 << 20
_LOOK_S = 20e-6  # between two looks at a broadcast of NCCL; a bucket takes 200 µs and more
_WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
BACKENDS = {"gloo": "cpu", "nccl": "cuda"}


@dataclass(frozen=True, slots=True)
class GroupAddress:
    """Where a group meets, and how it talks: backend "gloo" or "nccl", size with rank 0, limit in s."""

    host: str
    port: int
    size: int
    backend: str
    timeout_s: float


class BroadcastBroken(EngineError):
    """A member of the group is gone or too slow; the weights must go another way."""


class BroadcastGroup:
    """One member of a group. Members are made at the same time: each waits for the others."""

    def __init__(self, address: GroupAddress, rank: int, store: Any = None) -> None:
        """BroadcastBroken when the group does not come together within its limit."""
        self.address, self.rank = address, rank
        limit = timedelta(seconds=address.timeout_s)
        try:
            self._store = store or TCPStore(address.host, address.port, is_master=False, timeout=limit)
            self._group = _group(self._store, rank, address.size, address.backend, limit)
        except (RuntimeError, dist.DistError) as error:
            raise BroadcastBroken(
                f"the workers' broadcast group did not form: {_first_line(error)}"
            ) from None
        self._device = torch.device(BACKENDS[address.backend])

    def send(self, weights: Mapping[str, Tensor], publication: Publication) -> None:
        """Rank 0's part of a publication. BroadcastBroken when a member is gone or too slow."""
        those, _ = places(publication)
        check_fits(weights, those)
        for bucket in buckets(those, BUCKET_BYTES):
            data = self._empty(bucket)
            for place in bucket:
                at = place.first - bucket[0].first
                data[at : at + place.num_bytes].copy_(flat_bytes(weights[place.name]))
            self.broadcast(data)

    def receive(self, publication: Publication) -> dict[str, Tensor]:
        """What rank 0 sends, on the backend's device. BroadcastBroken when rank 0 is gone or too slow."""
        found: dict[str, Tensor] = {}
        those, _ = places(publication)
        for bucket in buckets(those, BUCKET_BYTES):
            data = self._empty(bucket)
            self.broadcast(data)
            found |= tensors_in(data, bucket, bucket[0].first)
        return found

    def _empty(self, bucket: list[Place]) -> Tensor:
        num_bytes = bucket[-1].first + bucket[-1].num_bytes - bucket[0].first
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def broadcast(self, data: Tensor) -> None:
        """Rank 0's bytes into `data` [n] uint8 of every member; there when it returns. BroadcastBroken when a
        member is gone or too slow."""
        if not len(data):  # tensors without elements
            return
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        try:
            work = self._group.broadcast([data], options)
            if data.is_cuda:
                self._await_nccl(work)
            work.wait()  # no limit: gloo has its own, NCCL's is over
        except (RuntimeError, dist.DistError) as error:
            raise BroadcastBroken(f"the broadcast of the weights broke off: {_first_line(error)}") from None

    def _await_nccl(self, work: Any) -> None:
        """NCCL's own `wait` lets the host go on, and waiting for the stream would have no limit."""
        until = time.monotonic() + self.address.timeout_s
        while not work.is_completed():
            if time.monotonic() > until:
                self._group.abort()
                raise BroadcastBroken(
                    f"the broadcast of the weights broke off: not done after {self.address.timeout_s:g} s"
                )
            time.sleep(_LOOK_S)


def open_store(timeout_s: float) -> Any:
    """The meeting place of a new group, on a free port of this machine (`.port`). For rank 0."""
    limit = timedelta(seconds=timeout_s)
    return TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False, timeout=limit)


def _group(store: Any, rank: int, size: int, backend: str, limit: timedelta) -> Any:
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, size, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    # Its watchdog would end the whole process, the trainer's too, where a member is silent: `_await_nccl` has
    # the limit. Read when a group is made, so other groups keep theirs.
    before = os.environ.get(_WATCHDOG)
    os.environ[_WATCHDOG] = "0"
    try:
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[_WATCHDOG]
        else:
            os.environ[_WATCHDOG] = before


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
