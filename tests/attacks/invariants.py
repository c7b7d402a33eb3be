"""What must hold after every attack, whatever it did: four invariants, measured on the host.

I1  the next command in that box, or in its successor, answers within 2 s
I2  no process of the box is left but its runner
I3  memory, disk, inodes, descriptors and mounts of the host are back; an emptied box is empty
I4  the harness's peak memory grew by less than the cap on output plus 16 MiB

I2 goes by the box's pid namespace (by its uid where it has none), so that other boxes of this machine do not
count. What other work on the machine moves (free memory, disk) has a tolerance far above that work's noise
and far below what an attack that met no limit would take in its time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from consilience.sandboxes.blocking import BlockingSandbox

NEXT_LIMIT_S = 2.0
PEAK_SLACK = 16 << 20
HOST_SLACK = 2 << 30
SETTLE_S = 5.0


class Host:
    """The host's books before an attack."""

    def __init__(self) -> None:
        self.num_fds = _num_fds()
        self.mounts = _mounts()
        self.disk = os.statvfs("/tmp")
        self.free_bytes = _available()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.peak_bytes = _peak()

    def check(self, output_bytes: int) -> None:
        grown = _peak() - self.peak_bytes
        assert grown < 2 * output_bytes + PEAK_SLACK, f"I4: the harness grew by {grown >> 20} MiB"
        assert _mounts() == self.mounts, "I3: mounts of the host changed"
        disk = os.statvfs("/tmp")
        used = (self.disk.f_bavail - disk.f_bavail) * disk.f_frsize
        assert used < HOST_SLACK, f"I3: {used >> 20} MiB of the host's disk are gone"
        assert self.disk.f_favail - disk.f_favail < 100_000, "I3: inodes of the host are gone"
        _until(lambda: self.free_bytes - _available() < HOST_SLACK, "I3: memory of the host is gone")

    def check_descriptors(self) -> None:
        _until(lambda: _num_fds() <= self.num_fds, "I3: descriptors of the harness leaked")


class Inside:
    """What identifies the box's processes on the host: its pid namespace, or its uid."""

    def __init__(self, box: BlockingSandbox) -> None:
        told = box.run_python("import os; print(os.readlink('/proc/self/ns/pid'), os.getuid())").stdout
        namespace, uid = told.decode().split()
        self._namespace = None if namespace == os.readlink("/proc/self/ns/pid") else namespace
        self._uid = int(uid)

    def processes(self) -> list[str]:
        """Command names of the box's processes now, zombies included."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._namespace is None:
                    is_inside = folder.stat().st_uid == self._uid
                else:
                    is_inside = os.readlink(folder / "ns/pid") == self._namespace
                if is_inside:
                    found.append((folder / "comm").read_text().strip())
            except OSError:  # gone meanwhile, or not ours to look at
                continue
        return found

    def check(self, *, is_alive: bool) -> None:
        num_own = 1 if is_alive and self._namespace is not None and os.geteuid() == 0 else 0
        _until(lambda: len(self.processes()) <= num_own, f"I2: left are {self.processes()}")


def check_answers(box: BlockingSandbox) -> None:
    """I1."""
    began = time.monotonic()
    assert box.exec(["echo", "alive"]).stdout == b"alive\n", "I1: the next command did not work"
    took = time.monotonic() - began
    assert took < NEXT_LIMIT_S, f"I1: the next command took {took:.2f} s"


USED = """
import os
for folder in ("/workspace", "/tmp", "/dev/shm"):
    if os.path.ismount(folder):
        info = os.statvfs(folder)
        print(folder, info.f_blocks - info.f_bfree, info.f_files - info.f_ffree, len(os.listdir(folder)))
"""


def check_empty(box: BlockingSandbox) -> None:
    """I3 inside: after a reset no folder holds a byte, and none more than its own inode."""
    box.reset()
    for line in box.run_python(USED).stdout.decode().splitlines():
        folder, num_blocks, num_inodes, num_names = line.split()
        assert (int(num_blocks), int(num_names)) == (0, 0) and int(num_inodes) <= 1, f"I3: {line} in {folder}"


def _until(condition: Callable[[], bool], text: str) -> None:
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        assert time.monotonic() < deadline, text
        time.sleep(0.02)


def _mounts() -> set[str]:
    """Those that no engine and no test makes: boxes of Docker come and go with mounts of their own."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {
        line for line in lines if not any(word in line for word in ("docker", "netns", "overlay", "/tmp/"))
    }


def _num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def _available() -> int:
    (line,) = [x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable")]
    return int(line.split()[1]) << 10


def _peak() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) << 10
