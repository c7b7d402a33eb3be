"""Runtimes chosen by name, on an engine that pretends: what it is asked for, what of a box is not believed.

The engine speaks as much of Docker's protocol as the driver needs. Its "containers" are processes of
bubblewrap with a runner inside, which may be shown another kernel than this machine's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes import bwrap_driver
from consilience.sandboxes.box import find_python, new_uids
from consilience.sandboxes.docker_driver import find_engine, open_docker, own_kernel_runtimes
from consilience.sandboxes.protocol import Isolation, Limits, Sandbox, SandboxSpec

IS_ROOT = os.geteuid() == 0
INFO = {"OSType": "linux", "ServerVersion": "99.1", "SecurityOptions": ["name=seccomp,profile=default"]}
INFO |= {"Runtimes": {"runc": {}, "runsc": {}, "kata-fc": {}}}
LIMITS = Limits(memory_bytes=96 << 20, processes=9, workspace_bytes=1 << 20)


@dataclass
class PretendEngine:
    """kernel   what a container shows as its kernel's boot id; "" for this machine's
    changes  of a container's settings, unasked

    `asked` are the requests, `settings` what the last container was to be.
    """

    kernel: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    info_r: int = -1
    stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
    pumps: list[asyncio.Task[None]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, target = head.split()[:2]
                sizes = [line for line in head.lower().split("\r\n") if line.startswith("content-length:")]
                body = await reader.readexactly(int(sizes[0].split(":")[1]) if sizes else 0)
                verb = f"{method} {target.partition('?')[0].removeprefix('/v1.41')}"
                self.asked.append(verb)
                if verb == "POST /containers/c1/attach":
                    writer.write(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
                    self.stream = (reader, writer)
                    return
                status, answer = self.answer(verb, body)
                text = json.dumps(answer).encode() if answer is not None else b""
                kind = "Content-Type: application/json\r\n" if text else ""
                writer.write(
                    f"HTTP/1.1 {status} X\r\n{kind}Content-Length: {len(text)}\r\n\r\n".encode() + text
                )

    def answer(self, verb: str, body: bytes) -> tuple[int, Any]:
        if verb == "POST /containers/create":
            self.settings = json.loads(body)
            return 201, {"Id": "c1", "Warnings": []}
        if verb == "POST /containers/c1/start":
            self.start()
            return 204, None
        if verb == "DELETE /containers/c1":
            self.end()
            return 204, None
        host = {**self.settings.get("HostConfig", {}), **self.changes}
        described = {"Id": "c1", "Image": "sha256:f00", "Config": {"Tty": False}, "HostConfig": host}
        answers = {"GET /info": INFO, "GET /version": {"ApiVersion": "1.41"}}
        answers |= {"GET /images/img:1/json": {"Id": "sha256:f00"}, "GET /containers/c1/json": described}
        return (200, answers[verb]) if verb in answers else (404, {"message": verb})

    def start(self) -> None:
        bwrap = bwrap_driver.find_bwrap(IS_ROOT)
        assert isinstance(bwrap, bwrap_driver.Bwrap), bwrap
        files, (info_r, info_w) = bwrap_driver._Files(), os.pipe()
        words = bwrap_driver._arguments(bwrap, LIMITS, new_uids(), info_w, files, True)
        shown = {"memory.max": LIMITS.memory_bytes, "pids.max": LIMITS.processes + 1}
        more = [w for name, value in shown.items() for w in _file(files, f"/sys/fs/cgroup/{name}", value)]
        more += _file(files, "/proc/sys/kernel/random/boot_id", self.kernel) if self.kernel else []
        place = words.index("--remount-ro")
        words[place:place] = more
        process: Any = subprocess.Popen(
            [bwrap.path, *words, find_python()[0], *self.settings["Cmd"][1:]],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
            pass_fds=(*files.fds, info_w),
            **bwrap_driver._outside_identity(IS_ROOT),
        )
        files.close()
        os.close(info_w)
        self.process, self.info_r = process, info_r  # bubblewrap writes there when it has made the namespaces
        self.pumps = [asyncio.create_task(pump) for pump in (self.take_in(), self.give_out())]

    async def take_in(self) -> None:
        assert self.stream is not None and self.process is not None
        end = self.process.stdin
        assert end is not None
        with contextlib.suppress(BrokenPipeError):
            while data := await self.stream[0].read(1 << 16):
                await asyncio.to_thread(os.write, end.fileno(), data)
        end.close()

    async def give_out(self) -> None:
        assert self.stream is not None and self.process is not None
        end, writer = self.process.stdout, self.stream[1]
        assert end is not None
        while data := await asyncio.to_thread(os.read, end.fileno(), 1 << 16):
            writer.write(struct.pack(">BxxxL", 1, len(data)) + data)
        writer.close()

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # both halves of a start, if it is one still
            self.process.wait(timeout=10)
            self.process = os.close(self.info_r)


def _file(files: bwrap_driver._Files, path: str, value: object) -> list[str]:
    return ["--perms", "0444", "--ro-bind-data", files.add(f"{value}\n".encode()), path]


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """opened(engine, runtime, use): `await use(box)` for a box of an engine that pretends."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/engine.sock")

    def run(engine: PretendEngine, runtime: str, use: Any) -> Any:
        async def main() -> Any:
            server = await asyncio.start_unix_server(engine.serve, f"{tmp_path}/engine.sock")
            try:
                async with asyncio.timeout(20):
                    box = await open_docker(
                        SandboxSpec("docker", limits=LIMITS, image="img:1", runtime=runtime)
                    )
                    try:
                        return await use(box)
                    finally:
                        await box.destroy()
            finally:
                engine.end()
                server.close()

        return asyncio.run(main())

    return run


