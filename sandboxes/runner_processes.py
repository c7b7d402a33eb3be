"""What the runner forks, how it confines it, and how it kills all of it.

Part of the runner: standard library only, shipped into the box by `runner_bundle.py`.

A command is waited for on a pidfd, because closing its output is not exiting; what it leaves behind is
killed without forking, because a fork bomb fills the process limit.
"""

import builtins
import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import sys
import time

PRELOADED = (
    "bisect collections contextlib copy datetime functools heapq io itertools math operator random re "
    "string traceback types typing"
)
KILL_PATIENCE_S = 1.5
SPARE_PATIENCE_S = 0.7  # after this also the sessions are killed: a bomb beside them must not win
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36
_HIGH_FD = 64  # above every number a child is given, and below any usual limit of open files


class Confinement:
    """The identity and limits of programs, and the right to act with that identity."""

    def __init__(self, settings):
        """`settings`: the `configure` request, see `Runner.configure`."""
        self.uid, self.nice = settings["uid"], settings["nice"]
        self.workspace = settings["workspace"]
        self.dies_with_parent = bool(settings.get("die_with_parent")) and os.getpid() == 1
        self.rlimits = [
            (getattr(resource, "RLIMIT_" + name), tuple(pair))
            for name, pair in settings["rlimits"].items()
            if hasattr(resource, "RLIMIT_" + name)
        ]
        self.prctl = lambda option, value: -1
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            self.prctl = ctypes.CDLL(None).prctl

    def shield(self):
        """Makes this process unreadable for others and the parent of orphans; True if the first worked."""
        is_shielded = self.prctl(PR_SET_DUMPABLE, 0) == 0
        if os.getpid() != 1:
            self.prctl(PR_SET_CHILD_SUBREAPER, 1)
        if self.uid is not None:
            with contextlib.suppress(PermissionError):
                os.setgroups([])
        return is_shielded

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
            if self.dies_with_parent:
                self.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by the change of uid

    def enter_and_start(self, fds, cwd, start):
        """In a forked child: nothing of the host's channel, own session, limits, uid; never returns.

        `fds`: {target: descriptor}; 3 is where a failure to start is written, and closed by an exec.
        """
        code = 126
        try:
            os.setsid()
            moved = {target: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _HIGH_FD) for target, fd in fds.items()}
            for target, fd in moved.items():
                os.dup2(fd, target, inheritable=target != 3)
            above = 0
            for target in sorted(moved):
                if above < target:  # an empty range would be taken for all there is
                    os.closerange(above, target)
                above = target + 1
            os.closerange(above, 1 << 20)
            for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self.prctl(PR_SET_DUMPABLE, 1)  # or /proc/self would belong to somebody else
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
                file.write("1000")
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, 0, self.nice)
            for which, pair in self.rlimits:
                resource.setrlimit(which, pair)
            if self.uid is not None:
                os.setresgid(self.uid, self.uid, self.uid)
                os.setresuid(self.uid, self.uid, self.uid)
                self.prctl(PR_SET_DUMPABLE, 1)  # the change of uid took it away again
            try:
                os.chdir(self.workspace)
            except PermissionError:  # a command before closed it to everybody, itself included
                os.chmod(self.workspace, 0o1777)
                os.chdir(self.workspace)
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

    def kill_all(self, reap, spared=()):
        """Kills what the box runs until nothing but `spared` is left. False if something does not die.

        `spared`: [(pid, with its descendants)]. `reap()` collects what has ended. If the others cannot
        be killed beside those that are spared, all are.
        """
        began = time.monotonic()
        while True:
            is_alive = self.signal_all(signal.SIGKILL, spared)
            reap()
            waited_s = time.monotonic() - began
            if not is_alive:
                return True
            if waited_s > KILL_PATIENCE_S:
                return False
            if waited_s > SPARE_PATIENCE_S:
                spared = ()
            time.sleep(0.0002)

    def signal_all(self, number, spared=()):
        """One signal to everything of the box but this process and `spared`; whether there was any."""
        # kill(-1) forks nothing and needs no list that a bomb could outrun, but it reaches everything its
        # caller may signal: it is for pid 1, whose namespace is the box, and never for a process outside one
        if not spared and os.getpid() == 1:
            try:
                os.kill(-1, number)
            except ProcessLookupError:
                return False
            return True
        victims = others(spared)
        for pid in victims:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
        return bool(victims)


def others(spared):
    """Pids of the box's processes, from /proc, but for this one and `spared` [(pid, with descendants)]."""
    parents, states = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc") if os.path.isdir("/proc") else ()):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
            parents[int(name)], states[int(name)] = int(fields[1]), fields[0]
    own = os.getpid()
    found = set(parents) if own == 1 else below(parents, own)
    kept = {own, *(pid for pid, _ in spared)}
    for pid, is_with_descendants in spared:
        if is_with_descendants:
            kept |= below(parents, pid)
    # a dead one is a victim only while it waits for us to reap it
    return sorted(p for p in found - kept if states[p] not in (b"Z", b"X") or parents[p] == own)


def below(parents, root_pid):
    """Pids whose chain of `parents` {pid: parent} leads to `root_pid`."""
    children = {}
    for pid, parent in parents.items():
        children.setdefault(parent, []).append(pid)
    found, frontier = set(), [root_pid]
    while frontier:
        fresh = [pid for pid in children.get(frontier.pop(), []) if pid not in found]
        found.update(fresh)
        frontier += fresh
    return found


# -- the interpreter that is already running --------------------------------------------------------


def preload():
    """Modules that small programs import, so that a fork has them, and nothing for the collector to touch."""
    for name in PRELOADED.split():
        __import__(name)
    compile("0", "program.py", "exec")  # its first use builds the syntax tree's types, for 1.3 ms
    gc.collect()
    gc.disable()
    gc.freeze()


def run_program(num_code, workspace):
    """Runs `num_code` bytes of stdin as a fresh `__main__` in this forked interpreter; its exit status."""
    import traceback
    import types

    with open(0, "rb", buffering=0, closefd=False) as raw:
        code = b""
        while len(code) < num_code and (chunk := raw.read(num_code - len(code))):
            code += chunk
    os.close(3)
    sys.stdin, sys.stdout = _text_stream(0, "r"), _text_stream(1, "w")
    sys.stderr = _text_stream(2, "w", errors="backslashreplace")
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


def _text_stream(fd, mode, errors="surrogateescape"):
    return open(fd, mode, encoding="utf-8", errors=errors, closefd=False)
