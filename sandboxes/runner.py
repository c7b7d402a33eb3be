"""The trusted process inside a box: it alone talks to the host, over its inherited stdin and stdout.

Standard library only and one file, because it is copied into the box and started there by
`python3 -s -S runner.py` (or `-I -S`). It runs no socket, holds no token, reads no environment.

Frame: u32 big-endian header length, JSON header, then `header["blob"]` raw bytes. Requests carry an
`id` that the reply repeats. Verbs: configure (first, once), exec, python, read, write, reset, ping.
The runner ends when its stdin does, and with it (it is pid 1 of the box) everything inside.

What holds, and why: a command is waited for on a pidfd, because closing its output is not exiting;
what it leaves behind is killed without forking, because a fork bomb fills the process limit; blobs
pass through buffers that are wiped, because `python` children are forked from this very process.
"""

import builtins
import contextlib
import errno
import fcntl
import gc
import json
import os
import resource
import select
import signal
import stat
import struct
import sys
import time

LENGTH = struct.Struct(">I")
MAX_HEADER_BYTES = 8 << 20
CHUNK_BYTES = 1 << 16
PRELOADED = (
    "bisect collections contextlib copy datetime functools heapq io itertools math operator random re "
    "string traceback types typing"
)
KILL_PATIENCE_S = 1.5
INODE_WATCH_S = 0.05
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36


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


