"""A program in a box that is talked to while it runs: input and output in pieces, with back-pressure.

Input is sent ahead of the program by at most `WINDOW_BYTES`; output is sent by the runner only as far
as credit was given for it, and credit is given back as it is read. So neither side holds more than a
window of what the other has not taken, and a program that nobody reads stands still in its write.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from typing import Any

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.channel import Channel, Request
from consilience.sandboxes.protocol import ExecResult

WINDOW_BYTES = 256 << 10
CHUNK_BYTES = 1 << 16


class Feeder:
    """Sends input to a running request, a window ahead of what its program has taken."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._untaken = 0
        self._is_over = False
        self._signal = asyncio.Event()

    def count_sent(self, num_bytes: int) -> None:
        self._untaken += num_bytes

    def on_taken(self, num_bytes: int) -> None:
        self._untaken -= num_bytes
        self._signal.set()

    def stop(self) -> None:
        """The program has ended: what is left is not sent."""
        self._is_over = True
        self._signal.set()

    async def send(self, job: int, data: bytes, *, is_last: bool) -> bool:
        """All of `data`, as the program takes it; False when the program ended before."""
        view = memoryview(data)
        while True:
            while self._untaken >= WINDOW_BYTES and not self._is_over:
                self._signal.clear()
                await self._signal.wait()  # no limit: the end of the program stops it
            if self._is_over:
                return False
            piece, view = view[:CHUNK_BYTES], view[CHUNK_BYTES:]
            self._untaken += len(piece)
            header = {"verb": "input", "job": job, "is_last": is_last and not view}
            await self._channel.notify(header, bytes(piece))
            if not view:
                return True


class RunnerProcess:
    """`Process` over a runner. `judge(report, stdout_bytes, stderr_bytes)` makes the outcome of its end."""

    def __init__(self, channel: Channel, judge: Callable[[dict[str, Any], int, int], ExecResult]) -> None:
        self._channel, self._judge = channel, judge
        self._feeder = Feeder(channel)
        self._buffers = {1: bytearray(), 2: bytearray()}
        self._totals = {1: 0, 2: 0}
        self._ended = {1: False, 2: False}
        self._report: dict[str, Any] | None = None
        self._result: ExecResult | None = None
        self._signal = asyncio.Event()
        self._request: Request | None = None

    async def start(self, header: dict[str, Any], stdin: bytes, *, has_more: bool, timeout_s: float) -> None:
        """Sends the request; `stdin` goes with it as far as one piece, then after it."""
        first, rest = stdin[:CHUNK_BYTES], stdin[CHUNK_BYTES:]
        self._feeder.count_sent(len(first))
        header = {**header, "credit": WINDOW_BYTES, "more": has_more or bool(rest), "timeout_s": timeout_s}
        self._request = await self._channel.begin(header, first, timeout_s=10.0, on_event=self._on_event)
        self._request.reply.add_done_callback(self._on_reply)
        if rest:
            await self._feeder.send(self._request.id, rest, is_last=not has_more)

    @property
    def _job(self) -> int:
        assert self._request is not None
        return self._request.id

    def _on_event(self, header: dict[str, Any], blob: bytes) -> None:
        if header["event"] == "taken":
            self._feeder.on_taken(header["bytes"])
        elif header["event"] == "out":
            self._buffers[header["stream"]] += blob
            self._totals[header["stream"]] += len(blob)
        elif header["event"] == "end":
            self._ended[header["stream"]] = True
        else:
            self._report = header
            self._feeder.stop()
        self._signal.set()

    def _on_reply(self, reply: asyncio.Future[tuple[dict[str, Any], bytes]]) -> None:
        """The last word, after all output; or the box is lost; or the program was refused a start."""
        is_answered = not reply.cancelled() and reply.exception() is None  # no limit: it is done
        if is_answered and "errno" in (told := reply.result()[0]):  # no limit: it is done
            self._report = {"failure": told, "clean": True}
        self._ended = {1: True, 2: True}
        self._feeder.stop()
        self._signal.set()

    def _check(self) -> None:
        if self._channel.lost is not None:
            raise SandboxLost(f"{self._channel.name} is gone: {self._channel.lost}")

    async def write(self, data: bytes) -> None:
        self._check()
        if not await self._feeder.send(self._job, data, is_last=False):
            self._check()
            raise BrokenPipeError("the program has ended")

    async def close_stdin(self) -> None:
        self._check()
        await self._feeder.send(self._job, b"", is_last=True)

    async def read(
        self, max_bytes: int = 1 << 16, *, is_stderr: bool = False, timeout_s: float | None = None
    ) -> bytes:
        stream = 2 if is_stderr else 1
        buffer = self._buffers[stream]
        async with asyncio.timeout(timeout_s):
            while not buffer and not self._ended[stream]:
                self._signal.clear()
                await self._signal.wait()
        if not buffer:
            self._check()
            return b""
        data = bytes(memoryview(buffer)[:max_bytes])
        del buffer[: len(data)]
        if not self._ended[stream] and self._channel.lost is None:
            header = {"verb": "credit", "job": self._job, "stream": stream, "bytes": len(data)}
            await self._channel.notify(header)
        return data

    async def kill(self, number: int = signal.SIGKILL) -> None:
        self._check()
        await self._channel.notify({"verb": "signal", "job": self._job, "signal": int(number)})

    async def wait(self, timeout_s: float | None = None) -> ExecResult:
        async with asyncio.timeout(timeout_s):
            while self._report is None:
                self._check()
                self._signal.clear()
                await self._signal.wait()
        if self._report["clean"] is not True:
            await self._channel.abandon("a process of it cannot be killed")
            self._check()
        if self._result is None:
            self._result = self._judge(self._report, self._totals[1], self._totals[2])
        return self._result
