"""The insecure fallback: only on demand, loud, honest in its record, and as tidy as it can be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.blocking import open_blocking
from consilience.sandboxes.insecure_driver import open_insecure
from consilience.sandboxes.protocol import ExecStatus, Isolation, Limits, SandboxSpec


@pytest.fixture
def box():
    one = open_blocking(
        SandboxSpec(allow_insecure=True, limits=Limits(memory_bytes=256 << 20)), opener=open_insecure
    )
    yield one
    one.destroy()


def test_without_the_flag_it_does_not_start():
    with pytest.raises(SandboxUnavailable, match="allow_insecure=true"):
        open_blocking(SandboxSpec(), opener=open_insecure)


def test_the_record_claims_nothing(box):
    enforced = box.enforced
    assert (enforced.level, enforced.network, enforced.seccomp) == (Isolation.RLIMIT, True, False)
    assert "NOT A SECURITY BOUNDARY" in enforced.notes[0]


def test_the_verbs_work_and_limits_that_rlimits_can_hold_bite(box):
    assert box.exec(["cat"], stdin=b"x").stdout == b"x"
    assert box.run_python("print(6 * 7)").stdout == b"42\n"
    box.write("a/b", b"data")
    assert box.read("a/b") == b"data"
    assert box.run_python("print(open('a/b').read())").stdout == b"data\n"
    for path in ("../x", "/etc/passwd"):
        with pytest.raises(PermissionError):
            box.read(path)
    box.reset()
    with pytest.raises(FileNotFoundError):
        box.read("a/b")
    assert b"MemoryError" in box.run_python("x = b'x' * (1 << 30)").stderr


def test_a_daemon_in_its_own_session_dies_with_its_command_and_its_box(box):
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        open('pid', 'w').write(str(os.getpid())); time.sleep(100)\n    os._exit(0)\ntime.sleep(0.3)"
    )
    assert box.run_python(daemon).is_ok
    with pytest.raises(ProcessLookupError):
        os.kill(int(box.read("pid")), 0)
    assert box.exec(["sh", "-c", "sleep 100 & sleep 100"], timeout_s=0.2).status is ExecStatus.TIMEOUT


def test_the_workspace_goes_with_the_box_and_with_a_killed_owner():
    script = (
        "import os, sys, signal\nfrom consilience.sandboxes.blocking import open_blocking\n"
        "from consilience.sandboxes.insecure_driver import open_insecure\n"
        "from consilience.sandboxes.protocol import SandboxSpec\n"
        "box = open_blocking(SandboxSpec(allow_insecure=True), opener=open_insecure)\n"
        "print(box.exec(['pwd']).stdout.decode(), flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    folder = Path(done.stdout.strip())
    assert "INSECURE" in done.stderr and "consilience-insecure-" in folder.name
    for _ in range(250):
        if not folder.exists():
            break
        subprocess.run(["sleep", "0.02"])
    assert not folder.exists()
    one = open_blocking(SandboxSpec(allow_insecure=True), opener=open_insecure)
    folder = Path(one.exec(["pwd"]).stdout.decode().strip())
    one.destroy()
    assert not folder.exists()
