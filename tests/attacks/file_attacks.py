"""Files (F): what `read` and `write` of the host meet when a program prepared the place."""
# ruff: noqa: E501 (a payload's line is one attempt)

import contextlib
import threading
import time

import pytest
from attack import Attack, python

from consilience.conf.errors import SandboxLost


def _refuses_reads(*paths, error=PermissionError):
    def check(box, result):
        for path in paths:
            began = time.monotonic()
            with pytest.raises(error):
                box.read(path)
            assert time.monotonic() - began < 1.0
            assert box.exec(["true"]).is_ok

    return check


def _refuses_writes(*paths):
    def check(box, result):
        for path in paths:
            with pytest.raises(OSError):
                box.write(path, b"from the host")
        assert b"from the host" not in box.exec(["sh", "-c", "cat target* out/* 2>/dev/null"]).stdout

    return check


def _odd_names(box, result):
    for name in ("new\nline", "\udcff\udcfe", "-rf", "a" * 255, " "):
        assert box.read(name) == b"x"
        box.write(name, b"y")
        assert box.read(name) == b"y"


def _too_large(box, result):
    for name in ("large", "sparse"):
        with pytest.raises(OSError, match="max_bytes"):
            box.read(name)


def _no_escape(box, result):
    paths = [
        "../../etc/x",
        "/etc/passwd",
        "a/../../x",
        "/workspace/../etc/passwd",
        "..",
        "",
        "/",
        ".",
        "a//b",
        "/workspacex/f",
        "/proc/self/environ",
        "/workspace",
        "/tmp/f",
        "a\0b",
        "x" * 5000,
    ]
    for path in paths:
        with pytest.raises((OSError, ValueError)):
            box.read(path)
        with pytest.raises((OSError, ValueError)):
            box.write(path, b"x")
    assert box.exec(["sh", "-c", "ls -A /workspace | grep -v '^a$'"]).stdout == b""


def _race(box, result):
    """A racer swaps a folder for a link while the host writes below it; commands queue, so it is short."""
    del result
    for _ in range(3):
        racer = threading.Thread(target=_race_once, args=(box,))
        racer.start()
        with contextlib.suppress(OSError, SandboxLost):
            box.write("d/f", b"from the host")
        racer.join(timeout=10)
    assert box.exec(["cat", "/tmp/out/f"]).exit_code != 0


def _race_once(box):
    code = (
        "import os, time\nend = time.monotonic() + 0.2\nwhile time.monotonic() < end:\n"
        "    for work in (lambda: os.rename('d', 'e'), lambda: os.symlink('/tmp/out', 'd'), lambda: os.unlink('d'),"
        " lambda: os.rename('e', 'd')):\n        try: work()\n        except OSError: pass"
    )
    box.run_python(code, timeout_s=2)


def _planted(box, result):
    told = box.exec(["sh", "-c", "id; python3 -c 'print(1)'; ls >/dev/null; echo end"])
    assert b"planted" not in told.stdout + told.stderr and b"end" in told.stdout


def _replaced(box, result):
    box.write("inner/f", b"x")
    assert box.read("inner/f") == b"x"


