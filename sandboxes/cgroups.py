"""Caps of one box on memory, processes and processors by control groups, version 1 or 2, where allowed.

Groups are named `consilience-<owner pid>-<owner start>-<box>`, so that the next start can tell whose
owner is dead; the owner's janitor removes them as soon as it has ended, however it ended.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PREFIX = "consilience-"
NUM_CPUS = 1.0  # of one box, as of a container: a spinning program leaves its neighbours theirs
PERIOD_US = 100_000


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups are made, a folder a controller (one for all in version 2). cpu: None without one."""

    version: int
    memory: Path
    pids: Path
    cpu: Path | None = None

    @property
    def folders(self) -> list[Path]:
        """Each folder once."""
        return list(dict.fromkeys(f for f in (self.memory, self.pids, self.cpu) if f is not None))


class Group:
    """One box's group. Counters are the kernel's own: {"oom": kills, "pids": refused forks}."""

    def __init__(self, where: Hierarchy, name: str, *, memory_bytes: int, processes: int) -> None:
        """Makes and limits the group; OSError (and nothing left) where that is refused."""
        self._where = where
        self._last = {"oom": 0, "pids": 0}
        self._memory, self._pids = where.memory / name, where.pids / name
        self._cpu = None if where.cpu is None else where.cpu / name
        self.folders = [folder / name for folder in where.folders]  # each with a cgroup.procs to enter by
        made: list[Path] = []
        try:
            for folder in self.folders:
                folder.mkdir()
                made.append(folder)
            self._limit(memory_bytes, processes)
        except OSError:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise

    def _limit(self, memory_bytes: int, processes: int) -> None:
        memory, quota_us = self._memory, int(NUM_CPUS * PERIOD_US)
        if self._cpu is not None and self._where.version == 1:
            _write(self._cpu / "cpu.cfs_period_us", PERIOD_US)
            _write(self._cpu / "cpu.cfs_quota_us", quota_us)
        elif self._cpu is not None:
            _write(self._cpu / "cpu.max", f"{quota_us} {PERIOD_US}")
        if self._where.version == 1:
            _write(memory / "memory.limit_in_bytes", memory_bytes)
            if (memory / "memory.memsw.limit_in_bytes").exists():
                _write(memory / "memory.memsw.limit_in_bytes", memory_bytes)
        else:
            _write(memory / "memory.max", memory_bytes)
            if (memory / "memory.swap.max").exists():
                _write(memory / "memory.swap.max", 0)
        _write(self._pids / "pids.max", processes + 2)  # the runner is one of them, and what started it

    def counters(self) -> dict[str, int]:
        events = self._memory / ("memory.oom_control" if self._where.version == 1 else "memory.events")
        found = {"oom": _field(events, "oom_kill"), "pids": _field(self._pids / "pids.events", "max")}
        self._last = {name: max(number, found[name]) for name, number in self._last.items()}
        return self._last

    def remove(self, *, patience_s: float = 1.0) -> bool:
        """True once the group is gone; it can only go after its last process was reaped."""
        self.counters()  # what ended the box may be asked afterwards
        deadline = time.monotonic() + patience_s
        for folder in self.folders:
            while folder.exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
                    continue
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.002)
        return True


@cache
def find_hierarchy(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> Hierarchy | str:
    """Where this process may make groups with memory and pids limits, or why it cannot."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError as error:
        return f"no control groups ({error.strerror})"
    paths = {name: path for _, names, path in lines for name in names.split(",")}
    if "memory" in paths and "pids" in paths:
        names = [name for name in ("memory", "pids", "cpu") if name in paths]
        return _tried(Hierarchy(1, *(_own_folder(root / name, paths[name]) for name in names)))
    unified = root if (root / "cgroup.controllers").exists() else root / "unified"
    try:
        offered = set((unified / "cgroup.controllers").read_text().split())
        if not {"memory", "pids"} <= offered:
            return "cgroup v2 without the memory and pids controllers"
        base = unified / f"{PREFIX}boxes"
        base.mkdir(exist_ok=True)
        wanted = offered & {"cpu", "memory", "pids"}
        for folder in (unified, base):
            if not wanted <= set((folder / "cgroup.subtree_control").read_text().split()):
                _write(folder / "cgroup.subtree_control", " ".join(f"+{name}" for name in sorted(wanted)))
    except OSError as error:
        return f"cgroup v2 refuses a group ({error.strerror})"
    return _tried(Hierarchy(2, base, base, base if "cpu" in wanted else None))


def owner_prefix() -> str:
    """The group name prefix of this process."""
    return f"{PREFIX}{os.getpid()}-{start_time(os.getpid())}-"


def sweep(where: Hierarchy) -> int:
    """Removes groups whose owner is dead; how many."""
    count = 0
    for folder in where.folders:
        for group in folder.glob(PREFIX + "*-*-*"):
            pid, start = group.name[len(PREFIX) :].split("-")[:2]
            if pid.isdigit() and start_time(int(pid)) != start:
                with contextlib.suppress(OSError):
                    group.rmdir()
                    count += 1
    return count


def _own_folder(mount: Path, path: str) -> Path:
    """This process's own group below a mount; the mount itself where a namespace hides the path."""
    folder = mount / path.lstrip("/")
    return folder if folder.is_dir() else mount


def _tried(where: Hierarchy) -> Hierarchy | str:
    try:
        group = Group(
            where, f"{owner_prefix()}trial-{os.urandom(4).hex()}", memory_bytes=1 << 26, processes=8
        )
    except OSError as error:
        if where.cpu is not None:
            return _tried(Hierarchy(where.version, where.memory, where.pids))
        return f"cgroup v{where.version} refuses a group ({error.strerror})"
    group.remove(patience_s=0.1)
    return where


def start_time(pid: int) -> str:
    """When a process started, in ticks since boot: with its pid a name that is not used twice; "" if gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)


def _write(path: Path, value: object) -> None:
    path.write_text(f"{value}\n")
