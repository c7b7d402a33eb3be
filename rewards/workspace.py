"""What an episode changed in its box, as a patch (sandboxes.md 5.5, tier C, step 1): computed out here.

The box stands still while its workspace is packed; the files are compared with what they were at the start.
Nothing in the box is asked, no `git`, no list of what changed; and the diff is no more trusted than one that
the model wrote: it goes through the same strict reader (`patches.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from consilience.rewards.patches import MAX_PATCH
from consilience.sandboxes.archive import read_files

PLAIN_PATH = re.compile(r"[A-Za-z0-9_.+-]+(?:[ /][A-Za-z0-9_.+-]+)*")
LEFT_BY_RUNNING = re.compile(r"(?:^|/)(?:__pycache__|\.[^/]*)(?:/|$)|\.pyc$")
NO_END = "\\ No newline at end of file\n"


def workspace_patch(box: Any, files: Mapping[str, str]) -> str:
    """A unified diff from `files` (path -> text) to the box's workspace; "" if nothing changed.

    A file that is no text any more, a link or too large counts as removed; new ones of that kind, caches and
    names that no patch can hold are left out. "" too for a workspace that cannot be packed: its owner saw to
    that. SandboxLost when the box is gone.
    """
    try:
        found = read_files(box.snapshot(), max_file_bytes=MAX_PATCH)
    except (OSError, ValueError):
        return ""
    now = {path: text for path, data in found.items() if (text := _text_of(data)) is not None}
    new = {path for path in now if path not in files and _may_be_new(path, now[path])}
    paths = sorted({*files, *new})
    return "".join(_diff(path, files.get(path), now.get(path)) for path in paths)


def _text_of(data: bytes | None) -> str | None:
    try:
        return None if data is None else data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _may_be_new(path: str, text: str) -> bool:
    is_plain = PLAIN_PATH.fullmatch(path) is not None and LEFT_BY_RUNNING.search(path) is None
    return is_plain and text != "" and "\0" not in text and "\r" not in text


def _diff(path: str, before: str | None, after: str | None) -> str:
    if before == after:
        return ""
    names = (
        f"a/{path}" if before is not None else "/dev/null",
        f"b/{path}" if after is not None else "/dev/null",
    )
    hunks = difflib.unified_diff(_lines(before or ""), _lines(after or ""), *names)
    return "".join(line if line.endswith("\n") else f"{line}\n{NO_END}" for line in hunks)


def _lines(text: str) -> list[str]:
    """Lines with their ends; only \\n ends one, as in a patch."""
    return re.findall(r"[^\n]*\n|[^\n]+", text)
