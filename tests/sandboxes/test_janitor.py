"""What an owner that was killed leaves behind is cleared up, and nothing that stands is touched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from consilience.sandboxes.cgroups import Hierarchy
from consilience.sandboxes.janitor import janitor

ROOT = Path(__file__).parents[2]
OWNER = """
import pathlib, subprocess, sys, time
from consilience.sandboxes import cgroups
from consilience.sandboxes.janitor import janitor
top = pathlib.Path(sys.argv[1])
where = cgroups.Hierarchy(1, top / "m", top / "p")
for folder in (where.memory, where.pids):
    (folder / (cgroups.owner_prefix() + "box")).mkdir()
(where.memory / "other").mkdir()
watcher = janitor(where)
assert janitor(where) is watcher
for mark in (watcher.mark, "somebody-else"):
    command = ["sh", "-c", "sleep 100; true", mark]
    print(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL).pid, flush=True)
time.sleep(100)
"""


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_after_the_owner_is_killed_what_carries_its_mark_dies_and_its_folders_go(tmp_path):
    for name in ("m", "p"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    ours, other = int(owner.stdout.readline()), int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    owner.stdout.close()
    try:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and (list(tmp_path.rglob("consilience-*")) or is_running(ours)):
            time.sleep(0.02)
        assert not is_running(ours) and is_running(other)
        assert [path.name for path in tmp_path.rglob("*") if path.parent != tmp_path] == ["other"]
    finally:
        os.killpg(other, 9)
        os.killpg(ours, 9)


def test_a_janitor_at_work_is_never_taken_for_a_leftover():
    """What carries a dead owner's mark is killed by a host that looks for leftovers, and counted."""
    program = "import time; from consilience.sandboxes.janitor import janitor; "
    program += "print(janitor(None).mark, flush=True); time.sleep(100)"
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT)
    assert owner.stdout is not None
    mark = owner.stdout.readline().strip()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    # The janitor looks eleven times, 0.1 s apart.
    carried, until, num_looks = set(), time.monotonic() + 1.0, 0
    while time.monotonic() < until:
        num_looks += 1
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if mark in (words := path.read_bytes()):
                    carried.add(words)
    assert num_looks > 10 and not carried


def test_a_process_has_one_janitor_whatever_it_asks_for(tmp_path):
    assert janitor(None) is janitor(Hierarchy(1, tmp_path, tmp_path))
