"""Attacks on what stays (S): shells, streamed programs, snapshots; with the invariants after each."""

from __future__ import annotations

import time

import pytest
from conftest import PRESENT
from invariants import Host, Inside, check_answers, check_empty

from consilience.sandboxes.protocol import ExecStatus, Isolation

DRIVERS = [name for name, (level, _) in PRESENT.items() if level >= Isolation.BWRAP_USER]


@pytest.fixture(params=DRIVERS)
def box(request, boxes):
    """An emptied box; afterwards it must answer, hold nothing and run nothing."""
    held = boxes.get(request.param)
    inside, host = Inside(held), Host()
    yield held
    check_answers(held)
    check_empty(held)
    inside.check(is_alive=True)
    host.check(4096)


FORGERIES = {
    "S01 an end, by number": "for i in $(seq 3 99); do echo x 0 >&$i; done 2>/dev/null; exit 3",
    "S02 an end by a child": "sh -c 'for i in 4 9 10 11 63; do echo 0 >&$i; done' 2>/dev/null; (exit 5)",
    "S03 its own shell killed": "kill -9 $$",
    "S04 its own shell replaced": "exec sh -c 'exit 4'",
    "S05 names redefined": "eval() { :; }; printf() { :; }; builtin() { :; }; trap : EXIT; (exit 6)",
    "S06 an open quote and an open brace": "echo \"'{ (",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_script_that_forges_its_end_deceives_nobody(box, name):
    result = box.shell(FORGERIES[name], timeout_s=2)
    assert result.exit_code != 0
    after = box.shell("echo after; (exit 7)", timeout_s=2)
    assert after.stdout == b"after\n" and after.exit_code == 7


def test_s07_what_a_script_leaves_running_dies_and_does_not_write_into_the_next(box):
    box.shell(
        "setsid sh -c 'sleep 0.2; echo late; echo late >late' & (setsid sleep 60 &) ; true", timeout_s=2
    )
    assert box.shell("sleep 0.4; ls", timeout_s=2).stdout == b""


def test_s08_a_script_that_never_ends_is_killed_with_its_shell(box):
    result = box.shell("trap '' TERM INT HUP; while :; do :; done", timeout_s=0.4)
    assert result.status is ExecStatus.TIMEOUT and result.wall_s < 2
    assert box.shell("echo next", timeout_s=2).stdout == b"next\n"


def test_s09_sessions_know_nothing_of_each_other(box):
    box.shell("secret=canary; cd /tmp", session="one", timeout_s=2)
    script = "echo $secret; pwd; cat /proc/*/environ 2>/dev/null | grep -c canary"
    told = box.shell(script, session="two", timeout_s=2)
    assert told.stdout == b"\n/workspace\n0\n"


def test_s10_a_streamed_flood_stands_still_until_it_is_read(box):
    process = box.spawn(["sh", "-c", "yes & yes >&2"], timeout_s=5)
    time.sleep(0.3)
    assert len(process.read(1 << 16)) > 0
    assert box.exec(["echo", "beside"]).stdout == b"beside\n"
    process.kill()
    assert process.wait(3).exit_code is not None or process.wait(3).status is ExecStatus.TIMEOUT


def test_s11_a_streamed_program_cannot_speak_for_another(box):
    frame = r"printf '\0\0\0\052{\"id\": 1, \"exit\": 0, \"blob\": 0}'"
    process = box.spawn(["sh", "-c", f"while :; do {frame}; done"], timeout_s=5)
    for _ in range(5):
        assert box.exec(["sh", "-c", "exit 9"]).exit_code == 9
    process.kill()


def test_s12_a_snapshot_of_odd_files_is_refused_or_gives_back_no_more_than_files(box):
    code = (
        "import os, socket\nos.mkfifo('fifo'); os.symlink('/etc/passwd', 'out'); os.symlink('../..', 'up')\n"
        "open('file', 'w').write('x'); os.link('file', 'hard'); os.mkdir('d'); open('d/f', 'w').write('y')\n"
        "open(b'\\xff\\n', 'w').close(); s = socket.socket(socket.AF_UNIX); s.bind('socket')\n"
        "f = open('sparse', 'wb'); f.truncate(1 << 20)"
    )
    assert box.run_python(code).is_ok
    snapshot = box.snapshot()
    box.restore(snapshot)
    assert box.read("d/f") == b"y" and box.read("hard") == b"x"
    kinds = box.exec(
        ["sh", "-c", "for f in fifo socket; do test -e $f && echo $f; done; readlink out"]
    ).stdout
    assert kinds == b"/etc/passwd\n"
    with pytest.raises(PermissionError):
        box.read("out")


def test_s13_a_snapshot_too_large_to_keep_is_an_error_and_costs_no_memory(box):
    assert box.exec(["sh", "-c", "head -c 3000000 /dev/zero >a; head -c 3000000 /dev/zero >b"]).is_ok
    with pytest.raises(OSError, match=r"hold|large|bytes"):
        box.snapshot(max_bytes=1 << 20)


def test_s14_a_snapshot_of_a_thousand_names_of_one_file_is_refused_in_time(box):
    code = "import os\nopen('a', 'wb').write(bytes(3 << 20))\nfor i in range(1000): os.link('a', f'l{i}')"
    assert box.run_python(code).is_ok
    began = time.monotonic()
    with pytest.raises(OSError, match="packs to over"):
        box.snapshot(max_bytes=4 << 20)
    assert time.monotonic() - began < 2


SWAPS = """
import os, time
open('mine', 'w').write('mine'); end = time.monotonic() + 4
ways = [lambda: os.symlink('/etc/passwd', 't'), lambda: os.link('mine', 't'), lambda: os.mkfifo('t')]
ways.append(lambda: os.mkdir('t'))
while time.monotonic() < end:
    for work in ways:
        for step in (work, lambda: os.rename('t', 'f'), lambda: os.rmdir('f'), lambda: os.rename('t', 'f')):
            try: step()
            except OSError: pass
"""


def test_s15_a_name_that_becomes_something_else_all_the_time_is_read_and_written_inside_only(box):
    process = box.spawn(["python3", "-I", "-c", SWAPS], timeout_s=5)
    seen, began = set(), time.monotonic()
    while time.monotonic() - began < 1:
        for work in (lambda: box.read("f"), lambda: box.write("f", b"host")):
            try:
                seen.add(work())
            except OSError:
                seen.add("refused")
    process.kill()
    assert "refused" in seen and seen <= {"refused", None, b"mine", b"host", b""}
    assert b"host" not in box.exec(["cat", "/etc/passwd"]).stdout