class Runner:
    """State of the box: settings from `configure`, buffers, and the verbs."""

    def __init__(self, control):
        self.control = control
        self.is_init = os.getpid() == 1
        self.settings, self.cpu_s, self.is_flooded = {}, 0.0, False
        self.scratch, self.feeding = bytearray(CHUNK_BYTES), bytearray(CHUNK_BYTES)
        self.prctl = lambda option, value: -1

    def configure(self, request):
        """Keys: workspace, writable (folders that reset empties), uid (or null), env, rlimits, nice,
        output_bytes (kept of each stream), die_with_parent, counters [[name, path, field]], remove_at_end,
        num_inodes (files that one writable folder may hold; absent: not watched).

        `rlimits` maps names without the RLIMIT_ prefix to [soft, hard].
        """
        self.settings = request
        self.rlimits = [
            (getattr(resource, "RLIMIT_" + name), tuple(pair))
            for name, pair in request["rlimits"].items()
            if hasattr(resource, "RLIMIT_" + name)
        ]
        self.streams = (Capture(request["output_bytes"]), Capture(request["output_bytes"]))
        self.uid = request["uid"]
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            self.prctl = ctypes.CDLL(None).prctl
        is_shielded = self.prctl(PR_SET_DUMPABLE, 0) == 0
        if not self.is_init:
            self.prctl(PR_SET_CHILD_SUBREAPER, 1)
        if self.uid is not None:
            with contextlib.suppress(PermissionError):
                os.setgroups([])
        os.umask(0o022)
        os.environ.clear()
        os.environ.update(request["env"])
        return {"pid": os.getpid(), "shielded": is_shielded, "python": sys.version.split()[0]}

    def ping(self, request):
        return {"pid": os.getpid()}

    # -- commands ------------------------------------------------------------------------------

    def exec(self, request):
        argv, env = request["argv"], {**self.settings["env"], **request["env"]}

        def start():
            os.execvpe(argv[0], argv, env)

        return self.run(request, start)

    def python(self, request):
        return self.run(request, lambda: run_program(request["code_bytes"], self.settings["workspace"]))

    def run(self, request, start):
        """Fork, confine, `start()`; capture until the main process ends or time is up; kill the rest."""
        began, self.is_flooded = time.monotonic(), False
        with contextlib.ExitStack() as parent_ends:
            with contextlib.ExitStack() as child_ends:
                pipes = [os.pipe() for _ in range(4)]
                for number, (reader, writer) in enumerate(pipes):
                    mine, theirs = (writer, reader) if number == 0 else (reader, writer)
                    os.set_blocking(mine, False)
                    parent_ends.callback(os.close, mine)
                    child_ends.callback(os.close, theirs)
                (in_r, in_w), (out_r, out_w), (err_r, err_w), (fail_r, fail_w) = pipes
                feed = self.open_feed(in_w)
                pid = os.fork()
                if pid == 0:
                    self.confine_and_start((in_r, out_w, err_w, fail_w), request.get("cwd"), start)
            captures = {out_r: self.streams[0], err_r: self.streams[1]}
            status = self.follow(pid, captures, feed, began + request["timeout_s"])
            is_clean = self.kill_all()
            for fd, stream in captures.items():
                while self.pump(fd, stream):
                    pass
            failure = self.read_failure(fail_r)
        exit_code = None if status is None else os.waitstatus_to_exitcode(status)
        return self.report(exit_code, failure, is_clean, time.monotonic() - began)

    def open_feed(self, in_w):
        """A second descriptor of the program's stdin if its blob must be fed, else None.

        A blob that fits a pipe goes in before the fork, so that the common case needs no feeding.
        The descriptor in `in_w` stays with the caller and is replaced, so that closing the feed is
        what ends the program's input.
        """
        feed = None
        capacity = fcntl.fcntl(in_w, fcntl.F_GETPIPE_SZ) if hasattr(fcntl, "F_GETPIPE_SZ") else CHUNK_BYTES
        if self.control.blob_left > min(capacity, CHUNK_BYTES):  # a user who holds many gets small ones
            feed = os.dup(in_w)
        while feed is None and (num_bytes := self.control.read_blob_into(self.scratch)):
            os.write(in_w, memoryview(self.scratch)[:num_bytes])
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(nothing, in_w, inheritable=False)
        os.close(nothing)
        return feed

    def follow(self, pid, captures, feed_fd, deadline):
        """Wait status of the main process, or None when the deadline came first."""
        poller = select.poll()
        for fd in captures:
            poller.register(fd, select.POLLIN)
        pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
        if pidfd is not None:
            poller.register(pidfd, select.POLLIN)
        poller.register(self.control.fd_in, 0)  # reports only that the host is gone
        pending = memoryview(b"")
        if feed_fd is not None:
            poller.register(feed_fd, select.POLLOUT)
        watch = self.inode_watch()
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                if watch is not None:
                    left_s = min(left_s, INODE_WATCH_S)
                    if watch():
                        self.is_flooded = True
                        return None
                if pidfd is None:  # systems without pidfds: look every few milliseconds
                    left_s = min(left_s, 0.005)
                    done, status, used = os.wait4(pid, os.WNOHANG)
                    if done:
                        self.cpu_s = used.ru_utime + used.ru_stime
                        return status
                for fd, events in poller.poll(max(1, int(left_s * 1000))):
                    if fd == pidfd:
                        _, status, used = os.wait4(pid, 0)  # no limit: its pidfd says that it has ended
                        self.cpu_s = used.ru_utime + used.ru_stime
                        return status
                    if fd == self.control.fd_in:
                        raise EOFError
                    if feed_fd is not None and fd == feed_fd:
                        pending = self.feed(feed_fd, pending)
                        if pending is None:
                            poller.unregister(feed_fd)
                            os.close(feed_fd)
                            feed_fd = None
                    elif not self.pump(fd, captures[fd]) or events == select.POLLNVAL:
                        poller.unregister(fd)
            return None
        finally:
            for fd in (pidfd, feed_fd):
                if fd is not None:
                    os.close(fd)

    def inode_watch(self):
        """A function that tells whether the command made too many files, or None if nobody asked.

        A flood of an earlier command is no fault of this one: only one that grows counts.
        """
        if not self.settings.get("num_inodes"):
            return None
        most = max(self.settings["num_inodes"], self.num_inodes())
        return lambda: self.num_inodes() > most

    def num_inodes(self):
        infos = [os.statvfs(folder) for folder in self.settings["writable"]]
        return max(info.f_files - info.f_ffree for info in infos)

    def feed(self, fd, pending):
        """Moves the next piece of the request's blob to the program; None when that is over."""
        if not pending:
            num_bytes = self.control.read_blob_into(self.feeding)
            pending = memoryview(self.feeding)[:num_bytes]
        try:
            pending = pending[os.write(fd, pending) :] if pending else pending
        except BlockingIOError:
            return pending
        except OSError:  # the program closed its stdin; the rest is dropped by run()
            return None
        return pending if pending or self.control.blob_left else None

    def pump(self, fd, capture):
        """One read; False at the end of the stream (or when nothing is there after the kill)."""
        try:
            num_bytes = os.readv(fd, [self.scratch])
        except (BlockingIOError, InterruptedError):
            return False
        capture.take(memoryview(self.scratch)[:num_bytes])
        return num_bytes > 0

    def read_failure(self, fd):
        try:
            text = os.read(fd, 4096)  # no limit: the descriptor does not block
        except BlockingIOError:
            return None
        return json.loads(text) if text else None

    def report(self, exit_code, failure, is_clean, wall_s):
        out, err = self.streams
        disk = os.statvfs(self.settings["workspace"])
        header = {
            "exit": exit_code,
            "counters": self.count(),
            "failure": failure,
            "clean": is_clean,
            "is_full": disk.f_bavail == 0,
            "is_flooded": self.is_flooded,
            "stdout_bytes": out.total,
            "stderr_bytes": err.total,
            "stdout_kept": sum(len(part) for part in out.parts()),
            "wall_s": wall_s,
            "cpu_s": self.cpu_s,
        }
        return (header, *out.parts(), *err.parts())

    def count(self):
        """What the box's own control group has counted, by name; 0 where a file is not there."""
        found = {}
        for name, path, field in self.settings["counters"]:
            found[name] = found.get(name, 0)
            with contextlib.suppress(OSError, ValueError), open(path) as file:
                found[name] += sum(int(line.split()[1]) for line in file if line.startswith(field + " "))
        return found

    def confine_and_start(self, fds, cwd, start):
        """In the child: nothing of the host's channel, own session, limits, uid; never returns."""
        code = 126
        try:
            os.setsid()
            for target, fd in enumerate(fds):
                os.dup2(fd, target, inheritable=target < 3)
            os.closerange(4, 1 << 20)
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self.prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would belong to somebody else
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, self.settings["nice"])
            for which, pair in self.rlimits:
                resource.setrlimit(which, pair)
            if self.uid is not None:
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                self.prctl(PR_SET_DUMPABLE, 1)  # the change of uid took it away again
            try:
                os.chdir(self.settings["workspace"])
            except PermissionError:  # a command before closed it to everybody, itself included
                os.chmod(self.settings["workspace"], 0o1777)
                os.chdir(self.settings["workspace"])
            if cwd:
                os.chdir(cwd)
            code = start()
        except BaseException as error:
            number = getattr(error, "errno", None) or 0
            with contextlib.suppress(OSError):
                os.write(3, json.dumps({"errno": number, "text": str(error)[:500]}).encode())
        finally:
            os._exit(code if isinstance(code, int) else 126)

    # -- killing -------------------------------------------------------------------------------

    def kill_all(self):
        """Kills whatever the box runs, until nothing is left. False if something does not die."""
        deadline = time.monotonic() + KILL_PATIENCE_S
        while True:
            is_alive = self.kill_once()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            if not is_alive:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)

    def kill_once(self):
        if self.is_init:  # kill(-1) reaches the whole pid namespace, and only as its pid 1
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                return False
            return True
        victims = descendants(os.getpid())
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return bool(victims)

    # -- files ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def as_model(self):
        """Files are opened with the model's rights. Real and saved uid stay ours: it cannot signal us."""
        if self.uid is None:
            yield
            return
        os.setegid(self.uid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(0)
            if self.is_init and self.settings.get("die_with_parent"):
                self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by the change of uid

    def open_inside(self, path, flags, *, make_parents=False):
        """A descriptor below the workspace; every step refuses links, so nothing leads outside."""
        workspace = self.settings["workspace"]
        if path.startswith(workspace + "/"):
            path = path[len(workspace) :].lstrip("/")
        *parents, name = [part for part in path.split("/") if part != "."]
        if path.startswith("/") or not name or "" in parents or ".." in (*parents, name):
            raise PermissionError(errno.EPERM, "the path leaves the workspace")
        here = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parents:
                if make_parents:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=here)
                below = os.open(
                    part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here
                )
                os.close(here)
                here = below
            return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=here)
        finally:
            os.close(here)

    def read(self, request):
        with self.as_model():
            fd = self.open_inside(request["path"], os.O_RDONLY)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise PermissionError(errno.EPERM, "not a regular file")
            if info.st_size > request["max_bytes"]:
                raise OSError(
                    errno.EFBIG, f"it holds {info.st_size} bytes, max_bytes is {request['max_bytes']}"
                )
            data = bytearray(info.st_size)
            view, num_read = memoryview(data), 0
            while num_read < len(data):
                num_bytes = os.readv(fd, [view[num_read:]])
                if not num_bytes:
                    break
                num_read += num_bytes
        finally:
            os.close(fd)
        self.control.send({"id": request["id"]}, view[:num_read])
        data[:] = bytes(len(data))
        return None

    def write(self, request):
        with self.as_model():
            fd = self.open_inside(request["path"], os.O_WRONLY | os.O_CREAT, make_parents=True)
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

    def reset(self, request):
        is_clean = self.kill_all()
        with self.as_model():
            for folder in self.settings["writable"]:
                empty_folder(folder)
        return {"clean": is_clean}

    def finish(self):
        """The host is gone or done with us: nothing stays behind."""
        self.kill_all()
        if self.settings.get("remove_at_end"):
            with contextlib.suppress(OSError):
                empty_folder(self.settings["workspace"])
                os.rmdir(self.settings["workspace"])

    def serve(self):
        verbs = {"exec": self.exec, "python": self.python, "read": self.read, "write": self.write}
        verbs |= {"reset": self.reset, "ping": self.ping}
        while True:
            request = self.control.next_header()
            try:
                reply = verbs[request["verb"]](request)
            except EOFError:
                raise
            except OSError as error:
                reply = {"errno": error.errno or errno.EIO, "text": error.strerror or str(error)}
            except ValueError as error:  # a NUL or an unencodable character in a path
                reply = {"errno": errno.EINVAL, "text": str(error)}
            while self.control.read_blob_into(self.scratch):  # what a refused request left unread
                pass
            if reply is not None:
                header, *parts = reply if isinstance(reply, tuple) else (reply,)
                self.control.send({**header, "id": request["id"]}, *parts)
            self.wipe()

    def wipe(self):
        """Nothing of one request stays in memory that a later `python` child inherits."""
        self.scratch[:] = bytes(CHUNK_BYTES)
        self.feeding[:] = bytes(CHUNK_BYTES)
        for stream in self.streams:
            stream.wipe()


