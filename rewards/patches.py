"""A candidate's patch, read strictly (sandboxes.md 5.5): ordinary text files on allowed paths, nothing else.

Everything a unified diff of git may smuggle is refused as a whole: links, submodules, modes, binaries,
renames and copies, paths that lead out, hunks that do not fit the base. A path that decides what is tested
or what runs before the tests (tests, conftest, pytest's settings, start-up files of Python, hooks, CI) is
dropped and named.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

MAX_PATCH = 1 << 20  # characters
MAX_FILES = 64
PROTECTED_NAMES = """conftest.py pytest.ini .pytest.ini tox.ini setup.cfg setup.py pyproject.toml noxfile.py
    makefile sitecustomize.py usercustomize.py .gitattributes .gitmodules .coveragerc""".split()  # noqa: SIM905
PROTECTED_PATHS = (
    "test_*.py",
    "*_test.py",
    "tests/*",
    "*/tests/*",
    "test/*",
    "*/test/*",
    "*.pth",
    ".*",
    "*/.*",
)
REFUSED_LINES = re.compile(
    r"(old mode|new mode|similarity index|dissimilarity index|rename (from|to)|copy (from|to)|"
    r"GIT binary patch|Binary files |Subproject commit )"
)
HUNK = re.compile(
    r"@@ -([0-9]{1,7})(?:,([0-9]{1,7}))? \+([0-9]{1,7})(?:,([0-9]{1,7}))? @@"
)  # MAX_PATCH lines


class PatchError(ValueError):
    """The patch as a whole is refused; the text names the line or path."""


@dataclass(frozen=True, slots=True)
class Applied:
    """files: path -> new text of what was changed (None: removed); dropped: protected paths it touched."""

    files: dict[str, str | None]
    dropped: tuple[str, ...]


def apply_patch(text: str, base: Mapping[str, str], *, allowed: Sequence[str] = ("*.py",)) -> Applied:
    """What a unified diff makes of the base tree (path -> text). `allowed` are patterns of whole paths.

    PatchError when it is too large, malformed, does not fit, or does what no patch of text needs to do.
    """
    if len(text) > MAX_PATCH:
        raise PatchError(f"the patch holds {len(text)} characters; {MAX_PATCH} are allowed")
    if "\0" in text or "\r" in text or re.search("[\ud800-\udfff]", text):
        raise PatchError("the patch holds NUL or carriage return characters, or halves of one")
    files: dict[str, str | None] = {}
    dropped: list[str] = []
    for old, new, hunks in _sections(text.split("\n")):
        path = new if new is not None else old
        if path is None or (old is not None and new is not None and old != new):
            raise PatchError(f"a file of the patch is renamed: {old} to {new}")
        if path in files or path in dropped:
            raise PatchError(f"{path} is changed twice")
        if is_protected(path) or not any(fnmatchcase(path, pattern) for pattern in allowed):
            dropped.append(path)
            continue
        if (old is None) == (path in base):
            raise PatchError(f"{path} {'exists already' if old is None else 'is not in the base tree'}")
        if any(place.startswith(path + "/") or path.startswith(place + "/") for place in (*base, *files)):
            raise PatchError(f"{path} is a folder of the tree, or lies below a file of it")
        changed = _apply(base.get(path, ""), hunks, path)
        if new is None and changed:
            raise PatchError(f"{path} is removed, but the patch leaves text of it")
        files[path] = None if new is None else changed
    if len(files) > MAX_FILES:
        raise PatchError(f"the patch changes {len(files)} files; {MAX_FILES} are allowed")
    return Applied(files, tuple(dropped))


def is_protected(path: str) -> bool:
    """Whether a path decides what is tested, or runs before the tests do."""
    lowered = path.lower()  # some file systems do not tell the cases apart
    return posixpath.basename(lowered) in PROTECTED_NAMES or any(
        fnmatchcase(lowered, pattern) or fnmatchcase(posixpath.basename(lowered), pattern)
        for pattern in PROTECTED_PATHS
    )


Hunks = list[tuple[int, list[str]]]


def _sections(lines: list[str]) -> list[tuple[str | None, str | None, Hunks]]:
    """(old path, new path, hunks) of each file; a hunk is its first old line (from 1) and its lines."""
    found: list[tuple[str | None, str | None, Hunks]] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        if REFUSED_LINES.match(line) or _is_special_mode(line):
            raise PatchError(f"line {place + 1}: {line[:80]!r} is more than a change of text")
        if not line.startswith("--- "):
            if line.startswith(("+++ ", "@@ ")):
                raise PatchError(f"line {place + 1}: {line[:40]!r} without a file before it")
            place += 1
            continue
        if place + 1 == len(lines) or not lines[place + 1].startswith("+++ "):
            raise PatchError(f"line {place + 1}: '---' without '+++' after it")
        old, new = _path(line[4:], "a/"), _path(lines[place + 1][4:], "b/")
        hunks, place = _hunks(lines, place + 2)
        if not hunks:
            raise PatchError(f"{new or old} has no change")
        found.append((old, new, hunks))
    if not found:
        raise PatchError("there is no patch: no line begins with '--- '")
    return found


def _is_special_mode(line: str) -> bool:
    """Modes of links (120000), submodules (160000) and programs (100755); 100644 is an ordinary file's."""
    words = re.match(r"(new file mode|deleted file mode) (\d+)$", line)
    if words:
        return words[2] != "100644"
    words = re.match(r"index [0-9a-f]+\.\.[0-9a-f]+ (\d+)$", line)
    return words is not None and words[1] != "100644"


