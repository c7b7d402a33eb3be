"""One run, one folder: a lock that dies with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any

import psutil

from consilience.conf.errors import RunError

GUARD_LIMIT_S = 30.0


class RunLock:
    """Held from `acquire` to `release`; a lock of a process that is gone is taken over.

    The file names its owner: pid with start time (pids are used again), host and time. The short
    check-and-write is guarded by `flock`; the lock itself is not an flock, since children that
    were forked while it was held would keep it alive.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._is_held = False

    def acquire(self) -> None:
        """RunError when a living process has it (and when that cannot be told: another host)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+", encoding="utf-8") as file:
            _take(file, self.path)
            file.seek(0)
            owner = _parse(file.read())
            if owner is not None:
                _refuse_living(self.path, owner)
            file.seek(0)
            file.truncate()
            file.write(json.dumps(_identity() | {"since": round(time.time(), 3)}))
            file.flush()
            os.fsync(file.fileno())
        self._is_held = True

    def release(self) -> None:
        """Give it back if it is ours. Twice is harmless."""
        if not self._is_held:
            return
        self._is_held = False
        try:
            with open(self.path, "r+", encoding="utf-8") as file:
                _take(file, self.path)
                owner = _parse(file.read())
                if owner is not None and _is_me(owner):
                    file.truncate(0)
        except FileNotFoundError:  # someone removed the folder; nothing is held any more
            return


def _take(file: IO[str], path: Path) -> None:
    """The guard of the few statements that follow. RunError when another process sits in its own."""
    deadline = time.monotonic() + GUARD_LIMIT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RunError(
                    f"{path} is being written by a process that does not go on (is one stopped?); end it"
                ) from None
            time.sleep(0.02)


def _identity() -> dict[str, Any]:
    process = psutil.Process()
    return {"pid": process.pid, "started": process.create_time(), "host": socket.gethostname()}


def _is_me(owner: dict[str, Any]) -> bool:
    me = _identity()
    return all(owner.get(key) == me[key] for key in me)


def _refuse_living(path: Path, owner: dict[str, Any]) -> None:
    folder = path.parent
    if owner.get("host") != socket.gethostname():
        raise RunError(
            f"{folder} is in use by process {owner.get('pid')} on {owner.get('host')}; wait for it or choose "
            f"another run name. If that machine is gone, remove {path}"
        )
    try:
        started = psutil.Process(owner["pid"]).create_time()
    except (psutil.Error, KeyError, TypeError, ValueError):
        return
    if abs(started - owner.get("started", 0.0)) < 0.05:
        raise RunError(
            f"{folder} is in use by process {owner['pid']} of this machine; wait for it, stop it, or choose "
            "another run name"
        )


def _parse(text: str) -> dict[str, Any] | None:
    """The owner, None when free; a torn record belongs to a process that died while writing it."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and owner else None
