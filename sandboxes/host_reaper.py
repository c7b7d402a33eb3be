"""What dead owners left on this machine: processes, control groups, containers. By label, never by age.

A box ends with its owner by itself (its runner's stdin closes); this is for what slipped through: a start
that was half done, an engine that was down, a janitor that was killed too. A label names host, process id and
start time; one that does not parse, or whose owner lives, is left alone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
from pathlib import Path
from urllib.parse import quote

from consilience.sandboxes import cgroups
from consilience.sandboxes.janitor import is_alive, read_mark

_ENGINE_LIMIT_S = 20.0


def reap_leftovers() -> int:
    """Ends what dead owners left; how many things that were. Blocks for up to a minute where Docker hangs."""
    from consilience.sandboxes.docker_driver import engine_socket

    count = reap_processes()
    where = cgroups.find_hierarchy() if os.geteuid() == 0 else None
    if isinstance(where, cgroups.Hierarchy):
        count += cgroups.sweep(where)
    return count + reap_containers(engine_socket())


def reap_processes(proc: Path = Path("/proc")) -> int:
    """Kills processes that carry the mark of an owner that is dead."""
    count = 0
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or not ours to see
            words = (folder / "cmdline").read_bytes().split(b"\0")
            owners = [owner for word in words if (owner := read_mark(os.fsdecode(word))) is not None]
            if owners and not any(is_alive(owner) for owner in owners):
                os.kill(int(folder.name), signal.SIGKILL)
                count += 1
    return count


def reap_containers(engine: str) -> int:
    """Removes containers labelled with an owner of this host that is dead. 0 where no engine answers."""
    count = 0
    for name, owner in labelled_containers(engine):
        if is_dead_owner(owner):
            with contextlib.suppress(OSError, http.client.HTTPException):
                _ask(engine, "DELETE", f"/containers/{name}?force=1&v=1")
                count += 1
    return count


def labelled_containers(engine: str) -> list[tuple[str, str]]:
    """(id, owner's label) of every container of ours, running or not; none where no engine answers."""
    if not engine or not os.path.exists(engine):
        return []
    wanted = quote(json.dumps({"label": ["consilience.owner"]}))
    with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
        rows = json.loads(_ask(engine, "GET", f"/containers/json?all=1&filters={wanted}") or b"[]")
        return [(row["Id"], row["Labels"]["consilience.owner"]) for row in rows]
    return []


def is_dead_owner(label: str) -> bool:
    """Whether `host:pid` or `host:pid:start time` names a process of this machine that has ended."""
    host, _, rest = label.partition(":")
    pid, _, start = rest.partition(":")
    if host != socket.gethostname() or not pid.isdigit() or (start and not start.isdigit()):
        return False
    found = cgroups.start_time(int(pid))
    return not found or bool(start and start != found)


def _ask(engine: str, method: str, target: str) -> bytes:
    connection = http.client.HTTPConnection("localhost", timeout=_ENGINE_LIMIT_S)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.settimeout(_ENGINE_LIMIT_S)
    try:
        connection.sock.connect(engine)
        connection.request(method, target, headers={"Host": "localhost"})
        return connection.getresponse().read()
    finally:
        connection.close()