def _path(text: str, prefix: str) -> str | None:
    """A path of the tree, or None for /dev/null."""
    path = text.split("\t")[0]
    if path == "/dev/null":
        return None
    path = path.removeprefix(prefix)
    parts = path.split("/")
    is_plain = all(re.fullmatch(r"[A-Za-z0-9_.+-]+( [A-Za-z0-9_.+-]+)*", part) for part in parts)
    if (
        not is_plain
        or any(part in (".", "..") or part.lower() == ".git" for part in parts)
        or len(path) > 200
    ):
        raise PatchError(f"{text[:80]!r} is no path of the tree")
    return path


def _hunks(lines: list[str], place: int) -> tuple[Hunks, int]:
    hunks: Hunks = []
    while place < len(lines) and (head := HUNK.match(lines[place])):
        num_old, num_new = int(head[2] or 1), int(head[4] or 1)
        body: list[str] = []
        place += 1
        while num_old > 0 or num_new > 0:
            if place == len(lines):
                raise PatchError("the last hunk is cut short")
            line = lines[place] or " "  # an editor may have taken the space of an empty line
            if line[0] not in " +-\\":
                raise PatchError(f"line {place + 1}: {line[:40]!r} in a hunk")
            num_old -= line[0] in " -"
            num_new -= line[0] in " +"
            body.append(line)
            place += 1
        if num_old or num_new:
            raise PatchError("a hunk holds other numbers of lines than it says")
        if place < len(lines) and lines[place].startswith("\\"):
            body.append(lines[place])
            place += 1
        hunks.append((int(head[1]), body))
    return hunks, place


def _apply(text: str, hunks: Hunks, path: str) -> str:
    """The hunks at exactly the lines they name: nothing is searched for."""
    old = re.findall(r"[^\n]*\n|[^\n]+", text)  # only \n ends a line, as in the patch
    new: list[str] = []
    done = 0
    for start, body in hunks:
        first = start - 1 if any(line[0] in " -" for line in body) else start
        if first < done or first > len(old):
            raise PatchError(f"{path}: a hunk at line {start} is out of place")
        new += old[done:first]
        done = first
        for number, line in enumerate(body):
            if line[0] == "\\":
                continue
            has_end = number + 1 == len(body) or body[number + 1][0] != "\\"
            content = line[1:] + ("\n" if has_end else "")
            if line[0] == "+":
                new.append(content)
                continue
            if done >= len(old) or old[done].rstrip("\n") != content.rstrip("\n"):
                raise PatchError(f"{path}: line {done + 1} is not what the patch says")
            if line[0] == " ":
                new.append(old[done])
            done += 1
    return "".join(new + old[done:])