LINKS = """
    os.symlink('/etc/passwd', 'absolute'); os.symlink('../etc/passwd', 'relative'); os.symlink('/proc/self/environ', 'environ')
    os.symlink('loop', 'loop'); os.symlink('/proc/1/fd/0', 'runner'); os.symlink('/etc', 'folder'); os.symlink('target', 'inside')
    open('target', 'w').write('mine'); os.mkdir('d'); os.symlink('.', 'd/here')
"""
ATTACKS: list[Attack] = [
    python(
        "F01",
        "links where a result is awaited",
        LINKS,
        check=_refuses_reads(
            "absolute",
            "relative",
            "environ",
            "loop",
            "runner",
            "folder",
            "folder/passwd",
            "inside",
            "d/here/x",
        ),
    ),
    python(
        "F01b",
        "links where the host writes",
        LINKS + "\n    os.mkdir('out'); os.symlink('out', 'way')",
        check=_refuses_writes("absolute", "inside", "folder/x", "way/f", "d/here/f", "loop"),
    ),
    python(
        "F02",
        "pipes, sockets, folders and devices in a file's place",
        """
        os.mkfifo('fifo'); os.mkdir('folder'); os.mkfifo('out')
        s = socket.socket(socket.AF_UNIX); s.bind('socket')
        os.symlink('/dev/zero', 'zero'); os.symlink('/dev/stdin', 'stdin')
        """,
        check=_refuses_reads(
            "fifo", "folder", "socket", "zero", "stdin", "fifo/x", "socket/x", error=OSError
        ),
    ),
    python(
        "F02b",
        "pipes and sockets where the host writes",
        """
        os.mkfifo('fifo'); os.mkdir('folder')
        s = socket.socket(socket.AF_UNIX); s.bind('socket')
        """,
        check=_refuses_writes("fifo", "folder", "socket", "fifo/x"),
    ),
    python(
        "F03",
        "files larger than what may be read",
        """
        open('large', 'wb').write(bytes(2 << 20)); os.truncate(os.open('sparse', os.O_CREAT | os.O_RDWR), 3 << 20)
        """,
        check=_too_large,
    ),
    python("F04", "paths of the caller that lead out", "pass", check=_no_escape),
    python(
        "F05",
        "hard links to what is not its own",
        """
        for path in ('/etc/passwd', '/usr/bin/python3', '/etc/runner.py', '/proc/1/environ'):
            try: os.link(path, 'hard', follow_symlinks=False); print('BREACH', path)
            except OSError: pass
        """,
    ),
    python(
        "F06",
        "names with new lines, without encoding, with dashes",
        """
        for name in (b'new\\nline', b'\\xff\\xfe', b'-rf', b'a' * 255, b' '): open(name, 'w').write('x')
        """,
        check=_odd_names,
    ),
    python(
        "F07",
        "files without rights",
        """
        open('sealed', 'w').write('x'); os.chmod('sealed', 0); os.mkdir('d'); open('d/f', 'w').close(); os.chmod('d', 0)
        """,
        check=_refuses_reads("sealed", "d/f", error=OSError),
    ),
    python(
        "F09",
        "a folder swapped for a link while the host writes",
        "os.mkdir('d'); os.mkdir('/tmp/out')",
        check=_race,
    ),
    python(
        "F10",
        "a folder replaced by one of the same name",
        """
        os.mkdir('inner'); os.rename('inner', 'old'); os.mkdir('inner'); os.chmod('inner', 0o777)
        """,
        check=_replaced,
    ),
    python(
        "F11",
        "start-up files, shims and site packages for whoever comes next",
        """
        for name in ('.bashrc', '.profile', '.bash_profile', '.pythonrc', '.pythonstartup', '.zshrc', 'sitecustomize.py',
                     'usercustomize.py', 'id', 'ls', 'python3'):
            open(name, 'w').write('#!/bin/sh\\necho planted\\n'); os.chmod(name, 0o755)
        for version in range(9, 15):
            folder = f'.local/lib/python3.{version}/site-packages'; os.makedirs(folder)
            open(folder + '/x.pth', 'w').write('import sys; print("planted")\\n')
            open(folder + '/usercustomize.py', 'w').write('print("planted")\\n')
        """,
        check=lambda box, result: (box.reset(), _planted(box, result)),
    ),
    python(
        "F11b",
        "a module of the standard library in the workspace, for programs of the next command",
        """
        for name in ('json', 'os', 'random', 're', 'types', 'typing', 'collections'):
            open(name + '.py', 'w').write('print("planted")')
        """,
        check=lambda box, result: _same(
            box.run_python("import json, random, re; print(json.dumps(1))").stdout, b"1\n"
        ),
    ),
    python(
        "F12",
        "a lease on a file, so that whoever opens it must wait",
        """
        import fcntl
        fd = os.open('leased', os.O_RDWR | os.O_CREAT); os.write(fd, b'x')
        try: fcntl.fcntl(fd, 1024, fcntl.F_WRLCK)
        except OSError: pass
        if os.fork() == 0: os.setsid(); signal.pause()
        """,
        check=lambda box, result: _same(box.read("leased"), b"x"),
    ),
    python(
        "F13",
        "locks that nobody gives back",
        """
        import fcntl
        fd = os.open('locked', os.O_RDWR | os.O_CREAT); os.write(fd, b'x'); fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fork() == 0: os.setsid(); signal.pause()
        """,
        check=lambda box, result: (box.write("locked", b"y"), _same(box.read("locked"), b"y")),
    ),
    python(
        "F14",
        "a program that is overwritten while it runs, and an unreadable one that is run",
        """
        import shutil
        shutil.copy('/bin/sh', 'own'); os.chmod('own', 0o111); os.spawnl(os.P_NOWAIT, './own', 'own', '-c', 'sleep 60')
        """,
        check=lambda box, result: _is_ok(box),
    ),
    python(
        "F15",
        "20,000 names in one folder, and folders 300 deep",
        """
        os.mkdir('wide')
        for i in range(1500): open(f'wide/{i}', 'w').close()
        for i in range(300): os.mkdir('d'); os.chdir('d')
        """,
        expect="ok disk",
    ),
    python(
        "F90",
        "hundreds of thousands of folders, deep and wide",
        """
        for i in range(400_000):
            try: os.mkdir('d'); os.mkdir('e'); os.chdir('d' if i % 2 else 'e')
            except OSError: break
        """,
        expect="ok disk nonzero oom",
        timeout_s=20.0,
        ends_box=True,
        is_long=True,
        limits={"wall_s": 20.0, "cpu_s": 20.0, "workspace_bytes": 256 << 20, "memory_bytes": 400 << 20},
    ),
]


def _same(found, wanted):
    assert found == wanted


def _is_ok(box):
    assert box.exec(["true"]).is_ok
