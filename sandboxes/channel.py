"""The host's side of the runner's frames: requests, their events and replies, hard limits, typed failure.

Whatever goes wrong on this channel (no answer in time, a frame that is not one, the end of the
stream) means the box cannot be trusted any more: it is killed and `SandboxLost` is raised.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from consilience.conf.errors import SandboxLost

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 8 << 20
MAX_BLOB_BYTES = 256 << 20
GRACE_S = 2.0  # the runner answers by a command's limit plus this, or the box is killed


_UNASKED = "an answer that nobody asked for"


@dataclass(slots=True)
class Request:
    """One that was sent and whose reply is still to come."""

    id: int
    verb: str
    reply: asyncio.Future[tuple[dict[str, Any], bytes]]
    on_event: Callable[[dict[str, Any], bytes], None] | None


class Transport(Protocol):
    """Carries bytes to the runner. What comes back is handed to `Channel.feed` and `feed_eof`."""

    async def send(self, data: bytes) -> None: ...

    async def kill(self) -> None:
        """Ends the box and all in it, at once; harmless when it has ended already."""
        ...

    def describe_end(self) -> str:
        """What is known about why the box ended, one line ("" if nothing)."""
        ...


class Channel:
    """Requests to one runner, any number at once. Belongs to the event loop that first uses it."""

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self._transport = transport
        self._buffer = bytearray()
        self._lock = asyncio.Lock()  # of the sending side: frames go out whole
        self._requests: dict[int, Request] = {}
        self._next_id = 0
        self.lost: str | None = None  # why the box is gone, once it is

    async def call(
        self, header: dict[str, Any], *blobs: bytes, timeout_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply's header and blob. SandboxLost if none comes within `timeout_s` + 2 s."""
        try:
            request = await self.begin(header, *blobs, timeout_s=timeout_s)
            return await self.finish(request, timeout_s)
        except asyncio.CancelledError:
            await asyncio.shield(self.abandon("its request was cancelled"))
            raise

    async def begin(
        self,
        header: dict[str, Any],
        *blobs: bytes,
        timeout_s: float,
        on_event: Callable[[dict[str, Any], bytes], None] | None = None,
    ) -> Request:
        """Sends a request. Its events, if it may have any, go to `on_event`, in order."""
        async with self._lock:  # no limit: each that sends has one
            self._next_id += 1
            request = Request(
                self._next_id, header["verb"], asyncio.get_running_loop().create_future(), on_event
            )
            self._requests[request.id] = request
            request.reply.add_done_callback(lambda _: self._requests.pop(request.id, None))
            await self._send({**header, "id": request.id}, blobs, timeout_s)
        return request

    async def finish(self, request: Request, timeout_s: float) -> tuple[dict[str, Any], bytes]:
        """The reply to a request that was sent. SandboxLost if none comes within `timeout_s` + 2 s."""
        # asyncio.wait rather than wait_for: an answer that lies there when a starved loop
        # wakes late is taken, not thrown away for being late
        await asyncio.wait({request.reply}, timeout=timeout_s + GRACE_S)
        if not request.reply.done():
            self._break(f"no answer to {request.verb} within {timeout_s + GRACE_S:.1f} s")
        try:
            return request.reply.result()  # no limit: it is done
        except SandboxLost as error:
            await self.abandon(str(error))
            raise SandboxLost(f"{self.name} is gone: {self.lost}") from None

    async def notify(self, header: dict[str, Any], blob: bytes = b"", *, timeout_s: float = 10.0) -> None:
        """Sends what has no reply: input, credit and signals for a request that goes on."""
        async with self._lock:  # no limit: each that sends has one
            await self._send(header, (blob,), timeout_s)

    async def _send(self, header: dict[str, Any], blobs: tuple[bytes, ...], timeout_s: float) -> None:
        if self.lost is None:
            text = json.dumps({**header, "blob": sum(map(len, blobs))}).encode()
            try:
                async with asyncio.timeout(timeout_s + 30):
                    await self._transport.send(b"".join((LENGTH.pack(len(text)), text, *blobs)))
                return
            except (OSError, TimeoutError) as error:
                await self.abandon(str(error) or type(error).__name__)
            except asyncio.CancelledError:  # half a frame may be on its way
                await asyncio.shield(self.abandon("what was being sent was cancelled"))
                raise
        raise SandboxLost(f"{self.name} is gone: {self.lost}")

    async def abandon(self, reason: str) -> None:
        """Kills the box and lets every later call fail with `reason`."""
        self._break(reason)
        await self._transport.kill()

    def feed(self, data: bytes) -> None:
        """Bytes from the runner, in any portions."""
        self._buffer += data
        while self.lost is None and (frame := self._take_frame()) is not None:
            header, blob = frame
            request = self._requests.get(header.get("id", 0))
            if request is None or request.reply.done():
                wanted = sorted(self._requests)
                self._break(
                    f"answer to request {header.get('id')}, expected {wanted}" if wanted else _UNASKED
                )
            elif "event" not in header:
                request.reply.set_result(frame)
            elif request.on_event is not None:
                request.on_event(header, blob)
            else:
                self._break(f"an event of {request.verb}, which has none")

    def feed_eof(self) -> None:
        """The runner's stream ended."""
        detail = self._transport.describe_end()
        self._break("it ended" + (f" ({detail})" if detail else ""))

    def _take_frame(self) -> tuple[dict[str, Any], bytes] | None:
        buffer = self._buffer
        if len(buffer) < LENGTH.size:
            return None
        (num_header,) = LENGTH.unpack_from(buffer)
        start = LENGTH.size + num_header
        if num_header > MAX_HEADER_BYTES:
            return self._break(f"a frame header of {num_header} bytes")
        if len(buffer) < start:
            return None
        try:
            header = json.loads(buffer[LENGTH.size : start])
            num_blob = int(header["blob"])
        except (ValueError, KeyError, TypeError) as error:
            return self._break(f"a frame that is not one ({error})")
        if not 0 <= num_blob <= MAX_BLOB_BYTES:
            return self._break(f"a frame of {num_blob} bytes")
        if len(buffer) < start + num_blob:
            return None
        blob = bytes(memoryview(buffer)[start : start + num_blob])
        del buffer[: start + num_blob]
        return header, blob

    def _break(self, reason: str) -> None:
        if self.lost is None:
            self.lost = reason
        self._buffer.clear()
        for request in list(self._requests.values()):
            if not request.reply.done():
                request.reply.set_exception(SandboxLost(self.lost))
                request.reply.exception()  # no limit: it is done; seen here, as nobody may be waiting


