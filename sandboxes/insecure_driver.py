"""Commands as plain subprocesses. NOT A SECURITY BOUNDARY: they see the host's files and network.

Enough for CI on code we wrote; not for code a model wrote. Starts only with
`sandbox.allow_insecure=true`, says so in red, and marks every record with the level `rlimit`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from typing import IO

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.box import (
    MODEL_ENV,
    START_TIMEOUT_S,
    RunnerSandbox,
    find_python,
    new_box_id,
    new_uids,
    settings,
    wait_for_exit,
)
from consilience.sandboxes.channel import Channel, PipeEnds
from consilience.sandboxes.protocol import Enforced, Isolation, Sandbox, SandboxSpec
from consilience.sandboxes.runner_bundle import BOOTSTRAP, bootstrap_frame

BANNER = (
    "\033[1;31mINSECURE: programs run as plain subprocesses of this machine. They can read its files and use "
    "its network. Use this for code you wrote, never for code a model wrote.\033[0m"
)


@cache
def _warn_once(process_id: int) -> None:
    print(BANNER, file=sys.stderr, flush=True)


class _SubprocessTransport:
    def __init__(
        self, process: subprocess.Popen[bytes], pipes: PipeEnds, errors: IO[bytes], folder: str
    ) -> None:
        self._process = process
        self._pipes = pipes
        self._errors = errors
        self._folder = folder

    async def send(self, data: bytes) -> None:
        await self._pipes.send(data)

    def describe_end(self) -> str:
        self._errors.seek(0)
        return self._errors.read(20000).decode(errors="replace").strip()[-600:]

    async def kill(self) -> None:
        """The end of its stdin lets the runner kill its tree, as nobody else can find it; then by force."""
        self._pipes.close()
        await wait_for_exit(self._process.poll, patience_s=3.0)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await wait_for_exit(self._process.poll)
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)


async def open_insecure(spec: SandboxSpec) -> Sandbox:
    """`InsecureSubprocess`: a session of its own, rlimits, another uid if root, best-effort tree kill.

    SandboxUnavailable without `allow_insecure`.
    """
    if not spec.allow_insecure:
        raise SandboxUnavailable(
            "the driver insecure_subprocess is no security boundary and needs sandbox.allow_insecure=true; "
            "install bubblewrap or Docker instead (`consilience doctor` lists what this machine offers)"
        )
    _warn_once(os.getpid())
    name, uid = new_box_id(), new_uids()[0] if os.geteuid() == 0 else None
    folder = os.path.realpath(tempfile.mkdtemp(prefix="consilience-insecure-"))
    if uid is not None:
        os.chown(folder, uid, uid)
    env = {**MODEL_ENV, "HOME": folder, "TMPDIR": folder}
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the transport)
    request_r, request_w = os.pipe()
    reply_r, reply_w = os.pipe()
    try:
        process = subprocess.Popen(
            [find_python()[0], "-s", "-S", "-c", BOOTSTRAP],
            stdin=request_r,
            stdout=reply_w,
            stderr=errors,
            env=env,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(request_r)
        os.close(reply_w)
    pipes = PipeEnds(request_w, reply_r)
    transport = _SubprocessTransport(process, pipes, errors, folder)
    channel = Channel(name, transport)
    try:
        await pipes.connect(channel)
        async with asyncio.timeout(START_TIMEOUT_S):
            await transport.send(bootstrap_frame())
        can_count_processes = uid is not None  # an ordinary user's limit would count all of its processes
        request = settings(
            spec.limits,
            uid=uid,
            nice=0,
            rlimit_memory=True,
            rlimit_processes=can_count_processes,
            workspace=folder,
            writable=[folder],
            env=env,
            remove_at_end=True,
            die_with_parent=False,
        )
        await channel.call(request, timeout_s=START_TIMEOUT_S)
    except BaseException as error:
        await asyncio.shield(transport.kill())
        if isinstance(error, SandboxLost):
            raise SandboxUnavailable(f"insecure_subprocess: the runner did not start: {error}") from None
        raise
    enforced = Enforced(
        Isolation.RLIMIT,
        "insecure_subprocess",
        f"python {sys.version_info.major}.{sys.version_info.minor}",
        network=True,
        seccomp=False,
        memory_cap="rlimit",
        process_cap="rlimit" if can_count_processes else "none",
        notes=("NOT A SECURITY BOUNDARY: host files and network are reachable",),
    )
    return RunnerSandbox(name, channel, spec.limits, enforced)
