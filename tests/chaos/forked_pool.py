"""A sampler whose worker is a forked process, so that hundreds of them can be killed in a minute.

It does what `RolloutPool` does with leases: fence, take, hand over, hear, start again with what is missing.
"""

import contextlib
import os
import pickle
import select
import struct
import traceback

from consilience.conf.errors import EngineError
from consilience.rollout.lease import fence, take_lease

_LENGTH = struct.Struct("<I")
MOST_BARREN = 100  # workers in a row: more than that no kills explain


class ForkedPool:
    """build(version) makes the RolloutWorker in its own process; `pid_file` says which one is the newest.

    A worker that says nothing for `stall_s` is left alone, under a fence: it may wake up.
    """

    def __init__(self, build, pid_file, stall_s=1.0):
        self.build, self.pid_file, self.stall_s = build, pid_file, stall_s
        self.version = 0

    def generate(self, jobs, on_progress=None, *, durable):
        fence(durable.log_folder)
        records, num_barren = {}, 0
        while missing := [job for job in jobs if job.uid not in records]:
            lease = take_lease(durable.log_folder, "forked", survives_power=durable.survives_power)
            pid, pipe = self._start(missing, lease)
            num_barren += 1
            with contextlib.closing(pipe):
                for batch in self._batches(pipe):
                    num_barren = 0
                    durable.keep(batch)
                    records |= {record.uid: record for record in batch}
            fence(durable.log_folder, [lease.epoch])
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            if num_barren == MOST_BARREN:
                raise RuntimeError(f"{MOST_BARREN} workers in a row gave nothing; their errors stand above")
        return [records[job.uid] for job in jobs]

    def _start(self, jobs, lease):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            os._exit(self._work(jobs, lease, os.fdopen(writer, "wb")))
        os.close(writer)
        with open(self.pid_file, "a") as file:
            file.write(f"{pid}\n")
        return pid, os.fdopen(reader, "rb", buffering=0)

    def _work(self, jobs, lease, pipe):
        """(worker process) Its exit code."""
        try:
            with contextlib.closing(self.build(self.version)) as worker:
                for batch in worker.stream(jobs, lease):
                    message = pickle.dumps(batch)
                    pipe.write(_LENGTH.pack(len(message)) + message)
                    pipe.flush()
            return 0
        except (EngineError, BrokenPipeError):  # fenced, or the driver is gone
            return 3
        except BaseException:
            traceback.print_exc()
            return 4

    def _batches(self, pipe):
        """Until the worker ends, dies or says nothing; half a message is none."""
        while (head := self._read(pipe, _LENGTH.size)) is not None:
            message = self._read(pipe, *_LENGTH.unpack(head))
            if message is None:
                return
            yield pickle.loads(message)

    def _read(self, pipe, count):
        data = b""
        while len(data) < count:
            if not select.select([pipe], [], [], self.stall_s)[0]:
                return None
            piece = pipe.read(count - len(data))
            if not piece:
                return None
            data += piece
        return data
