"""One open box per driver present, for the whole run; every test starts from an emptied one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.protocol import Limits, SandboxSpec
from tests.drivers_here import PRESENT

LIMITS = Limits(
    memory_bytes=96 << 20, processes=24, workspace_bytes=8 << 20, file_bytes=4 << 20, output_bytes=4096
)


@pytest.fixture(scope="session")
def opened_boxes() -> Iterator[dict[str, BlockingSandbox]]:
    boxes: dict[str, BlockingSandbox] = {}
    yield boxes
    for box in boxes.values():
        box.destroy()


@pytest.fixture(params=list(PRESENT))
def driver(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def box(driver: str, opened_boxes: dict[str, BlockingSandbox]) -> BlockingSandbox:
    """A box with small limits, empty."""
    if driver not in opened_boxes:
        opened_boxes[driver] = open_blocking(SandboxSpec(limits=LIMITS), opener=PRESENT[driver])
    opened_boxes[driver].reset()
    return opened_boxes[driver]


@pytest.fixture
def open_box(driver: str) -> Iterator[Callable[[Limits], BlockingSandbox]]:
    """Opens further boxes of the driver under test; they end with the test."""
    opened: list[BlockingSandbox] = []

    def open_with(limits: Limits = LIMITS) -> BlockingSandbox:
        opened.append(open_blocking(SandboxSpec(limits=limits), opener=PRESENT[driver]))
        return opened[-1]

    yield open_with
    for one in opened:
        one.destroy()
