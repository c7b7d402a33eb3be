"""Boxes by the Docker Engine: one container each, whose command is the runner and whose stdin is the channel.

The attach stream is the only way in: no exec, no archive upload, no socket, nothing mounted from the
host. When the owner dies the engine closes the container's stdin, the runner ends, and AutoRemove
takes the container away.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
from typing import Any

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.box import (
    START_TIMEOUT_S,
    RunnerSandbox,
    new_box_id,
    new_uids,
    settings,
)
from consilience.sandboxes.channel import Channel
from consilience.sandboxes.docker_profile import Engine, check_applied, check_kernel, container_config
from consilience.sandboxes.protocol import Enforced, Isolation, Limits, Sandbox, SandboxSpec
from consilience.sandboxes.runner_bundle import bootstrap_frame
from consilience.sandboxes.verify import check_isolation, probe_program

DEFAULT_IMAGE = "consilience-sandbox:1"
BUILD_COMMAND = "python -m consilience.sandboxes.build_image"
COUNTER_FILES = (
    ("oom", "/sys/fs/cgroup/memory/memory.oom_control", "oom_kill"),
    ("pids", "/sys/fs/cgroup/pids/pids.events", "max"),
    ("oom", "/sys/fs/cgroup/memory.events", "oom_kill"),
    ("pids", "/sys/fs/cgroup/pids.events", "max"),
)
CREATE_TIMEOUT_S = 60.0


def engine_socket() -> str:
    """Path of the engine's unix socket ("" where DOCKER_HOST names something else)."""
    url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    return url.removeprefix("unix://") if url.startswith("unix://") else ""


def ping_engine(path: str) -> bool:
    """Whether an engine answers at a socket."""
    try:
        return os.path.exists(path) and _get(path, "/info") is not None
    except (OSError, ValueError, http.client.HTTPException):
        return False


def find_engine(image: str | None = None, oci_runtime: str = "runc") -> Engine | str:
    """The engine, asked over its socket in a few milliseconds, or why there is none to use."""
    path, image = engine_socket(), image or DEFAULT_IMAGE
    if not path:
        return f"DOCKER_HOST={os.environ['DOCKER_HOST']} is no unix socket; only a local engine is used"
    if not os.path.exists(path):
        return f"no Docker Engine ({path} does not exist)"
    try:
        info = _get(path, "/info")
        if info is None or info.get("OSType") != "linux":
            return f"the engine at {path} does not run Linux containers"
        name, _, pinned = image.partition("@")
        found = _get(path, f"/images/{name}/json")
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"the engine at {path} does not answer ({error})"
    if found is None:
        build = BUILD_COMMAND + (f" --image {image}" if image != DEFAULT_IMAGE else "")
        return f"the engine has no image {image}; build it with `{build}` or set sandbox.image"
    if pinned and found["Id"] != pinned:
        return f"the image {name} is {found['Id']} now, pinned is {pinned}; build it again or change the pin"
    options = info.get("SecurityOptions") or []
    if not any("name=seccomp" in option for option in options):
        return "the engine has no seccomp support"
    has_userns = any("name=userns" in option or "name=rootless" in option for option in options)
    runtimes = sorted(info.get("Runtimes") or {"runc": {}})
    if oci_runtime not in runtimes:
        return f"the engine has no runtime {oci_runtime}; it has {', '.join(runtimes)}"
    has_quota = bool(info.get("CpuCfsQuota", True))
    return Engine(
        f"unix://{path}", info["ServerVersion"], image, found["Id"], has_userns, oci_runtime, has_quota
    )


def own_kernel_runtimes() -> list[str]:
    """Names of the engine's runtimes that promise a kernel of their own: runsc, Kata's. None without one."""
    path = engine_socket()
    try:
        info = (_get(path, "/info") if os.path.exists(path) else None) or {}
    except (OSError, ValueError, http.client.HTTPException):
        return []
    return sorted(name for name in info.get("Runtimes") or {} if name.startswith(("runsc", "kata")))


def _get(path: str, target: str) -> dict[str, Any] | None:
    """A JSON answer of the engine; None for 404."""
    connection = http.client.HTTPConnection("localhost", timeout=10)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(10)
    try:
        connection.sock.connect(path)
        connection.request("GET", target, headers={"Host": "localhost"})
        response = connection.getresponse()
        body = response.read()
        if response.status == 404:
            return None
        if response.status != 200:
            raise OSError(f"HTTP {response.status}")
        return json.loads(body)
    finally:
        connection.close()


