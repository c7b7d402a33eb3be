"""Files and folders that are either whole or absent: write beside, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error (or what caused it) means there is no room left, whoever raised it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        if any(f"os error {number}" in str(error) for number in DISK_FULL):  # raised by compiled code
            return True
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return False


def fsync_file(path: Path) -> None:
    """The file's bytes are on the disk when this returns."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def fsync_folder(path: Path) -> None:
    """The folder's entries are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot; nothing to do
            raise
    finally:
        os.close(descriptor)


def flush_folder(folder: Path, flush_file: Callable[[Path], None] = fsync_file) -> None:
    """Every file and folder below is on the disk when this returns, and the folder itself."""
    for path in folder.rglob("*"):
        if path.is_file():
            flush_file(path)
        else:
            fsync_folder(path)
    fsync_folder(folder)


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`; a reader (and a crash) sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def replace_folder(beside: Path, folder: Path) -> None:
    """Put the complete folder `beside` in the place of `folder`, which may exist.

    A folder cannot be renamed over a full one, so the old one steps aside first and comes back if
    the second rename fails; `restore_folder` does the same after a crash between the two.
    """
    aside = _aside(folder)
    if aside.exists():
        shutil.rmtree(aside)
    if folder.exists():
        os.rename(folder, aside)
    try:
        os.rename(beside, folder)
    except BaseException:
        restore_folder(folder)
        raise
    fsync_folder(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def restore_folder(folder: Path) -> None:
    """Bring back the old folder if a replacement stopped half way; otherwise nothing."""
    aside = _aside(folder)
    if aside.exists() and not folder.exists():
        os.rename(aside, folder)


def folder_beside(folder: Path) -> Path:
    """A fresh, empty sibling to write into. What dead processes left for the same folder is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}.tmp-"
    for old in folder.parent.glob(f"{prefix}*"):
        owner = old.name.removeprefix(prefix)
        if owner == str(os.getpid()) or (owner.isdigit() and not _is_alive(int(owner))):
            shutil.rmtree(old, ignore_errors=True)
    beside = folder.parent / f"{prefix}{os.getpid()}"
    beside.mkdir()
    return beside


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
