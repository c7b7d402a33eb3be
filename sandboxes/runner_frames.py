"""The runner's end of the channel, and memory of fixed size for what programs print.

Part of the runner: standard library only, shipped into the box by `runner_bundle.py`.

Frame: u32 big-endian header length, JSON header, then `header["blob"]` raw bytes. A request carries
an `id`; its one reply repeats it, and so do the events that may come before (`event`: taken, out,
end, exit).
"""

import json
import os
import struct

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 8 << 20
CHUNK_BYTES = 1 << 16  # also the capacity of a pipe, so that a blob this small never blocks


class Control:
    """The two ends of the host's channel. `blob_left` bytes of the current request are still unread."""

    def __init__(self, fd_in, fd_out):
        self.fd_in, self.fd_out, self.blob_left = fd_in, fd_out, 0

    def read_exactly(self, num_bytes):
        data = b""
        while len(data) < num_bytes:
            chunk = os.read(self.fd_in, num_bytes - len(data))  # no limit: idle until the host asks or ends
            if not chunk:
                raise EOFError
            data += chunk
        return data

    def next_header(self):
        (num_bytes,) = LENGTH.unpack(self.read_exactly(LENGTH.size))
        if num_bytes > MAX_HEADER_BYTES:
            raise EOFError
        header = json.loads(self.read_exactly(num_bytes))
        self.blob_left = header.get("blob", 0)
        return header

    def read_blob_into(self, buffer):
        """Bytes put into `buffer` (0 when the blob is used up); EOFError when the host is gone."""
        if not self.blob_left:
            return 0
        num_bytes = os.readv(self.fd_in, [memoryview(buffer)[: min(self.blob_left, len(buffer))]])
        if not num_bytes:
            raise EOFError
        self.blob_left -= num_bytes
        return num_bytes

    def read_blob(self):
        """All that is left of the blob, in memory that its user wipes."""
        data = bytearray(self.blob_left)
        view, num_read = memoryview(data), 0
        while num_read < len(data):
            num_read += self.read_blob_into(view[num_read:])
        return data

    def send(self, header, *parts):
        header["blob"] = sum(len(part) for part in parts)
        text = json.dumps(header).encode()
        for part in (LENGTH.pack(len(text)) + text, *parts):
            view = memoryview(part)
            while view:
                view = view[os.write(self.fd_out, view) :]


class Capture:
    """Head and tail of a stream in fixed memory, with the exact count; constant time per chunk."""

    def __init__(self, cap_bytes):
        self.head = bytearray(cap_bytes - cap_bytes // 2)
        self.tail = bytearray(cap_bytes // 2)
        self.total = 0

    def take(self, chunk):
        num_head = min(len(chunk), max(0, len(self.head) - self.total))
        if num_head:
            self.head[self.total : self.total + num_head] = chunk[:num_head]
        self.total += len(chunk)
        rest = chunk[num_head:]
        if not len(rest) or not self.tail:
            return
        rest = rest[-len(self.tail) :]
        start = (self.total - len(self.head) - len(rest)) % len(self.tail)
        num_first = min(len(rest), len(self.tail) - start)
        self.tail[start : start + num_first] = rest[:num_first]
        self.tail[: len(rest) - num_first] = rest[num_first:]

    def parts(self):
        """What was kept, in order: head, then the last bytes."""
        num_after_head = self.total - len(self.head)
        if num_after_head <= 0:
            return [memoryview(self.head)[: self.total]]
        if num_after_head <= len(self.tail):
            return [self.head, memoryview(self.tail)[:num_after_head]]
        start = num_after_head % len(self.tail) if self.tail else 0
        return [self.head, memoryview(self.tail)[start:], memoryview(self.tail)[:start]]

    def wipe(self):
        used_tail = min(len(self.tail), max(0, self.total - len(self.head)))
        self.head[: min(self.total, len(self.head))] = bytes(min(self.total, len(self.head)))
        self.tail[:used_tail] = bytes(used_tail)
        self.total = 0


def wipe(buffer):
    """Zeroes: nothing of one request stays in memory that a later fork of the runner inherits."""
    buffer[:] = bytes(len(buffer))
