"""The trusted process inside a box: it alone talks to the host, over its inherited stdin and stdout.

`runner_bundle.py` puts it and its parts (`runner_*.py`, standard library only) into one text that is
copied into the box and started there by `python3 -s -S` (or `-I -S`). It runs no socket that anything
else could open, holds no token of the host, reads no environment.

Verbs: configure (first, once); exec, python, shell (one command at a time, kept output in the reply);
spawn, pack, unpack (output in events, as far as the host gives credit); input, credit, signal (to a
job, without a reply); read, write, reset, ping. The runner ends when its stdin does, and with it (it
is pid 1 of the box) everything inside. Blobs pass through memory that is wiped, because `python`
children are forked from this very process.
"""

import contextlib
import errno
import os
import select
import signal
import stat
import sys

from consilience.sandboxes.runner_files import (
    empty_folder,
    open_inside,
    pack_tree,
    read_whole,
    tell_failure,
    unpack_tree,
)
from consilience.sandboxes.runner_frames import CHUNK_BYTES, Control, wipe
from consilience.sandboxes.runner_jobs import SCRIPT_FD
from consilience.sandboxes.runner_loop import Jobs
from consilience.sandboxes.runner_processes import Confinement, preload, run_program

BASH = ["bash", "--noprofile", "--norc", f"/proc/self/fd/{SCRIPT_FD}"]


class Runner:
    """State of the box: settings from `configure`, buffers, jobs, and the verbs."""

    def __init__(self, control):
        self.control = control
        self.settings = {}
        self.scratch = bytearray(CHUNK_BYTES)

    def configure(self, request):
        """Keys: workspace, writable (folders that reset empties), uid (or null), env, rlimits, nice,
        output_bytes (kept of each stream), die_with_parent, counters [[name, path, field]], remove_at_end,
        num_inodes (files that one writable folder may hold; absent: not watched).

        `rlimits` maps names without the RLIMIT_ prefix to [soft, hard].
        """
        self.settings = request
        self.workspace = request["workspace"]
        self.confinement = Confinement(request)
        self.jobs = Jobs(self.control, self.confinement, request)
        is_shielded = self.confinement.shield()
        os.umask(0o022)
        os.environ.clear()
        os.environ.update(request["env"])
        return {"pid": os.getpid(), "shielded": is_shielded, "python": sys.version.split()[0]}

    # -- the loop ------------------------------------------------------------------------------

    def serve(self):
        self.jobs.watch(self.control.fd_in, select.POLLIN, self.take_request)
        while True:
            self.jobs.turn()

    def take_request(self):
        request = self.control.next_header()
        try:
            reply = getattr(self, "do_" + request["verb"])(request)
        except OSError as error:
            reply = {"errno": error.errno or errno.EIO, "text": error.strerror or str(error)}
        except ValueError as error:  # a NUL or an unencodable character in a path
            reply = {"errno": errno.EINVAL, "text": str(error)}
        while self.control.read_blob_into(self.scratch):  # what a refused request left unread
            pass
        if reply is not None:
            self.control.send({**reply, "id": request["id"]})
        wipe(self.scratch)

    # -- jobs ----------------------------------------------------------------------------------

    def do_exec(self, request):
        self.jobs.start_command(request, self.program(request))

    def do_python(self, request):
        self.jobs.start_command(request, lambda: run_program(request["code_bytes"], self.workspace))

    def do_spawn(self, request):
        self.jobs.start_streamed(request, self.program(request))

    def do_pack(self, request):
        """The workspace as a tar stream, taken while everything else stands still."""
        self.confinement.signal_all(signal.SIGSTOP)
        try:
            self.jobs.start_streamed(request, lambda: tell_failure(pack_tree, self.workspace))
        except OSError:
            self.confinement.signal_all(signal.SIGCONT)
            raise

    def do_unpack(self, request):
        self.jobs.start_streamed(request, lambda: tell_failure(unpack_tree, self.workspace))

    def program(self, request):
        argv, env = request["argv"], {**self.settings["env"], **request["env"]}
        return lambda: os.execvpe(argv[0], argv, env)

    def do_shell(self, request):
        self.jobs.start_script(request, lambda: os.execvpe(BASH[0], BASH, self.settings["env"]))

    def do_input(self, request):
        self.jobs.take_input(request, self.control.read_blob())

    def do_credit(self, request):
        self.jobs.take_credit(request)

    def do_signal(self, request):
        if (job := self.jobs.find(request)) is not None and job.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, request["signal"])  # the end of its main process ends all of it

    # -- files and the box itself --------------------------------------------------------------

    def do_ping(self, request):
        return {"pid": os.getpid()}

    def do_read(self, request):
        with self.confinement.as_model():
            fd = open_inside(self.workspace, request["path"], os.O_RDONLY)
        try:
            data = read_whole(fd, request["max_bytes"])
        finally:
            os.close(fd)
        self.control.send({"id": request["id"]}, data)
        wipe(data)

    def do_write(self, request):
        with self.confinement.as_model():
            flags = os.O_WRONLY | os.O_CREAT
            fd = open_inside(self.workspace, request["path"], flags, make_parents=True)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise PermissionError(errno.EPERM, "not a regular file")
                os.ftruncate(fd, 0)
                while num_bytes := self.control.read_blob_into(self.scratch):
                    view = memoryview(self.scratch)[:num_bytes]
                    while view:
                        view = view[os.write(fd, view) :]
                os.fchmod(fd, request["mode"] & 0o777)
            finally:
                os.close(fd)
        return {}

    def do_reset(self, request):
        is_clean = self.jobs.end_all()
        with self.confinement.as_model():
            for folder in self.settings["writable"]:
                empty_folder(folder)
        self.confinement.uid = request.get("uid", self.confinement.uid)
        return {"clean": is_clean}

    def finish(self):
        """The host is gone or done with us: nothing stays behind."""
        self.confinement.kill_all(self.jobs.reap)
        if self.settings.get("remove_at_end"):
            with contextlib.suppress(OSError):
                empty_folder(self.workspace)
                os.rmdir(self.workspace)


def main():
    sys.dont_write_bytecode = True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control = Control(os.dup(0), os.dup(1))
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    runner = Runner(control)
    try:
        header = control.next_header()
        reply = runner.configure(header)
        os.dup2(nothing, 2)
        os.close(nothing)
        control.send({**reply, "id": header["id"]})
        preload()
        runner.serve()
    except (EOFError, BrokenPipeError):
        runner.finish()
    os._exit(0)
