"""What this machine offers, strongest first, and the one way to open a box: it fails closed."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes import bwrap_driver, cgroups
from consilience.sandboxes.insecure_driver import open_insecure
from consilience.sandboxes.protocol import Isolation, Sandbox, SandboxSpec

DRIVERS = ("auto", "docker", "bwrap", "insecure_subprocess")


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to make a box here. `reason` says why not, where `is_available` is False."""

    driver: str
    level: Isolation
    is_available: bool
    runtime: str = ""
    memory_cap: str = "none"
    process_cap: str = "none"
    reason: str = ""

    def __str__(self) -> str:
        if not self.is_available:
            return f"{self.level.label} ({self.driver}): no, {self.reason}"
        return f"{self.level.label} ({self.driver}, {self.runtime}, memory by {self.memory_cap})"


def available(*, image: str | None = None, runtime: str = "runc") -> list[Offer]:
    """Every driver with what it would enforce here, strongest first; then those that cannot, and why."""
    root, user = bwrap_driver.find_bwrap(True), bwrap_driver.find_bwrap(False)
    cap = "rlimit"
    if isinstance(root, bwrap_driver.Bwrap):
        cap = "cgroup" if isinstance(cgroups.find_hierarchy(), cgroups.Hierarchy) else "rlimit"
    insecure = Offer(
        "insecure_subprocess",
        Isolation.RLIMIT,
        True,
        "plain subprocess, NOT A SECURITY BOUNDARY, needs sandbox.allow_insecure=true",
        "rlimit",
        "rlimit" if os.geteuid() == 0 else "none",
    )
    offers = [_docker_offer(image, runtime), _bwrap_offer(root, Isolation.BWRAP_ROOT, cap)]
    offers += [_bwrap_offer(user, Isolation.BWRAP_USER, "rlimit"), insecure]
    return sorted(offers, key=lambda offer: (not offer.is_available, -offer.level))


def _bwrap_offer(found: bwrap_driver.Bwrap | str, level: Isolation, cap: str) -> Offer:
    if isinstance(found, str):
        return Offer("bwrap", level, False, reason=found)
    return Offer("bwrap", level, True, found.runtime, cap, cap)


def _docker_offer(image: str | None, runtime: str) -> Offer:
    from consilience.sandboxes.docker_driver import find_engine

    engine = find_engine(image, runtime)
    if isinstance(engine, str):
        return Offer("docker", Isolation.CONTAINER, False, reason=engine)
    return Offer("docker", engine.level, True, engine.runtime, "cgroup", "cgroup")


async def open_sandbox(spec: SandboxSpec) -> Sandbox:
    """A box of at least `spec.min_isolation`: the strongest offer of the driver that was asked for.

    SandboxUnavailable names what was asked for, what there is, and what to do. A weaker box is never
    handed out instead, and what was started is verified from inside.
    """
    opener = choose(spec)
    box = await opener(spec)
    if box.enforced.level < spec.min_isolation:
        await box.destroy()
        raise SandboxUnavailable(
            f"need {spec.min_isolation.label}, the started box enforces {box.enforced.level.label}"
        )
    return box


def choose(spec: SandboxSpec) -> Callable[[SandboxSpec], Awaitable[Sandbox]]:
    """The function that opens the box `spec` asks for, or SandboxUnavailable; starts nothing itself."""
    if spec.driver not in DRIVERS:
        raise SandboxUnavailable(f"sandbox.driver is {spec.driver!r}; allowed are {', '.join(DRIVERS)}")
    offers = available(image=spec.image, runtime=spec.runtime)
    named = [o for o in offers if spec.driver in ("auto", o.driver)]
    usable = [o for o in named if o.is_available and (spec.allow_insecure or o.level > Isolation.RLIMIT)]
    strongest = usable[0] if usable else None
    if strongest is None or strongest.level < spec.min_isolation:
        raise SandboxUnavailable(_refusal(spec, offers, strongest))
    if strongest.driver == "insecure_subprocess":
        return open_insecure
    if strongest.driver == "docker":
        from consilience.sandboxes.docker_driver import open_docker

        return open_docker
    is_root_mode = strongest.level is Isolation.BWRAP_ROOT
    return lambda wanted: bwrap_driver.open_bwrap(wanted, is_root_mode=is_root_mode)


def _refusal(spec: SandboxSpec, offers: list[Offer], strongest: Offer | None) -> str:
    wanted = f"need {spec.min_isolation.label}" + (f" by {spec.driver}" if spec.driver != "auto" else "")
    there = f"the strongest there is here is {strongest}" if strongest else "there is none here"
    lacking = "; ".join(str(o) for o in offers if not o.is_available and spec.driver in ("auto", o.driver))
    advice = "install Docker Engine or bubblewrap"
    if strongest is not None:
        advice += f", or set sandbox.min_isolation={strongest.level.label}"
    if spec.driver == "insecure_subprocess" and not spec.allow_insecure:
        advice = "it is no security boundary and needs sandbox.allow_insecure=true"
    return f"{wanted}; {there}{f' ({lacking})' if lacking else ''}; {advice}"
