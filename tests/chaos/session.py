"""The processes of one run, its driver and its Ray, known by a mark in their environment that all inherit.

So what is killed is never anybody else's: every look goes through /proc and compares the mark. The driver
has a private cluster, or joins one that stands beside it (`is_joined`), which then outlives it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from real_run import command

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0  # longest wait for anything that takes seconds on a quiet machine
MARK = "CHAOS_SESSION"
_DROPPED = ("RAY_", "PYTHONDONTWRITEBYTECODE")  # another cluster's; and without byte code every start is slow
_HOLDER = """
import ray, sys
from consilience.rollout.ray_cluster import start_ray
start_ray(2, object_store_bytes=80 << 20)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def build_faulty_disk(folder: Path) -> Path:
    """faulty_disk.c as a library for LD_PRELOAD."""
    library = folder / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


class Session:
    """One run folder `run` and everything that works on it. A context manager; nothing of it outlives it."""

    def __init__(self, inputs: Path, run: Path, library: Path, *, is_joined: bool) -> None:
        self.inputs, self.run, self.is_joined = inputs, run, is_joined
        self.temp = Path(tempfile.mkdtemp(prefix="chaos-", dir="/tmp"))  # short, for Ray's sockets
        self.disk = self.temp / "disk"
        self.disk.mkdir()
        run.mkdir()
        self.mark = f"{MARK}={secrets.token_hex(8)}"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(_DROPPED)},
            MARK: self.mark.partition("=")[2],
            "RAY_TMPDIR": str(self.temp),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
            "LD_PRELOAD": str(library),
            "CHAOS_DISK": str(self.disk),
            "CHAOS_ROOT": str(run.resolve()),
        }
        if is_joined:
            token = self.temp / "token"
            token.touch(0o600)
            token.write_text(secrets.token_hex(32))
            self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.driver: subprocess.Popen[bytes] | None = None
        self.holder: subprocess.Popen[str] | None = None
        self._address = ""
        self._num_started = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in (self.driver, self.holder):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        deadline = time.monotonic() + WAIT_S
        while (left := self.members()) and time.monotonic() < deadline:
            for pid in left:
                self.send(pid, signal.SIGKILL)
            time.sleep(0.05)
        shutil.rmtree(self.temp, ignore_errors=True)

    def start(self) -> None:
        """The driver, behind its cluster if that one stands beside it."""
        if self.is_joined and not any("raylet/raylet" in line for line in self.members().values()):
            for pid in self.members():  # what is left of a cluster without its raylet
                self.send(pid, signal.SIGKILL)
            self.holder = subprocess.Popen(
                [sys.executable, "-c", _HOLDER],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self.holder.stdout is not None
            self._address = self.holder.stdout.readline().strip()
            assert self._address, "the cluster to join did not start"
        self._num_started += 1
        with self.errors().open("wb") as errors:
            self.driver = subprocess.Popen(
                command(self.inputs, self.run, self._address or None),
                env=self.environment,
                cwd=self.temp,
                stdout=errors,
                stderr=errors,
            )

    def errors(self) -> Path:
        """What the newest driver printed."""
        return self.temp / f"driver-{self._num_started}.txt"

    def members(self) -> dict[int, str]:
        """Process id -> command line of everything that is marked."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(path.name)] = line
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def workers(self) -> list[int]:
        """Rollout workers; while there are none, the processes that are about to become them."""
        lines = self.members()
        built = [pid for pid, line in lines.items() if _is_worker(line)]
        return sorted(built or [pid for pid, line in lines.items() if _may_become_worker(line)])

    def cluster(self) -> list[int]:
        """Every process but the driver."""
        driver = self.driver.pid if self.driver is not None else 0
        return [pid for pid in self.members() if pid != driver]

    def must_be_alone(self) -> None:
        """AssertionError if workers or reward processes outlive their run, or its private cluster does."""
        deadline = time.monotonic() + WAIT_S
        while left := [line for line in self.members().values() if _is_left(line, self.is_joined)]:
            assert time.monotonic() < deadline, f"processes outlived their run: {left}"
            time.sleep(0.1)

    def send(self, pid: int, number: int) -> bool:
        """Whether it was there, and still ours."""
        try:
            if self.mark.encode() not in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return False
            os.kill(pid, number)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False
        return True

    def inject(self, fault: str) -> None:
        """ "full" lasts until `mend`; "lose" and "tear" are for the next write."""
        (self.disk / fault).touch()

    def mend(self, fault: str) -> bool:
        """Whether the fault had not been taken yet."""
        was_there = (self.disk / fault).exists()
        (self.disk / fault).unlink(missing_ok=True)
        return was_there


def _is_left(line: str, is_joined: bool) -> bool:
    """Not Ray's agents, which notice within a minute that their raylet is gone."""
    is_ray = "raylet/raylet" in line or "gcs_server" in line
    return _is_worker(line) or "consilience.rewards.child" in line or (is_ray and not is_joined)


def _may_become_worker(line: str) -> bool:
    return line.startswith("ray::IDLE") or ("default_worker.py" in line and "raylet/raylet" not in line)


def _is_worker(line: str) -> bool:
    return line.startswith("ray::") and "Mailbox" in line
