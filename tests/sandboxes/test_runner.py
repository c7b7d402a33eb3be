"""The runner: its fast path in every driver's box, and its parts on their own."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience.sandboxes.protocol import ExecStatus
from consilience.sandboxes.runner_bundle import BOOTSTRAP, bootstrap_frame
from consilience.sandboxes.runner_files import empty_folder
from consilience.sandboxes.runner_frames import Capture

SETTINGS = {
    "verb": "configure",
    "uid": None,
    "env": {"PATH": "/usr/bin:/bin"},
    "rlimits": {},
    "nice": 0,
    "output_bytes": 100,
    "counters": [],
}


def python(box, code: str, **kwargs):
    """The program by its own interpreter, not by the fork."""
    return box.exec(["python3", "-I", "-c", code], **kwargs)


def test_run_python_is_a_fresh_main_with_stdin_and_exit_codes(box):
    result = box.run_python("import sys\nprint(__name__, input(), sys.argv)\nsys.exit(4)", stdin=b"line\n")
    assert (result.stdout, result.exit_code) == (b"__main__ line ['program.py']\n", 4)
    assert box.run_python("x = 1").is_ok
    assert b"NameError" in box.run_python("print(x)").stderr
    assert box.run_python("exit()").is_ok
    assert box.run_python("raise SystemExit('why')").stderr == b"why\n"
    assert box.run_python("def f(:").exit_code == 1
    assert b"SyntaxError" in box.run_python("def f(:").stderr


def test_run_python_traceback_shows_the_program_only(box):
    error = box.run_python("def f():\n    return 1 / 0\nf()").stderr.decode()
    assert "ZeroDivisionError" in error and "runner" not in error
    assert "line 2, in f" in error


def test_run_python_forks_do_not_share_random_numbers_or_changes(box):
    draws = {box.run_python("import random; print(random.random())").stdout for _ in range(4)}
    assert len(draws) == 4
    box.run_python("import json, builtins; json.dumps = None; builtins.print = None")
    assert box.run_python("import json; print(json.dumps([1]))").stdout == b"[1]\n"


def test_run_python_has_the_same_identity_and_limits_as_exec(box):
    code = "import os, resource; print(os.getuid(), os.getppid(), resource.getrlimit(resource.RLIMIT_CPU))"
    assert box.run_python(code).stdout == python(box, code).stdout


def test_run_python_cannot_reach_the_control_channel(box):
    code = (
        "import os\nfor fd in range(3, 256):\n"
        "    try:\n        os.write(fd, b'forged'); print('wrote to', fd)\n    except OSError: pass\n"
        "for name in ('0', '1', '2', '3', '4', '5'):\n"
        "    try:\n        os.open('/proc/1/fd/' + name, os.O_RDWR); print('opened', name)\n"
        "    except OSError:\n        pass"
    )
    result = box.run_python(code)
    assert (result.stdout, result.status) == (b"", ExecStatus.OK)


def test_programs_of_one_box_leave_no_trace_in_the_memory_of_the_next(box):
    secret = os.urandom(12).hex()
    box.run_python(f"mark = '{secret}'\nprint(mark)", stdin=secret.encode())
    box.write("secret", secret.encode())
    box.read("secret")
    box.reset()
    scan = (
        "import sys\nfound, halves = 0, sys.stdin.read().split()\nneedle = (halves[0] + halves[1]).encode()\n"
        "memory = open('/proc/self/mem', 'rb', 0)\n"
        "for line in open('/proc/self/maps'):\n"
        "    span, rights = line.split()[:2]\n"
        "    if 'r' not in rights or '[v' in line: continue\n"
        "    low, high = (int(x, 16) for x in span.split('-'))\n"
        "    memory.seek(low)\n"
        "    data = memory.read(high - low)\n"
        "    found += data.count(needle)\n"
        "    del data\n"
        "print(found)"
    )
    counted = box.run_python(scan, stdin=f"{secret[:12]} {secret[12:]}".encode(), timeout_s=8)
    assert counted.exit_code == 0, counted.stderr
    assert int(counted.stdout) <= 1  # its own needle


# -- parts on their own -------------------------------------------------------------------------


def test_a_capture_worked_by_hand():
    capture = Capture(5)  # head 3, tail 2
    capture.take(b"ab")
    assert b"".join(capture.parts()) == b"ab"
    capture.take(b"cdef")
    assert (b"".join(capture.parts()), capture.total) == (b"abcef", 6)
    capture.wipe()
    assert (capture.total, capture.head, capture.tail) == (0, bytearray(3), bytearray(2))


@pytest.mark.parametrize("cap", [0, 1, 2, 7, 64])
def test_a_capture_keeps_head_and_tail_of_any_chunks(cap):
    rng = random.Random(cap)
    for _ in range(200):
        chunks = [rng.randbytes(rng.choice((0, 1, 2, 3, 50, 200))) for _ in range(rng.randrange(8))]
        whole, capture = b"".join(chunks), Capture(cap)
        for chunk in chunks:
            capture.take(memoryview(chunk))
        head, tail = cap - cap // 2, cap // 2
        expected = whole if len(whole) <= cap else whole[:head] + whole[len(whole) - tail :]
        assert b"".join(capture.parts()) == expected
        assert capture.total == len(whole)


def test_an_emptied_folder_is_empty_whatever_lay_in_it(tmp_path):
    here = tmp_path
    for _ in range(150):
        here = here / ("d" * 20)
        here.mkdir()
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    (tmp_path / "other").chmod(0)
    os.mkfifo(tmp_path / "fifo")
    empty_folder(str(tmp_path))
    assert list(tmp_path.iterdir()) == [] and Path("/etc/passwd").exists()


class Started:
    """A runner as a plain subprocess, started the way the box starts it, spoken to by hand."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *flags, "-c", BOOTSTRAP],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(bootstrap_frame())
        self.call({**SETTINGS, "workspace": str(folder), "writable": [str(folder)]})

    def send(self, header: dict, blob: bytes = b"") -> None:
        text = json.dumps({**header, "id": 7, "blob": len(blob)}).encode()
        assert self.process.stdin is not None
        self.process.stdin.write(struct.pack(">I", len(text)) + text + blob)

    def receive(self) -> tuple[dict, bytes]:
        header = json.loads(self._exactly(struct.unpack(">I", self._exactly(4))[0]))
        assert header["id"] == 7
        return header, self._exactly(header["blob"])

    def call(self, header: dict, blob: bytes = b"") -> tuple[dict, bytes]:
        self.send(header, blob)
        return self.receive()

    def _exactly(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            assert self.process.stdout is not None
            data += self.process.stdout.read(num_bytes - len(data))
        return data

    def hang_up(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(timeout=10)
        self.process.stdout.close()
        return code


@pytest.mark.parametrize("flags", [("-I", "-S"), ("-s", "-S")])
def test_it_runs_isolated_and_without_site_and_ends_with_its_input(tmp_path, flags):
    started = Started(tmp_path, *flags)
    header, blob = started.call({"verb": "exec", "argv": ["cat"], "env": {}, "timeout_s": 5}, b"hello")
    assert (header["exit"], blob) == (0, b"hello")
    header, blob = started.call({"verb": "python", "code_bytes": 11, "timeout_s": 5}, b"print(6*7)\n")
    assert (header["exit"], blob) == (0, b"42\n")
    assert started.call({"verb": "ping"})[0]["pid"] == started.process.pid
    assert started.hang_up() == 0


def test_the_end_of_its_input_during_a_command_kills_even_a_daemon(tmp_path):
    started = Started(tmp_path, "-I", "-S")
    daemon = (
        b"import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        b"        open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'ready')\n"
        b"        time.sleep(100)\n    os._exit(0)\ntime.sleep(100)"
    )
    started.send({"verb": "python", "code_bytes": len(daemon), "timeout_s": 60}, daemon)
    deadline = time.monotonic() + 10
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = int((tmp_path / "ready").read_text())
    assert started.hang_up() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def test_a_request_it_refuses_leaves_the_next_one_readable(tmp_path):
    started = Started(tmp_path, "-I", "-S")
    reply, _ = started.call({"verb": "write", "path": "../x", "mode": 0o644}, b"z" * 300_000)
    assert reply["errno"]
    assert started.call({"verb": "ping"})[0]["pid"] == started.process.pid
    assert started.hang_up() == 0
