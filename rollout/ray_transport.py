"""How weights get from the driver to Ray actors: the driver's side of the transports, and their choice.

    shared_memory  one segment on this host, which every worker maps       (shared_segment.py)
    object_store   one ray.put, fetched by every host once
    broadcast      a process group of torch.distributed: gloo, or NCCL between GPUs    (weight_broadcast.py)

A transport moves bytes; what arrives is verified by whoever loads it.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import ray
import torch
from torch import Tensor

from consilience.conf.errors import ConfigError, EngineError
from consilience.rollout.publishing import Publication, announce, pack
from consilience.rollout.shared_segment import SharedSegment, is_available, map_segment
from consilience.rollout.weight_broadcast import BroadcastBroken, BroadcastGroup, GroupAddress, open_store
from consilience.rollout.weight_bytes import check_fits, places

_LOG = logging.getLogger(__name__)
GROUP_TIMEOUT_S = 60.0  # for a broadcast group to form, and for one bucket of a broadcast


@dataclass(frozen=True, slots=True)
class Shipment:
    """The weights of one publication under way; what it holds is freed with it.

    payload  what the workers' inboxes open
    again    (host of a worker) -> what opens there later, when the worker missed the first delivery
    send     the driver's own part, after the workers have been told; BroadcastBroken if it fails
    """

    payload: Any
    again: Callable[[str], Any]
    send: Callable[[], None] = lambda: None


class Transport(Protocol):
    name: str

    def ship(
        self, weights: Mapping[str, Tensor], publication: Publication, actors: Sequence[Any]
    ) -> Shipment: ...


class ObjectStoreTransport:
    name = "object_store"

    def ship(
        self, weights: Mapping[str, Tensor], publication: Publication, actors: Sequence[Any]
    ) -> Shipment:
        packed = ray.put(pack(weights))
        return Shipment(packed, lambda host: packed)


class SharedMemoryTransport:
    name = "shared_memory"

    def ship(
        self, weights: Mapping[str, Tensor], publication: Publication, actors: Sequence[Any]
    ) -> Shipment:
        segment = SharedSegment(weights, publication)

        def again(host: str) -> Any:
            if host == socket.gethostname():
                return segment.address
            return ray.put(pack(map_segment(segment.address, publication)))  # it was replaced elsewhere

        return Shipment(segment.address, again)


class BroadcastTransport:
    """Its group is made when first used, and again whenever the workers are not those of the last time."""

    name = "broadcast"

    def __init__(
        self,
        backend: str = "gloo",
        timeout_s: float = GROUP_TIMEOUT_S,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self._backend, self._timeout_s, self._options = backend, timeout_s, options
        self._group: BroadcastGroup | None = None
        self._members: list[Any] = []

    def ship(
        self, weights: Mapping[str, Tensor], publication: Publication, actors: Sequence[Any]
    ) -> Shipment:
        check_fits(weights, places(publication)[0])  # before any worker waits for bytes
        if self._group is None or self._members != list(actors):
            self._form(actors)
        group = self._group
        if group is None:  # a worker is gone, which its answer to another delivery will show
            return ObjectStoreTransport().ship(weights, publication, actors)
        # A worker that is replaced later must get these bytes, while the trainer has moved on.
        kept = pack({name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()})

        def send() -> None:
            try:
                group.send(weights, publication)
            except BroadcastBroken:
                self._group = None
                raise

        return Shipment(group.address, lambda host: ray.put(kept), send)

    def _form(self, actors: Sequence[Any]) -> None:
        self._group, self._members = None, list(actors)
        store = open_store(self._timeout_s)
        host = ray.util.get_node_ip_address()
        address = GroupAddress(host, store.port, len(actors) + 1, self._backend, self._timeout_s)
        joining = [
            actor.join.options(**self._options).remote(address, rank) for rank, actor in enumerate(actors, 1)
        ]
        try:
            group = BroadcastGroup(address, 0, store)
            ray.get(joining, timeout=self._timeout_s)
        except Exception as error:
            _LOG.warning("no broadcast group, this publication takes the object store: %s", error)
            return
        self._group = group


def choose_transport(
    wanted: str,
    actors: Sequence[Any],
    hosts: Sequence[str],
    get: Callable[[Any], Any],
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Transport:
    """The transport for these workers. "auto": shared memory where all can map it, else the object store.

    get      ray.get with the pool's own errors
    options  of calls to actors that may be in the middle of a stream
    ConfigError when shared memory is asked for and a worker cannot reach it, or a name that is none.
    """
    if wanted == "object_store":
        return ObjectStoreTransport()
    if wanted == "broadcast":
        has_gpus = all(get(a.has_gpu.remote()) for a in actors) and _has_gpu()
        return BroadcastTransport("nccl" if has_gpus else "gloo", options=options)
    if wanted not in ("auto", "shared_memory"):
        raise ConfigError(f"transport {wanted!r}; allowed: auto, shared_memory, object_store, broadcast")
    fault = _shared_memory_fault(actors, hosts, get)
    if fault is None:
        return SharedMemoryTransport()
    if wanted == "shared_memory":
        raise ConfigError(f"rollout.transport is shared_memory, but {fault}; take auto or object_store")
    _LOG.info("weights go through the object store: %s", fault)
    return ObjectStoreTransport()


def _has_gpu() -> bool:
    return torch.cuda.is_available() and torch.distributed.is_nccl_available()


def _shared_memory_fault(
    actors: Sequence[Any], hosts: Sequence[str], get: Callable[[Any], Any]
) -> str | None:
    """Why some worker cannot map what this process shares, None if all can."""
    here = socket.gethostname()
    for slot, host in enumerate(hosts):
        if host != here:
            return f"worker {slot} runs on {host}, the publisher on {here}"
    if not is_available():
        return "this system has no anonymous files in memory"
    weights = {"probe": torch.arange(16)}
    publication = announce(weights, -1)
    try:
        probe = SharedSegment(weights, publication)
        for slot, answer in enumerate([a.can_map.remote(probe.address, publication) for a in actors]):
            if fault := get(answer):
                return f"worker {slot}: {fault}"
    except EngineError as error:
        return str(error)
    return None