def run_program(num_code, workspace):
    """Runs `num_code` bytes of stdin as a fresh `__main__` in this forked interpreter; its exit status."""
    import traceback
    import types

    with open(0, "rb", buffering=0, closefd=False) as raw:
        code = b""
        while len(code) < num_code and (chunk := raw.read(num_code - len(code))):
            code += chunk
    os.close(3)
    sys.stdin, sys.stdout = text_stream(0, "r"), text_stream(1, "w")
    sys.stderr = text_stream(2, "w", errors="backslashreplace")
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    main = types.ModuleType("__main__")
    sys.modules["__main__"], sys.argv, sys.path[0] = main, ["program.py"], workspace
    builtins.exit = builtins.quit = sys.exit  # what `site` would have put there
    status = 0
    gc.enable()
    try:
        exec(compile(code, "program.py", "exec"), main.__dict__)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException as error:
        trace = error.__traceback__.tb_next if error.__traceback__ else None
        traceback.print_exception(type(error), error, trace)
        status = 1
    with contextlib.suppress(BaseException):
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        import atexit

        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 120  # what the interpreter itself returns for a failed flush
    return status & 0xFF


def text_stream(fd, mode, errors="surrogateescape"):
    return open(fd, mode, encoding="utf-8", errors=errors, closefd=False)


