"""A Docker Engine on this machine: found, or installed from Debian's packages and started, where we are root.

The engine gets neither a bridge nor firewall rules: boxes have no network. It is started in a session
of its own and outlives its starter; its log and process id lie beside its data.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.docker_driver import engine_socket, ping_engine

PACKAGE = "docker.io"
INSTALL_LIMIT_S = 900.0
START_LIMIT_S = 60.0


def ensure_engine(folder: Path = Path("/var/lib/consilience-docker")) -> str:
    """ "running", "started" or "installed and started". `folder` is for what the engine keeps.

    SandboxUnavailable says what is missing: root, a local socket, the package, or why it did not start.
    """
    path = engine_socket()
    if not path:
        raise SandboxUnavailable(
            f"DOCKER_HOST={os.environ['DOCKER_HOST']} is no unix socket; only a local engine is used"
        )
    if ping_engine(path):
        return "running"
    if os.geteuid() != 0:
        raise SandboxUnavailable("no Docker Engine answers, and only root may start one")
    is_installed = _find_daemon() is not None
    if not is_installed:
        install_engine()
    start_engine(path, folder)
    return "started" if is_installed else "installed and started"


def install_engine() -> None:
    """By apt, from the machine's own sources."""
    if shutil.which("apt-get") is None:
        raise SandboxUnavailable(f"the package {PACKAGE} is missing, and this machine has no apt-get")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", PACKAGE]):
        try:
            done = subprocess.run(
                ["apt-get", *command], capture_output=True, text=True, env=env, timeout=INSTALL_LIMIT_S
            )
        except subprocess.TimeoutExpired:
            raise SandboxUnavailable(f"apt-get {command[0]} took over {INSTALL_LIMIT_S:g} s") from None
        if done.returncode:
            raise SandboxUnavailable(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")


def start_engine(path: str, folder: Path, *, limit_s: float = START_LIMIT_S) -> subprocess.Popen[bytes]:
    """A daemon that listens on `path`, once it answers. SandboxUnavailable with the end of its log."""
    daemon = _find_daemon()
    if daemon is None:
        raise SandboxUnavailable(f"dockerd is not installed; its package is {PACKAGE}")
    folder.mkdir(parents=True, exist_ok=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    options = [f"--host=unix://{path}", f"--data-root={folder / 'data'}", f"--exec-root={folder / 'exec'}"]
    options += [f"--pidfile={folder / 'pid'}", "--bridge=none", "--iptables=false", "--ip6tables=false"]
    with open(folder / "log", "ab") as log:
        process = subprocess.Popen(
            [daemon, *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    deadline = time.monotonic() + limit_s
    while process.poll() is None and time.monotonic() < deadline:
        if ping_engine(path):
            return process
        time.sleep(0.1)
    if process.poll() is None:
        process.terminate()
        process.wait(timeout=30)
    said = (folder / "log").read_text(errors="replace").strip()[-400:]
    raise SandboxUnavailable(f"dockerd did not start: {said}")


def _find_daemon() -> str | None:
    return shutil.which("dockerd", path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin")