class _DockerTransport:
    """A container and its attach stream."""

    def __init__(self, client: Any, container: Any) -> None:
        self._client = client
        self._container = container
        self._stream: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._errors = b""
        self._is_killed = False

    async def start(self, channel: Channel) -> None:
        self._stream = self._container.attach(stdin=True, stdout=True, stderr=True)
        await self._stream.__aenter__()
        self._reader = asyncio.create_task(self._pump(channel))
        await self._container.start()

    async def _pump(self, channel: Channel) -> None:
        try:
            while (message := await self._stream.read_out()) is not None:
                if message.stream == 1:
                    channel.feed(message.data)
                elif len(self._errors) < 2000:  # only the runner's own start can write here
                    self._errors += message.data
        except asyncio.CancelledError:
            raise
        except Exception as error:  # whatever the client library raises for a broken stream
            self._errors += repr(error).encode()
        channel.feed_eof()

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.write_in(data)
        except Exception as error:
            raise BrokenPipeError(str(error)) from None

    def describe_end(self) -> str:
        return self._errors.decode(errors="replace").strip()[-600:]

    async def kill(self) -> None:
        if self._is_killed:
            return
        self._is_killed = True
        if self._reader is not None:
            self._reader.cancel()
        with contextlib.suppress(Exception):  # gone already, or the engine is: either way not ours to keep
            async with asyncio.timeout(20):
                await self._container.delete(force=True)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(20):
                if self._stream is not None:
                    await self._stream.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(20):
                await self._client.close()


async def open_docker(spec: SandboxSpec) -> Sandbox:
    """A box in a container of `spec.image` (it must have python3). SandboxUnavailable where that fails."""
    try:
        import aiodocker
    except ImportError:
        raise SandboxUnavailable("docker: the Python package aiodocker is not installed") from None
    engine = await asyncio.to_thread(find_engine, spec.image, spec.runtime)
    if isinstance(engine, str):
        raise SandboxUnavailable(f"docker: {engine}")
    name, client = new_box_id(), aiodocker.Docker(url=engine.url)
    transport: _DockerTransport | None = None
    try:
        async with asyncio.timeout(CREATE_TIMEOUT_S):
            config = container_config(engine, spec.limits, name)
            container = await client.containers.create(config, name=f"consilience-{name}")
            transport = _DockerTransport(client, container)
            channel = Channel(name, transport)
            await transport.start(channel)
            check_applied(config, await container.show())
        return await _configured(engine, name, channel, transport, spec.limits)
    except BaseException as error:
        await asyncio.shield(transport.kill() if transport else client.close())
        if isinstance(error, (SandboxLost, TimeoutError, aiodocker.DockerError, OSError)):
            reason = str(error) or f"no container within {CREATE_TIMEOUT_S:.0f} s"
            raise SandboxUnavailable(f"docker: the box did not start: {reason}") from None
        raise


async def _configured(
    engine: Engine, name: str, channel: Channel, transport: _DockerTransport, limits: Limits
) -> RunnerSandbox:
    async with asyncio.timeout(START_TIMEOUT_S):
        await transport.send(bootstrap_frame())
    uids = new_uids(range(1000, 51000)) if engine.has_userns else new_uids()  # remapped ranges hold 65536
    request = settings(
        limits,
        uid=uids[0],
        nice=10,  # in one share of the processor with the runner, which must get its turn beside a bomb
        rlimit_memory=False,
        rlimit_processes=True,
        die_with_parent=False,
        counters=COUNTER_FILES,
        writable=["/workspace", "/tmp", "/dev/shm", "/dev/mqueue"],
    )
    reply, _ = await channel.call(request, timeout_s=START_TIMEOUT_S)
    if reply["pid"] != 1:
        raise SandboxUnavailable(f"docker: the runner is process {reply['pid']} of the container, not 1")
    asked = Enforced(engine.level, "docker", engine.runtime, True, False, "none", "none")
    probe = RunnerSandbox(name, channel, Limits(wall_s=START_TIMEOUT_S), asked)
    told = await probe.run_python(probe_program(_host_paths()))
    if not told.is_ok:
        raise SandboxUnavailable(f"docker: the probe inside the box failed: {told.stderr.decode()[-300:]}")
    report = check_isolation("docker", told.stdout)
    check_kernel(engine, report["boot_id"])
    counted = await probe.run_python(CAPS_PROBE)
    caps = json.loads(counted.stdout)
    if not 0 < caps["memory"] <= limits.memory_bytes or not 0 < caps["pids"] <= limits.processes + 1:
        raise SandboxUnavailable(f"docker: the container's limits are {caps}, asked for were {limits}")
    notes = (f"image {engine.image} {engine.image_id[:19]}",)
    notes += () if engine.has_cpu_quota else ("no cap on processors: this engine has none",)
    notes += () if reply["shielded"] else ("the runner is protected by its uid only",)
    is_promised = report["is_mapped"] or engine.level is not Isolation.CONTAINER_USERNS
    level = engine.level if is_promised else Isolation.CONTAINER
    enforced = Enforced(level, "docker", engine.runtime, False, True, "cgroup", "cgroup", notes)
    return RunnerSandbox(name, channel, limits, enforced, uids=uids)


CAPS_PROBE = """
import json
def first(*paths):
    for path in paths:
        try:
            return int(open(path).read())
        except (OSError, ValueError):
            pass
    return 0
print(json.dumps({
    "memory": first("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory.max"),
    "pids": first("/sys/fs/cgroup/pids/pids.max", "/sys/fs/cgroup/pids.max"),
}))
"""


def _host_paths() -> list[str]:
    """Places of this host that a container's own image cannot have."""
    home, here = os.path.expanduser("~"), os.getcwd()
    ordinary = {"/", "/root", "/home", "/tmp", "/workspace", "/usr", "/var", "/opt", "/srv"}
    return [path for path in (home, here, engine_socket()) if path and path not in ordinary]
