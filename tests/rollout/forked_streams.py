"""A `StreamPool` of forked processes: what `ray_streams.py` does with actors, without Ray's seconds."""

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import threading
import time
import traceback

from consilience.conf.errors import ConsilienceError, EngineError
from consilience.rollout.continuous import Inbox, serve
from consilience.rollout.deadlines import REPLACED, Stall, StallLog
from consilience.rollout.listening import Listener, WorkerDied

_LENGTH = struct.Struct("<I")


class Process:
    """A forked worker that serves. Words and answers come back over pipes of their own."""

    def __init__(self, build):
        orders, self.orders = os.pipe()
        self.words, words = os.pipe()
        self.answers, answers = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for number in (self.orders, self.words, self.answers):
                    os.close(number)
                code = _work(build, orders, words, answers)
            except BaseException:
                traceback.print_exc()
                code = 4
            finally:  # never into the test's own code
                os._exit(code)
        for number in (orders, words, answers):
            os.close(number)

    def send(self, *order):
        with contextlib.suppress(BrokenPipeError):
            _write(self.orders, order)

    def answer(self, limit_s):
        return _read(self.answers, limit_s)

    def kill(self):
        for number in (self.orders, self.words, self.answers):
            with contextlib.suppress(OSError):
                os.close(number)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


def _work(build, orders, words, answers):
    inbox = Inbox()
    with contextlib.closing(build()) as worker:

        def obey():
            with contextlib.suppress(EOFError, ConsilienceError, OSError):
                while True:
                    verb, *arguments = _read(orders, None)
                    if verb == "publish":
                        try:
                            inbox.publish(*arguments)
                            _write(answers, None)
                        except ConsilienceError as error:
                            _write(answers, error)
                    else:
                        getattr(inbox, verb)(*arguments)

        threading.Thread(target=obey, daemon=True).start()
        try:
            for batch in serve(worker, inbox):
                _write(words, batch)
            _write(words, None)
            return 0
        except (ConsilienceError, OSError):  # fenced, or the driver is gone
            return 3


class ForkedStreams:
    """build() makes the RolloutWorker in its own process."""

    def __init__(
        self, build, num=2, *, stall_s=30.0, publish_limit_s=30.0, max_restarts=3, most_redispatches=2
    ):
        self.build, self.publish_limit_s = build, publish_limit_s
        self.max_restarts, self.most_redispatches, self.pause_s = max_restarts, most_redispatches, 0.0
        self.log, self.num_replaced, self._current = StallLog(), 0, None
        self.listener = Listener(self, self.log, stall_s)
        self.processes = [Process(build) for _ in range(num)]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in self.processes:
            process.kill()

    # StreamPool

    def open(self, slot, recompute):
        process = self.processes[slot]
        if os.waitpid(process.pid, os.WNOHANG) != (0, 0):
            raise WorkerDied("it is gone")
        return process

    def post(self, slot, jobs, lease):
        self.processes[slot].send("submit", jobs, lease)

    def replace(self, slot):
        for _ in range(self.max_restarts + 1):
            self.processes[slot].kill()
            self.processes[slot] = Process(self.build)
            self.num_replaced += 1
            if self._current is None:
                return
            self._give(slot)
            with contextlib.suppress(EOFError, TimeoutError):
                return self._taken(slot)
        raise EngineError("replaced workers die at their start")

    def publish(self, weights, announced, version):
        self._current = (weights, announced, version)
        for slot in range(len(self.processes)):
            self._give(slot)
        for slot in range(len(self.processes)):
            try:
                self._taken(slot)
            except EOFError:
                self.replace(slot)
            except TimeoutError:
                self.log.add(self.end_process(slot, "publish", self.publish_limit_s, self.publish_limit_s))
                self.replace(slot)

    def end(self, streams, more_s=0.0):
        for process in streams.values():
            process.send("end")
        for process in streams.values():
            with contextlib.suppress(WorkerDied, TimeoutError):
                while self.read(process, 5.0) is not None:
                    pass

    def _give(self, slot):
        self.processes[slot].send("publish", *self._current)

    def _taken(self, slot):
        if (error := self.processes[slot].answer(self.publish_limit_s)) is not None:
            raise error

    # Processes, of `listening.py`.

    def ready(self, streams, limit_s):
        words = {process.words: slot for slot, process in streams.items()}
        return [words[number] for number in select.select(list(words), [], [], limit_s)[0]]

    def read(self, stream, limit_s):
        try:
            return _read(stream.words, limit_s)
        except EOFError:
            raise WorkerDied("killed") from None

    def end_process(self, slot, stage, waited_s, limit_s, uids=()):
        process = self.processes[slot]
        process.kill()
        return Stall(
            stage, waited_s, limit_s, f"worker {slot}", uids, REPLACED, socket.gethostname(), process.pid
        )

    def died(self, slot, waited_s, uids):
        return Stall("death", waited_s, 0.0, f"worker {slot}", uids, REPLACED, pid=self.processes[slot].pid)


def _write(number, message):
    data = pickle.dumps(message)
    data = _LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(number, data) :]


def _read(number, limit_s):
    """A message. EOFError when the other side is gone, TimeoutError when it does not come in time."""
    until = None if limit_s is None else time.monotonic() + limit_s
    return pickle.loads(_exactly(number, *_LENGTH.unpack(_exactly(number, _LENGTH.size, until)), until))


def _exactly(number, count, until):
    data = b""
    while len(data) < count:
        left = None if until is None else max(0.0, until - time.monotonic())
        if not select.select([number], [], [], left)[0]:
            raise TimeoutError
        if not (piece := os.read(number, count - len(data))):
            raise EOFError
        data += piece
    return data
