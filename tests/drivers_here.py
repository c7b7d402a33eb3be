"""The sandbox drivers that this machine has, by name, for tests that run on every one of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

from consilience.sandboxes import bwrap_driver, docker_driver
from consilience.sandboxes.protocol import Sandbox, SandboxSpec


async def open_root(spec: SandboxSpec) -> Sandbox:
    return await bwrap_driver.open_bwrap(spec, is_root_mode=True)


async def open_user(spec: SandboxSpec) -> Sandbox:
    return await bwrap_driver.open_bwrap(spec, is_root_mode=False)


def open_by_runtime(name: str) -> Callable:
    """The opener of containers under one of the engine's other runtimes."""

    async def open_there(spec: SandboxSpec) -> Sandbox:
        return await docker_driver.open_docker(replace(spec, runtime=name))

    return open_there


def _present() -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    if not isinstance(docker_driver.find_engine(), str):
        found["docker"] = docker_driver.open_docker
        for name in docker_driver.own_kernel_runtimes():
            found[f"docker_{name}"] = open_by_runtime(name)
    if os.geteuid() == 0 and not isinstance(bwrap_driver.find_bwrap(True), str):
        found["bwrap_root"] = open_root
    found["bwrap_user"] = open_user  # must work wherever the tests run
    return found


PRESENT = _present()
