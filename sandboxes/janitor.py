"""One small shell per process that opens boxes: it outlives its owner and clears up what that left behind.

A box ends by itself when its owner does (its runner's stdin ends), with two exceptions. A bubblewrap
whose owner dies while it is still making namespaces is killed and orphans a child that waits for it
for ever: so every bubblewrap carries its owner's mark as an argument, and the janitor kills what still
carries it; its grep reads the mark, or a host would take it for a leftover. And control groups are
folders, which no process's end removes.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from typing import NamedTuple

from consilience.sandboxes.cgroups import Hierarchy, owner_prefix, start_time, sweep

_SCRIPT = """
while read -r _; do :; done
tries=0
while [ $tries -lt 100 ]; do
  left=0
  for path in $(printf '%s\\n' "$MARK" | grep -lsFf - /proc/[0-9]*/cmdline); do
    pid=${path#/proc/}; kill -s KILL "${pid%/cmdline}" 2>/dev/null
  done
  for prefix; do
    for group in "$prefix"*; do
      [ -d "$group" ] && { rmdir "$group" 2>/dev/null || left=1; }
    done
  done
  [ $left = 0 ] && [ $tries -ge 10 ] && exit 0
  tries=$((tries + 1)); sleep 0.1
done
"""


_MARK = re.compile(r"owner-(\d+)-(\d+)-(\d+)-[0-9a-f]{16}")


class Owner(NamedTuple):
    """A process: its pid namespace, its id there, and when it began, for ids are used again."""

    namespace: int
    pid: int
    start: str


def new_mark() -> str:
    """An argument that says whose a process is: this one's, and one call's."""
    me = Owner(_namespace(), os.getpid(), start_time(os.getpid()) or "0")
    return f"owner-{me.namespace}-{me.pid}-{me.start}-{secrets.token_hex(8)}"


def read_mark(word: str) -> Owner | None:
    """The owner that an argument names; None if it is no mark."""
    found = _MARK.fullmatch(word)
    return None if found is None else Owner(int(found[1]), int(found[2]), found[3])


def is_alive(owner: Owner) -> bool:
    """Whether the owner has not ended. Of other pid namespaces nothing can be known: True."""
    return owner.namespace != _namespace() or start_time(owner.pid) == owner.start


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


class Janitor:
    """`where`: the hierarchy whose groups of this process it removes, None where there are none.

    `mark` is the argument that says whose a process is.
    """

    def __init__(self, where: Hierarchy | None) -> None:
        prefixes = [str(folder / owner_prefix()) for folder in where.folders] if where else []
        self.mark = new_mark()
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "janitor", *prefixes],
            stdin=subprocess.PIPE,  # held open until this process ends, however it ends
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "MARK": self.mark},
            start_new_session=True,
            cwd="/",
        )


_janitors: dict[int, Janitor] = {}


def janitor(where: Hierarchy | None) -> Janitor:
    """The janitor of this process, started on first use, when groups of dead owners are swept too."""
    if os.getpid() not in _janitors:
        if where is not None:
            sweep(where)
        _janitors[os.getpid()] = Janitor(where)
    return _janitors[os.getpid()]
