"""Boxes that outlive the worker that leased them: folders, with a line in `ran` for each command that ran.

A command `die-before …` or `die-after …` kills its own process at the first try, before or after it has had
its effect: what a test needs to tell the two sides of an unknown outcome apart.
"""

import os
import signal
import uuid
from pathlib import Path

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.protocol import Enforced, ExecResult, ExecStatus, Isolation


class FolderBox:
    def __init__(self, folder: Path):
        self.folder, self.id = folder, folder.name
        self.enforced = Enforced(Isolation.NONE, "folder", "disk", False, False, "none", "none")
        self._me = uuid.uuid4().hex
        (folder / "holder").write_text(self._me)

    def exec(self, argv, *, stdin=b"", cwd=None, env=None, timeout_s=None):
        if (self.folder / "holder").read_text() != self._me:
            raise SandboxLost(f"box {self.id} has another holder")
        command = argv[-1]
        self._die_at(command, "die-before")
        with open(self.folder / "ran", "a") as file:
            file.write(command + "\n")
        self._die_at(command, "die-after")
        out = f"did {command}".encode()
        return ExecResult(ExecStatus.OK, 0, out, b"", len(out), 0, 0.0)

    def _die_at(self, command, when):
        marker = self.folder / "died"
        if command.startswith(when) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def read(self, path, *, max_bytes=1 << 20):
        return (self.folder / path).read_bytes()[:max_bytes]

    def write(self, path, data, *, mode=0o644):
        (self.folder / path).write_bytes(data)


class LastingBoxes:
    """As many as are asked for. Released ones keep their folder under another name, for the test to read."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def lease(self):
        box = self.folder / f"box-{uuid.uuid4().hex}"
        box.mkdir()
        return FolderBox(box)

    def find(self, box_id):
        box = self.folder / box_id
        return FolderBox(box) if box.is_dir() else None

    def release(self, box):
        box.folder.rename(box.folder.with_name("released-" + box.folder.name))

    def commands(self):
        """(box, command) of everything that ever ran, once for each time."""
        files = self.folder.glob("*/ran")
        return [(path.parent.name, line) for path in files for line in path.read_text().splitlines()]
