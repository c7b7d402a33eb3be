"""The table of attacks and the boxes it runs in: one held box per driver, replaced when an attack ends it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from attack import Attack

from consilience.conf.errors import SandboxLost
from consilience.sandboxes import docker_driver
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.insecure_driver import open_insecure
from consilience.sandboxes.protocol import Isolation, Limits, SandboxSpec
from tests import drivers_here

LIMITS = Limits(
    memory_bytes=96 << 20,
    processes=24,
    workspace_bytes=8 << 20,
    file_bytes=4 << 20,
    output_bytes=4096,
    cpu_s=8.0,
)
IS_LONG_RUN = os.environ.get("ATTACKS") == "all"  # `make attacks`
NOT_ENFORCED: list[str] = []


def _present() -> dict[str, tuple[Isolation, Callable]]:
    levels = {
        "docker": Isolation.CONTAINER,
        "bwrap_root": Isolation.BWRAP_ROOT,
        "bwrap_user": Isolation.BWRAP_USER,
    }
    for name in docker_driver.own_kernel_runtimes():
        engine = docker_driver.find_engine(None, name)
        levels[f"docker_{name}"] = Isolation.CONTAINER if isinstance(engine, str) else engine.level
    found = {name: (levels[name], opener) for name, opener in drivers_here.PRESENT.items()}
    found["insecure"] = (Isolation.RLIMIT, open_insecure)
    return found


PRESENT = _present()


class Boxes:
    """The held box of each driver, and those of attacks with limits of their own."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, Limits], BlockingSandbox] = {}

    def get(self, driver: str, attack: Attack | None = None) -> BlockingSandbox:
        """An emptied box. One with limits of its own is kept until another such is asked for."""
        limits = replace(LIMITS, **attack.limits) if attack is not None else LIMITS
        key = (driver, limits)
        try:
            if key in self._held:
                self._held[key].reset()
                return self._held[key]
        except SandboxLost:
            self.drop(self._held[key])
        self._held[key] = self.open(driver, limits)
        return self._held[key]

    def open(self, driver: str, limits: Limits = LIMITS) -> BlockingSandbox:
        spec = SandboxSpec(limits=limits, allow_insecure=driver == "insecure")
        return open_blocking(spec, opener=PRESENT[driver][1])

    def drop(self, box: BlockingSandbox) -> None:
        """Forgets a box that has ended."""
        box.destroy()
        self._held = {key: held for key, held in self._held.items() if held is not box}

    def close(self) -> None:
        for box in self._held.values():
            box.destroy()


@pytest.fixture(scope="session")
def boxes() -> Iterator[Boxes]:
    held = Boxes()
    yield held
    held.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """An attack below its level is said, never skipped in silence."""
    if NOT_ENFORCED:
        terminalreporter.write_line(f"not enforced here ({len(NOT_ENFORCED)}): {' '.join(NOT_ENFORCED)}")
