"""The file verbs, reset and the end of a box, as the protocol promises them for every driver."""

from __future__ import annotations

import pytest

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Isolation


def test_files_go_in_and_out_by_relative_and_absolute_path(box):
    box.write("a/b/c.bin", bytes(range(256)) * 300)
    assert box.read("a/b/c.bin") == bytes(range(256)) * 300
    assert box.read("/workspace/a/b/c.bin", max_bytes=76800) == box.read("./a/./b/c.bin")
    box.write("run.sh", b"#!/bin/sh\necho ran\n", mode=0o755)
    assert box.exec(["./run.sh"]).stdout == b"ran\n"
    box.write("a/b/c.bin", b"short")
    assert box.read("a/b/c.bin") == b"short"
    box.write("empty", b"")
    assert box.read("empty") == b""


def test_files_that_programs_made_are_read(box):
    box.exec(["sh", "-c", "echo made > made.txt"])
    assert box.read("made.txt") == b"made\n"
    box.write("given.txt", b"given")
    assert box.exec(["sh", "-c", "cat given.txt; echo more >> given.txt"]).stdout == b"given"
    assert box.read("given.txt") == b"givenmore\n"


def test_a_missing_file_and_one_too_large_are_told(box):
    with pytest.raises(FileNotFoundError):
        box.read("nothing.txt")
    box.write("big", b"x" * 2000)
    with pytest.raises(OSError, match="2000 bytes"):
        box.read("big", max_bytes=1999)
    assert box.run_python("open('sparse', 'wb').truncate(3 << 20)").is_ok
    with pytest.raises(OSError, match="3145728 bytes"):
        box.read("sparse")


@pytest.mark.parametrize(
    "path", ["../etc/passwd", "/etc/passwd", "a/../../x", "", "/", ".", "..", "/workspace", "a//b"]
)
def test_a_path_that_leaves_the_workspace_is_refused(box, path):
    with pytest.raises(PermissionError):
        box.read(path)
    with pytest.raises(PermissionError):
        box.write(path, b"x")
    with pytest.raises(PermissionError):
        box.read("a\0b")


def test_links_and_special_files_are_refused(box):
    links = {"file": "/etc/passwd", "folder": "/etc", "root": "/", "loop": "loop"}
    code = (
        f"import os\nfor name, to in {links}.items(): os.symlink(to, name)\nos.mkfifo('pipe'); os.mkdir('d')"
    )
    assert box.run_python(code).is_ok
    for path in ("file", "folder/passwd", "root/etc/passwd", "loop", "pipe", "d"):
        with pytest.raises(PermissionError):
            box.read(path)
        with pytest.raises(PermissionError):
            box.write(path, b"x")
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_reset_leaves_nothing_behind(box):
    mess = (
        "import os\nfor top in ('/workspace', '/tmp', '/dev/shm'):\n"
        "    os.chdir(top); open('.hidden', 'w'); os.symlink('/etc', 'link'); os.mkfifo('fifo')\n"
        "    os.makedirs('deep/' * 50)\n    os.mkdir('shut'); open('shut/in', 'w'); os.chmod('shut', 0)\n"
        "    os.mkdir('ro'); os.makedirs('ro/x/y'); os.chmod('ro/x', 0o500); os.chmod('ro', 0o500)\n"
        "    for i in range(300): open(f'f{i}', 'w')\n"
        "    d = os.getcwd()\n"
        "    for i in range(600):\n        os.mkdir('n' * 60); os.chdir('n' * 60)\n"
    )
    assert box.run_python(mess).is_ok
    box.reset()
    listing = "find /workspace /tmp /dev/shm -mindepth 1 | wc -l"
    assert int(box.exec(["sh", "-c", listing]).stdout) == 0
    assert box.exec(["sh", "-c", "touch /workspace/a /tmp/a /dev/shm/a"]).is_ok


def test_reset_restores_a_workspace_that_was_shut(box):
    box.exec(["chmod", "000", "/workspace"])
    box.reset()
    assert box.exec(["touch", "a"]).is_ok


def test_a_destroyed_box_is_lost_and_says_so(open_box):
    one = open_box()
    one.destroy()
    one.destroy()
    for call in (lambda: one.exec(["true"]), lambda: one.read("x"), one.reset, lambda: one.run_python("1")):
        with pytest.raises(SandboxLost, match="destroyed"):
            call()


def test_isolation_levels_are_ordered_and_named_as_in_configuration():
    assert Isolation.RLIMIT < Isolation.BWRAP_USER < Isolation.BWRAP_ROOT < Isolation.CONTAINER < Isolation.VM
    assert Isolation.BWRAP_USER.label == "bwrap_user"
