"""For each driver present: a judge's box and an agent's box, emptied before every use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from consilience.rewards.judge_box import JudgeBox
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.protocol import SandboxSpec
from tests.drivers_here import PRESENT


@pytest.fixture(scope="session", params=list(PRESENT))
def opener(request: pytest.FixtureRequest) -> Callable:
    return PRESENT[request.param]


@pytest.fixture(scope="session")
def judge(opener: Callable) -> Iterator[JudgeBox]:
    """One box for many gradings: a container takes half a second to start."""
    box = JudgeBox(lambda: open_blocking(SandboxSpec(), opener=opener), gradings_per_box=1000)
    yield box
    box.close()


@pytest.fixture(scope="session")
def opened_agent(opener: Callable) -> Iterator[BlockingSandbox]:
    box = open_blocking(SandboxSpec(), opener=opener)
    yield box
    box.destroy()


@pytest.fixture
def agent(opened_agent: BlockingSandbox) -> BlockingSandbox:
    opened_agent.reset()
    return opened_agent
