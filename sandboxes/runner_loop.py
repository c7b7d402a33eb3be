"""The runner's jobs: started, fed, listened to, ended; one loop for all of them, on pidfds and pipes.

Part of the runner: standard library only, shipped into the box by `runner_bundle.py`.

A command (exec, python, a shell's script) keeps its output here, and there is one at a time. Streamed
jobs and idle shells go on beside it. When any of them ends, everything is killed that belongs to none
that goes on.
"""

import contextlib
import errno
import math
import os
import select
import signal
import time

from consilience.sandboxes.runner_frames import CHUNK_BYTES, Capture, wipe
from consilience.sandboxes.runner_jobs import (
    EXIT_PATIENCE_S,
    SCRIPT_FD,
    Job,
    Shell,
    Stream,
    close_all,
    drain,
    make_pipes,
    pump,
)

MAX_JOBS = 16  # shells and streamed processes of one box
TICK_S = 0.25  # how long an orphan of a running job may stay unreaped
INODE_WATCH_S = 0.05
NO_PIDFD_TICK_S = 0.005  # systems without pidfds: look every few milliseconds


class Jobs:
    """Those whose reply is still to come, and shells. `settings`: the `configure` request."""

    def __init__(self, control, confinement, settings):
        self.control, self.confinement, self.settings = control, confinement, settings
        self.workspace = settings["workspace"]
        self.streams = (Capture(settings["output_bytes"]), Capture(settings["output_bytes"]))
        self.scratch = bytearray(CHUNK_BYTES)
        self.all = []
        self.command = None  # the one of them whose output is being kept
        self.poller, self.handlers = select.poll(), {}

    # -- the loop ------------------------------------------------------------------------------

    def turn(self):
        """Waits for something to happen, and does what it asks for."""
        for fd, _ in self.poller.poll(self.patience_ms()):
            if fd in self.handlers:  # or one before it has ended the job
                handler, *arguments = self.handlers[fd]
                handler(*arguments)
        if self.all:
            self.reap()
            self.end_jobs()

    def watch(self, fd, events, handler, *arguments):
        self.poller.register(fd, events)
        self.handlers[fd] = (handler, *arguments)

    def unwatch(self, fd):
        if self.handlers.pop(fd, None) is not None:
            self.poller.unregister(fd)

    def patience_ms(self):
        """Until the next deadline; at most a tick while anything runs."""
        if not self.all:
            return None
        now = time.monotonic()
        waits_s = [j.deadline - now for j in self.all if j.deadline is not None and not j.is_finished]
        waits_s.append(TICK_S if all(job.pidfd is not None for job in self.all) else NO_PIDFD_TICK_S)
        if self.settings.get("num_inodes") and len(waits_s) > 1:
            waits_s.append(INODE_WATCH_S)
        return max(0, math.ceil(min(waits_s) * 1000))

    def allowed_inodes(self):
        """A flood of an earlier command is no fault of this one: only one that grows counts."""
        allowed = self.settings.get("num_inodes")
        return max(allowed, self.num_inodes()) if allowed else None

    def num_inodes(self):
        infos = [os.statvfs(folder) for folder in self.settings["writable"]]
        return max(info.f_files - info.f_ffree for info in infos)

    def reap(self):
        """Collects whatever has ended: jobs keep their status, of others nothing is left."""
        by_pid = {job.pid: job for job in self.all}
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, used = os.wait4(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in by_pid:
                    by_pid[pid].status = status
                    by_pid[pid].cpu_s = used.ru_utime + used.ru_stime

    def end_jobs(self):
        now = time.monotonic()
        for job in list(self.all):
            if job.status is None and job.deadline is not None and not job.is_finished:
                job.is_flooded = job.most_inodes is not None and self.num_inodes() > job.most_inodes
                job.is_over_time |= job.is_flooded or now >= job.deadline
            if (job.status is not None or job.is_over_time) and not job.is_finished:
                self.finish_job(job)

    # -- starting and feeding -----------------------------------------------------------------

    def start_command(self, request, action):
        self.refuse_second_command()
        job = Job(request)
        self.start(job, request, action, self.streams)
        self.command = job

    def start_streamed(self, request, action):
        if len(self.all) >= MAX_JOBS:
            raise BlockingIOError(errno.EAGAIN, f"{MAX_JOBS} processes are kept already")
        self.start(Job(request), request, action, [Stream(n, request["credit"]) for n in (1, 2)])

    def start_script(self, request, action):
        """A script in the named shell, which `action` starts when there is none."""
        self.refuse_second_command()
        text = self.control.read_blob()
        self.reap()
        self.end_jobs()
        shell = next((job for job in self.all if job.is_shell and job.name == request["session"]), None)
        if shell is None:
            if len(self.all) >= MAX_JOBS:
                raise BlockingIOError(errno.EAGAIN, f"{MAX_JOBS} processes are kept already")
            shell = self.start_shell(request, action)
        shell.begin(request, text, self.streams)
        shell.most_inodes = self.allowed_inodes()
        self.command = shell
        for fd in shell.sinks:
            self.watch(fd, select.POLLIN, self.on_output, shell, fd)
        self.feed(shell)

    def start_shell(self, request, action):
        shell = Shell(request)
        self.start(shell, request, action, self.streams)
        shell.queue.append(bytearray(b"exec %d<&-\n" % SCRIPT_FD))
        self.watch(shell.report.fileno(), select.POLLIN, self.on_report, shell)
        return shell

    def take_input(self, request, blob):
        job = self.find(request)
        if job is not None and job.stdin is not None:
            job.queue.append(blob)
            job.is_input_over = bool(request.get("is_last"))
            self.feed(job)
        elif job is not None and blob:  # nobody reads it any more
            self.control.send({"id": job.number, "event": "taken", "bytes": len(blob)})

    def take_credit(self, request):
        job = self.find(request)
        for fd, sink in job.sinks.items() if job is not None else ():
            if sink.number == request["stream"] and sink.is_open:
                sink.credit += request["bytes"]
                self.watch(fd, select.POLLIN, self.on_output, job, fd)

    def refuse_second_command(self):
        if self.command is not None:
            raise BlockingIOError(errno.EBUSY, "another command runs")

    def start(self, job, request, action, sinks):
        """Fork, confine, `action()`. What fits the pipe of its input goes in before the fork."""
        fds = make_pipes(job, self.make_script_pipe)
        job.sinks = dict(zip(job.sinks, sinks, strict=True))
        if not job.is_shell:
            job.queue.append(self.control.read_blob())
            job.is_input_over = not request.get("more")
        num_taken = job.feed()
        try:
            job.pid = os.fork()
            if job.pid == 0:
                self.confinement.enter_and_start(fds, request.get("cwd"), action)
        except OSError:
            job.close()
            raise
        finally:
            close_all(fds.values())
        job.most_inodes = self.allowed_inodes()
        self.all.append(job)
        if hasattr(os, "pidfd_open"):
            job.pidfd = os.pidfd_open(job.pid)
            self.watch(job.pidfd, select.POLLIN, self.reap)
        for fd in job.sinks:
            self.watch(fd, select.POLLIN, self.on_output, job, fd)
        self.feed(job, num_taken)

    def make_script_pipe(self):
        """A pipe that the shell may open a second time by its name: it must be the model's own."""
        with self.confinement.as_model():
            return os.pipe()

    def feed(self, job, num_taken=0):
        """Passes on queued input, now and whenever the program can take more."""
        if job.stdin is None:
            return
        fd = job.stdin
        num_taken += job.feed()
        if job.queue and job.stdin is not None:
            self.watch(fd, select.POLLOUT, self.feed, job)
        else:
            self.unwatch(fd)
        if num_taken and not job.is_shell:
            self.control.send({"id": job.number, "event": "taken", "bytes": num_taken})

    def on_output(self, job, fd):
        sink = job.sinks[fd]
        if isinstance(sink, Capture):
            if not pump(fd, sink, self.scratch):
                self.unwatch(fd)
            return
        try:
            num_bytes = os.readv(fd, [memoryview(self.scratch)[: min(sink.credit, CHUNK_BYTES)]])
        except (BlockingIOError, InterruptedError):
            return
        header = {"id": job.number, "event": "out" if num_bytes else "end", "stream": sink.number}
        self.control.send(header, memoryview(self.scratch)[:num_bytes])
        sink.credit -= num_bytes
        sink.total += num_bytes
        sink.is_open = num_bytes > 0
        if not sink.is_open or not sink.credit:
            self.unwatch(fd)
        if job.is_finished and not any(stream.is_open for stream in job.sinks.values()):
            self.forget(job)

    def on_report(self, shell):
        try:
            exit_code = shell.take_report()
        except EOFError:  # it is ending, or it will never tell
            self.unwatch(shell.report.fileno())
            shell.is_broken, shell.deadline = True, time.monotonic() + EXIT_PATIENCE_S
            return
        except ValueError:  # it is not to be trusted with another script
            shell.is_broken = shell.is_over_time = True
            return
        if exit_code is not None:
            number, state = shell.turn, "new" if shell.is_new else "kept"
            shell.end_turn(exit_code)
            self.command = None
            self.reply_kept(shell, number, exit_code, state)

    def find(self, request):
        return next((job for job in self.all if job.number == request["job"] and not job.is_shell), None)

    # -- the end of jobs -----------------------------------------------------------------------

    def finish_job(self, job):
        """The main process has ended or its time is up: nothing that it started goes on."""
        job.is_finished = True
        if job.pidfd is not None:
            self.unwatch(job.pidfd)
        status = None if job.is_over_time else job.status
        exit_code = None if status is None else os.waitstatus_to_exitcode(status)
        if job is self.command:
            self.command = None
        if job.is_shell:
            if job.turn is not None:
                self.reply_kept(job, job.turn, exit_code, "ended")
            else:
                self.kill_rest()
            self.forget(job)
        elif isinstance(next(iter(job.sinks.values())), Capture):
            self.reply_kept(job, job.number, exit_code, None)
            self.forget(job)
        else:
            is_clean = self.kill_rest()
            report = self.report(job, exit_code, is_clean)
            self.control.send({**report, "id": job.number, "event": "exit"})
            if not any(stream.is_open for stream in job.sinks.values()):
                self.forget(job)

    def reply_kept(self, job, number, exit_code, shell_state):
        """The reply of a command whose output was kept here."""
        is_clean = self.kill_rest()
        drain(job, self.scratch)
        for fd in job.sinks:
            self.unwatch(fd)
        out, err = self.streams
        report = self.report(job, exit_code, is_clean)
        report |= {"stdout_bytes": out.total, "stderr_bytes": err.total, "shell": shell_state}
        report["is_broken"] = job.is_broken and exit_code is None
        report["stdout_kept"] = sum(len(part) for part in out.parts())
        self.control.send({**report, "id": number}, *out.parts(), *err.parts())
        for stream in self.streams:
            stream.wipe()
        wipe(self.scratch)

    def kill_rest(self):
        """Kills what runs and belongs to no job that goes on, and lets what stood still go on."""
        is_clean = self.confinement.kill_all(self.reap, [job.spared for job in self.all if job.spared])
        if any(job.spared for job in self.all):
            self.confinement.signal_all(signal.SIGCONT)
        return is_clean

    def forget(self, job):
        for fd in (job.pidfd, job.stdin, *job.sinks, job.report.fileno() if job.is_shell else None):
            if fd is not None:
                self.unwatch(fd)
        is_streamed = isinstance(next(iter(job.sinks.values())), Stream)
        totals = [sink.total for sink in job.sinks.values()]
        job.close()
        self.all.remove(job)
        if is_streamed:
            self.control.send({"id": job.number, "stdout_bytes": totals[0], "stderr_bytes": totals[1]})

    def report(self, job, exit_code, is_clean):
        disk = os.statvfs(self.workspace)
        return {
            "exit": exit_code,
            "counters": self.count(),
            "failure": job.read_failure(),
            "clean": is_clean,
            "is_full": disk.f_bavail == 0,
            "is_flooded": job.is_flooded,
            "wall_s": time.monotonic() - job.began,
            "cpu_s": job.cpu_s,
        }

    def count(self):
        """What the box's own control group has counted, by name; 0 where a file is not there."""
        found = {}
        for name, path, field in self.settings["counters"]:
            found[name] = found.get(name, 0)
            with contextlib.suppress(OSError, ValueError), open(path) as file:
                found[name] += sum(int(line.split()[1]) for line in file if line.startswith(field + " "))
        return found

    def end_all(self):
        is_clean = self.confinement.kill_all(self.reap)
        self.end_jobs()
        for job in list(self.all):  # streamed ones whose output nobody took
            self.forget(job)
        self.command = None
        return is_clean