def preload():
    """Modules that small programs import, so that a fork has them, and nothing for the collector to touch."""
    for name in PRELOADED.split():
        __import__(name)
    compile("0", "program.py", "exec")  # its first use builds the syntax tree's types, for 1.3 ms
    gc.collect()
    gc.disable()
    gc.freeze()


def descendants(root_pid):
    """Pids below `root_pid`, from /proc; where there is none, its children's sessions are out of reach."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            if fields[0] not in (b"Z", b"X") or int(fields[1]) == root_pid:
                children.setdefault(int(fields[1]), []).append(int(name))
    found, frontier = [], [root_pid]
    while frontier:
        below = children.get(frontier.pop(), [])
        found += below
        frontier += below
    return found


def empty_folder(path):
    """Removes all that lies below, at constant depth: deeper folders are first moved up to the top."""
    for name in os.listxattr(path) if hasattr(os, "listxattr") else ():
        with contextlib.suppress(OSError):
            os.removexattr(path, name)
    with contextlib.suppress(PermissionError):
        os.chmod(path, 0o1777)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    counter = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                os.chmod(name, 0o700, dir_fd=top)
                folder = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top
                )
                try:
                    for entry in os.listdir(folder):
                        if not stat.S_ISDIR(os.lstat(entry, dir_fd=folder).st_mode):
                            os.unlink(entry, dir_fd=folder)
                            continue
                        os.chmod(entry, 0o700, dir_fd=folder)
                        counter += 1
                        os.rename(
                            entry,
                            f".moved-{time.monotonic_ns()}-{counter}",
                            src_dir_fd=folder,
                            dst_dir_fd=top,
                        )
                finally:
                    os.close(folder)
                os.rmdir(name, dir_fd=top)
    finally:
        os.close(top)


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


if __name__ == "__main__":
    main()
