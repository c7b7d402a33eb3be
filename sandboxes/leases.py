"""Who holds which box, until when: leases that a heartbeat renews, and that can be taken over.

One owner (a worker process) holds many boxes under one heartbeat. A lease whose owner is silent for `ttl_s`
has ended: the dead man's switch. Until then a successor may take the box over by its id; each holder gets a
key of its own, so whoever held it before can do nothing there any more.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from consilience.conf.errors import SandboxLost


@dataclass(frozen=True, slots=True)
class BoxLease:
    """One holder's hold of one box. Only who shows the `key` may use or give back the box."""

    box_id: str
    owner: str
    key: str


class LeaseTable:
    """The leases of one host. Not for several threads. `clock` counts seconds and never goes back."""

    def __init__(self, ttl_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; it must be above 0")
        self.ttl_s = ttl_s
        self._clock = clock
        self._leases: dict[str, BoxLease] = {}
        self._heard: dict[str, float] = {}  # owner -> its last sign of life
        self._looked = clock()

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def owners(self) -> set[str]:
        """Those who hold something."""
        return {lease.owner for lease in self._leases.values()}

    def grant(self, box_id: str, owner: str) -> BoxLease:
        """A new lease; an older one of the same box is void from here on. It is a sign of life of `owner`."""
        self._heard[owner] = self._clock()
        self._leases[box_id] = BoxLease(box_id, owner, secrets.token_hex(8))
        return self._leases[box_id]

    def check(self, box_id: str, key: str) -> None:
        """SandboxLost unless this key holds the box now."""
        lease = self._leases.get(box_id)
        if lease is None:
            raise SandboxLost(
                f"{box_id} is not on lease: it was given back, or its owner was silent for {self.ttl_s:g} s"
            )
        if lease.key != key:
            raise SandboxLost(f"{box_id} was taken over by {lease.owner}")

    def beat(self, owner: str) -> int:
        """A sign of life; how many boxes the owner holds."""
        self._heard[owner] = self._clock()
        return sum(lease.owner == owner for lease in self._leases.values())

    def drop(self, box_id: str) -> None:
        """The box is gone or given back."""
        self._leases.pop(box_id, None)

    def held_by(self, owner: str) -> list[str]:
        """Ids of an owner's boxes."""
        return [lease.box_id for lease in self._leases.values() if lease.owner == owner]

    def end_silent(self, look_every_s: float) -> list[str]:
        """Ids of boxes whose owner was silent for longer than `ttl_s`; their leases end.

        To be called every `look_every_s`. When the calls stood still for longer than a lease lasts, so did
        this process: its clock ran on while no heartbeat could be heard, and that time does not count.
        """
        now = self._clock()
        gap_s, self._looked = now - self._looked - look_every_s, now
        if gap_s > self.ttl_s / 2:
            self._heard = {owner: heard + gap_s for owner, heard in self._heard.items()}
        late = {owner for owner, heard in self._heard.items() if now - heard > self.ttl_s}
        ended = [lease.box_id for lease in self._leases.values() if lease.owner in late]
        for box_id in ended:
            self.drop(box_id)
        for owner in late:
            del self._heard[owner]
        return ended
