"""For each driver present: a judge's box and an agent's box, emptied before every use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from consilience.rewards.judge_box import JudgeBox
from consilience.sandboxes import bwrap_driver, docker_driver
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.protocol import Sandbox, SandboxSpec


async def open_root(spec: SandboxSpec) -> Sandbox:
    return await bwrap_driver.open_bwrap(spec, is_root_mode=True)


async def open_user(spec: SandboxSpec) -> Sandbox:
    return await bwrap_driver.open_bwrap(spec, is_root_mode=False)


def _present() -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if not isinstance(docker_driver.find_engine(), str):
        found["docker"] = docker_driver.open_docker
    if os.geteuid() == 0 and not isinstance(bwrap_driver.find_bwrap(True), str):
        found["bwrap_root"] = open_root
    found["bwrap_user"] = open_user  # must work wherever the tests run
    return found


PRESENT = _present()


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