async def _describe(box: Sandbox) -> tuple[Isolation, str, bytes]:
    told = await box.exec(["echo", "inside"])
    return box.enforced.level, box.enforced.runtime, told.stdout


@pytest.mark.parametrize(("runtime", "level"), [("runsc", Isolation.GVISOR), ("kata-fc", Isolation.VM)])
def test_a_runtime_is_asked_for_by_name_and_believed_only_with_a_kernel_of_its_own(opened, runtime, level):
    honest, false = PretendEngine(kernel="another"), PretendEngine()
    words = "should give its own kernel" if IS_ROOT else "the probe inside the box failed"
    with pytest.raises(SandboxUnavailable, match=words):
        opened(false, runtime, _describe)
    assert false.settings["HostConfig"]["Runtime"] == runtime and "DELETE /containers/c1" in false.asked
    if IS_ROOT:  # an ordinary user cannot give programs a uid of their own, as an engine does
        assert opened(honest, runtime, _describe) == (level, f"docker 99.1, {runtime}", b"inside\n")
        assert (
            honest.settings["HostConfig"]["Runtime"] == runtime
            and honest.asked[-1] == "DELETE /containers/c1"
        )


def test_an_engine_that_takes_another_runtime_than_it_was_asked_for_is_not_used(opened):
    engine = PretendEngine(kernel="another", changes={"Runtime": "runc"})
    with pytest.raises(SandboxUnavailable, match="Runtime is 'runc', asked for was 'kata-fc'"):
        opened(engine, "kata-fc", _describe)
    assert "DELETE /containers/c1" in engine.asked


def test_runtimes_with_a_kernel_of_their_own_are_found_by_name(opened, tmp_path):
    async def names(_: Sandbox) -> list[str]:
        missing = await asyncio.to_thread(find_engine, "img:1", "kata-qemu")
        assert isinstance(missing, str) and "no runtime kata-qemu; it has kata-fc, runc, runsc" in missing
        return await asyncio.to_thread(own_kernel_runtimes)

    assert own_kernel_runtimes() == []  # nobody answers yet
    if IS_ROOT:
        assert opened(PretendEngine(), "runc", names) == ["kata-fc", "runsc"]
