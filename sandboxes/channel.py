"""The host's side of the runner's frames: one request at a time, a hard time limit, typed failure.

Whatever goes wrong on this channel (no answer in time, a frame that is not one, the end of the
stream) means the box cannot be trusted any more: it is killed and `SandboxLost` is raised.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
from typing import Any, Protocol

from consilience.conf.errors import SandboxLost

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 8 << 20
MAX_BLOB_BYTES = 256 << 20
GRACE_S = 2.0  # the runner answers by a command's limit plus this, or the box is killed


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
    """Requests to one runner. Belongs to the event loop that first uses it."""

    def __init__(self, name: str, transport: Transport) -> None:
        self.name = name
        self._transport = transport
        self._buffer = bytearray()
        self._lock = asyncio.Lock()
        self._reply: asyncio.Future[tuple[dict[str, Any], bytes]] | None = None
        self._next_id = 0
        self.lost: str | None = None  # why the box is gone, once it is

    async def call(
        self, header: dict[str, Any], *blobs: bytes, timeout_s: float
    ) -> tuple[dict[str, Any], bytes]:
        """The reply's header and blob. SandboxLost if none comes within `timeout_s` + 2 s."""
        async with self._lock:  # no limit: each call before has one
            if self.lost is not None:
                raise SandboxLost(f"{self.name} is gone: {self.lost}")
            self._next_id += 1
            text = json.dumps({**header, "id": self._next_id, "blob": sum(map(len, blobs))}).encode()
            self._reply = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout_s + 30):
                    await self._transport.send(b"".join((LENGTH.pack(len(text)), text, *blobs)))
                # asyncio.wait rather than wait_for: an answer that lies there when a starved loop
                # wakes late is taken, not thrown away for being late
                await asyncio.wait({self._reply}, timeout=timeout_s + GRACE_S)
                if not self._reply.done():
                    raise SandboxLost(f"no answer to {header['verb']} within {timeout_s + GRACE_S:.1f} s")
                reply, blob = self._reply.result()  # no limit: it is done
                if reply.get("id") != self._next_id:
                    raise SandboxLost(f"answer to request {reply.get('id')}, expected {self._next_id}")
                return reply, blob
            except (SandboxLost, OSError, TimeoutError) as error:
                self._reply.cancel()
                await self.abandon(str(error) or type(error).__name__)
                raise SandboxLost(f"{self.name} is gone: {self.lost}") from None
            except asyncio.CancelledError:
                self._reply.cancel()
                await asyncio.shield(self.abandon("its request was cancelled"))
                raise
            finally:
                self._reply = None

    async def abandon(self, reason: str) -> None:
        """Kills the box and lets every later call fail with `reason`."""
        if self.lost is None:
            self.lost = reason
        await self._transport.kill()

    def feed(self, data: bytes) -> None:
        """Bytes from the runner, in any portions."""
        self._buffer += data
        while (frame := self._take_frame()) is not None:
            if self._reply is None or self._reply.done():
                self._break("an answer that nobody asked for")
                return
            self._reply.set_result(frame)

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
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(SandboxLost(reason))


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
