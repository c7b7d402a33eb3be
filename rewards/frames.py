"""JSON messages over a socket: u32 big-endian length, then UTF-8 JSON. Caps and deadlines on both ends."""

from __future__ import annotations

import json
import socket
import struct
import time
from typing import Any

LENGTH = struct.Struct(">I")
SEND_TIMEOUT_S = 60.0


class FrameSocket:
    """One end of a socket pair. What JSON cannot say crosses as text; readers check what they need."""

    def __init__(self, end: socket.socket, *, max_bytes: int) -> None:
        """`max_bytes` caps one received message."""
        self.end = end
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def send(self, message: Any, *, timeout_s: float = SEND_TIMEOUT_S) -> None:
        """TimeoutError if the other end does not read, OSError if it is gone."""
        data = json.dumps(message, ensure_ascii=False, default=str, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )
        self.end.settimeout(timeout_s)
        self.end.sendall(LENGTH.pack(len(data)) + data)

    def receive(self, deadline: float | None = None) -> Any:
        """The next message, waiting until `deadline` (`time.monotonic()` seconds).

        None is for a child between two requests, which the end of its parent wakes up.

        EOFError when the other end is gone, TimeoutError at the deadline, ValueError on a message over
        the cap or not JSON.
        """
        self._fill(LENGTH.size, deadline)
        (num_bytes,) = LENGTH.unpack(self._buffer[: LENGTH.size])
        if num_bytes > self._max_bytes:
            raise ValueError(f"a message of {num_bytes} bytes; at most {self._max_bytes} are allowed")
        self._fill(LENGTH.size + num_bytes, deadline)
        data = bytes(self._buffer[LENGTH.size : LENGTH.size + num_bytes])
        del self._buffer[: LENGTH.size + num_bytes]
        return json.loads(data.decode("utf-8", "surrogatepass"))

    def close(self) -> None:
        self.end.close()

    def _fill(self, num_bytes: int, deadline: float | None) -> None:
        while len(self._buffer) < num_bytes:
            if deadline is not None:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise TimeoutError
                self.end.settimeout(left_s)
            else:
                self.end.settimeout(None)
            try:
                data = self.end.recv(1 << 16)  # no limit: settimeout above has it
            except ConnectionError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            self._buffer += data
