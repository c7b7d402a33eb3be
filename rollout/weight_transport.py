"""How weights get from the publisher's process into a worker's: the worker's side, and what may be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from consilience.rollout.publishing import Publication, unpack
from consilience.rollout.shared_segment import SegmentAddress, map_segment
from consilience.rollout.weight_broadcast import BroadcastGroup, GroupAddress

TRANSPORTS = ("auto", "shared_memory", "object_store", "broadcast")


class WeightReceiver:
    """Opens what a publisher sends: packed tensors, the address of a shared segment, or a broadcast."""

    def __init__(self) -> None:
        self._group: BroadcastGroup | None = None

    def join(self, address: GroupAddress, rank: int) -> None:
        """Become a member of a broadcast group, in place of a former one. BroadcastBroken if it fails."""
        self._group = None
        self._group = BroadcastGroup(address, rank)

    def open(self, payload: Any, publication: Publication) -> Mapping[str, Tensor]:
        """The tensors of a publication, not yet verified; those of a shared segment are mapped, not copied.

        EngineError when the segment or the group cannot be reached.
        """
        if isinstance(payload, SegmentAddress):
            return map_segment(payload, publication)
        if isinstance(payload, GroupAddress):
            if self._group is None or self._group.address != payload:
                raise RuntimeError("a broadcast was announced to a worker that has not joined its group")
            return self._group.receive(publication)
        return unpack(payload)
