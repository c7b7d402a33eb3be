"""The runner as one text that is shipped into boxes: its parts, put together the same way every time.

The parts are ordinary modules here, read and tested as such. In the box there is no package, so the
text carries their sources and registers each under its name before the next one is run.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

# each after what it imports
PARTS = ("runner_frames", "runner_processes", "runner_files", "runner_jobs", "runner_loop", "runner")
_START = """import sys, types
def part(name, source):
    module = sys.modules["consilience.sandboxes." + name] = types.ModuleType(name)
    exec(compile(source, name + ".py", "exec"), module.__dict__)
    return module
for name, source in SOURCES:
    last = part(name, source)
last.main()
"""
# reads the runner from the channel first, so that no file has to get into a container
BOOTSTRAP = (
    "import os\nleft, text = int(os.read(0, 8)), b''\n"
    "while left: chunk = os.read(0, left); text += chunk; left -= len(chunk) or exit(1)\n"
    "exec(compile(text, 'runner.py', 'exec'))"
)


@cache
def runner_text() -> bytes:
    """The whole runner as one Python program."""
    folder = Path(__file__).parent
    sources = [(name, (folder / f"{name}.py").read_text()) for name in PARTS]
    return f"SOURCES = {sources!r}\n{_START}".encode()


def runner_digest() -> str:
    """What a record names the runner by: the SHA-256 of its text."""
    return hashlib.sha256(runner_text()).hexdigest()


def bootstrap_frame() -> bytes:
    """What a program started with BOOTSTRAP reads first."""
    return b"%-8d" % len(runner_text()) + runner_text()