class _Inlet(asyncio.Protocol):
    """Passes what arrives on the runner's stdout to the channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def data_received(self, data: bytes) -> None:
        self._channel.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel.feed_eof()


class PipeEnds:
    """The host's ends of a runner's stdin and stdout, on the running event loop."""

    def __init__(self, write_fd: int, read_fd: int) -> None:
        self._write_fd: int | None = write_fd
        self._read_fd = read_fd
        self._inlet: asyncio.BaseTransport | None = None
        os.set_blocking(write_fd, False)

    async def connect(self, channel: Channel) -> None:
        loop = asyncio.get_running_loop()
        pipe = os.fdopen(self._read_fd, "rb", buffering=0)
        self._inlet, _ = await loop.connect_read_pipe(lambda: _Inlet(channel), pipe)

    async def send(self, data: bytes) -> None:
        """Writes all of it; BrokenPipeError when the box is gone."""
        view = memoryview(data)
        while view:
            if self._write_fd is None:
                raise BrokenPipeError("the channel is closed")
            try:
                view = view[os.write(self._write_fd, view) :]
            except BlockingIOError:
                await readiness(self._write_fd, for_writing=True)

    def close(self) -> None:
        if self._write_fd is not None:
            os.close(self._write_fd)
            self._write_fd = None
        if self._inlet is not None:
            self._inlet.close()


async def readiness(fd: int, *, for_writing: bool) -> None:
    """Returns when the descriptor can be read or written without blocking."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    add, remove = (
        (loop.add_writer, loop.remove_writer) if for_writing else (loop.add_reader, loop.remove_reader)
    )
    add(fd, lambda: ready.done() or ready.set_result(None))
    try:
        await ready  # no limit: the callers give one
    finally:
        remove(fd)
