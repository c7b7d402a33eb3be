"""What the runner is doing: commands, streamed processes and shells, each with the ends of its pipes.

Part of the runner: standard library only, shipped into the box by `runner_bundle.py`.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

from consilience.sandboxes.runner_frames import wipe

DRAIN_ROUNDS = 32  # of 64 KiB: more than the largest pipe of an ordinary user holds
MAX_REPORTS = 64  # looked at in one turn of the loop, so that a flood of forged ones starves nobody
SCRIPT_FD, REPORT_FD = 4, 63  # in a shell; bash moves the first out of its children's reach
EXIT_PATIENCE_S = 0.2  # between a shell's last word and its end


class Job:
    """One forked process. `sinks` {descriptor: what takes its output}; `status` once it is reaped."""

    is_shell = False

    def __init__(self, request):
        self.number = request["id"]  # repeated by the reply and the events
        self.pid, self.pidfd, self.status, self.cpu_s = 0, None, None, 0.0
        self.began = time.monotonic()
        limit_s = request.get("timeout_s")
        self.deadline = None if limit_s is None else self.began + limit_s
        self.stdin, self.offset, self.is_input_over = None, 0, True
        self.queue: list[bytearray] = []
        self.sinks: dict[int, Any] = {}
        self.fail_fd = -1
        self.is_over_time = self.is_finished = self.is_broken = self.is_flooded = False
        self.most_inodes: int | None = None  # above which it has flooded the box with files

    @property
    def spared(self):
        """(pid, with its descendants): what the end of another command leaves alive; None when ended."""
        return None if self.status is not None or self.is_over_time else (self.pid, True)

    def feed(self):
        """Moves queued input to the program; how many bytes it took (or never will)."""
        num_taken = 0
        while self.queue and self.stdin is not None:
            view = memoryview(self.queue[0])[self.offset :]
            try:
                num_bytes = os.write(self.stdin, view) if view else 0
            except BlockingIOError:
                return num_taken
            except OSError:  # the program closed its stdin; what comes is dropped
                num_bytes = len(view)
            num_taken += num_bytes
            self.offset += num_bytes
            if num_bytes == len(view):
                wipe(self.queue.pop(0))
                self.offset = 0
        if self.is_input_over and not self.queue and self.stdin is not None and not self.is_shell:
            os.close(self.stdin)
            self.stdin = None
        return num_taken

    def read_failure(self):
        """Why it could not be started, as {"errno", "text"}, or None."""
        try:
            text = os.read(self.fail_fd, 4096)  # no limit: the descriptor does not block
        except BlockingIOError:
            return None
        return json.loads(text) if text else None

    def close(self):
        close_all(fd for fd in (self.pidfd, self.stdin, self.fail_fd, *self.sinks) if fd is not None)
        self.pidfd = self.stdin = None
        self.sinks = {}
        for blob in self.queue:
            wipe(blob)
        self.queue = []


class Stream:
    """Output that is passed on as it comes, as far as the host has given credit: back-pressure."""

    def __init__(self, number, credit):
        self.number, self.credit, self.total, self.is_open = number, credit, 0, True


class Shell(Job):
    """A bash that stays. Its scripts come by a pipe that only it reads, parsed one command at a time.

    The end of a script is a packet on a socket pair whose sender the kernel names: no text and no child
    can forge it. It also carries a token that the script does not hold, so that a script which makes the
    shell itself write there ends the shell, and deceives nobody.
    """

    is_shell = True

    def __init__(self, request):
        super().__init__(request)
        self.name, self.turn, self.token = request["session"], None, b""
        self.report: Any = None  # our end of the socket pair
        self.last_exit, self.is_background, self.is_new = 0, False, True
        self.is_input_over = False

    @property
    def spared(self):
        return (self.pid, self.is_background) if super().spared else None

    def begin(self, request, text, streams):
        """Queues one script (a bytearray, wiped); its output goes to `streams`."""
        self.turn, self.began = request["id"], time.monotonic()
        self.deadline = self.began + request["timeout_s"]
        self.is_background = bool(request.get("background"))
        self.token = os.urandom(16).hex().encode()
        self.sinks = dict(zip(self.sinks, streams, strict=True))
        # the subshell gives the script the last one's $?; what the end does to its jobs is not told
        before = b"(exit %d); builtin eval -- '" % self.last_exit if self.last_exit else b"builtin eval -- '"
        after = b"'; builtin printf '%%s %%d' %s \"$?\" >&%d" % (self.token, REPORT_FD)
        after += b"\n" if self.is_background else b"; builtin disown -a\n"
        self.queue += [bytearray(before), text.replace(b"'", b"'\\''"), bytearray(after)]
        wipe(text)

    def take_report(self):
        """The script's exit status if it has ended, None if not. Each packet comes with SCM_CREDENTIALS (2).

        ValueError if the report is not right, EOFError once nobody can write to it any more.
        """
        for _ in range(MAX_REPORTS):
            try:
                data, ancillary, _, _ = self.report.recvmsg(256, 64)  # no limit: it does not block
            except BlockingIOError:
                return None
            senders = [int.from_bytes(raw[:4], sys.byteorder) for _, kind, raw in ancillary if kind == 2]
            if data and senders != [self.pid]:
                continue  # a child that found the descriptor
            if not data and senders and senders[0] not in (0, self.pid):
                continue
            if not data:
                raise EOFError("the shell closed its report")
            token, _, status = data.partition(b" ")
            if self.turn is None or token != self.token or not status.isdigit() or int(status) > 255:
                raise ValueError("the shell wrote something else to its report")
            return int(status)
        return None

    def end_turn(self, exit_code):
        self.turn, self.deadline, self.last_exit, self.is_new = None, None, exit_code, False

    def close(self):
        if self.report is not None:
            self.report.close()
        super().close()


def make_pipes(job, make_script_pipe):
    """Sets up the job's ends; {target: descriptor} for the child, all to be closed after the fork."""
    fds = {}
    for target in range(4):
        reader, writer = os.pipe()
        mine, fds[target] = (writer, reader) if target == 0 else (reader, writer)
        os.set_blocking(mine, False)
        if target == 0:
            job.stdin = mine
        elif target == 3:
            job.fail_fd = mine
        else:
            job.sinks[mine] = None
    if job.is_shell:
        import _socket

        os.close(job.stdin)
        fds[SCRIPT_FD], job.stdin = make_script_pipe()
        os.set_blocking(job.stdin, False)
        job.report, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        job.report.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
        job.report.setblocking(False)
        fds[REPORT_FD] = other.detach()
    return fds


def pump(fd, capture, scratch):
    """One read; False at the end of the stream or when nothing is there now."""
    try:
        num_bytes = os.readv(fd, [scratch])
    except (BlockingIOError, InterruptedError):
        return False
    capture.take(memoryview(scratch)[:num_bytes])
    return num_bytes > 0


def drain(job, scratch):
    """What a job's pipes still hold, into its captures."""
    for fd, sink in job.sinks.items():
        for _ in range(DRAIN_ROUNDS):
            if not pump(fd, sink, scratch):
                break


def close_all(fds):
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
