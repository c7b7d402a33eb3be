"""Archives of workspaces, which a program of the box wrote: looked at before anything is made of them.

Allowed are folders, regular files and symbolic links below the top, each once, parents first, nothing
through a link. Never compressed or sparse: an archive is as large as what it holds.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping

from consilience.sandboxes.protocol import Snapshot

MAX_MEMBERS = 100_000
MAX_DEPTH = 64
MAX_NAME_BYTES = 1024


def make_snapshot(archive: bytes) -> Snapshot:
    """The archive with its digest and number of files. ValueError names the first member that is refused."""
    folders, others, num_files = {""}, set(), 0
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
            for entry in tar:
                _check_member(entry, folders, others)
                (folders if entry.isdir() else others).add(entry.name)
                num_files += entry.isreg()
                if len(folders) + len(others) > MAX_MEMBERS:
                    raise ValueError(f"the archive has more than {MAX_MEMBERS} members")
    except (tarfile.TarError, EOFError, OSError, UnicodeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the archive cannot be read ({error})") from None
    return Snapshot(hashlib.sha256(archive).hexdigest(), archive, num_files)


def pack_files(files: Mapping[str, bytes]) -> Snapshot:
    """A snapshot of these files (path -> content) and their folders."""
    folders = {"/".join(name.split("/")[:i]) for name in files for i in range(1, name.count("/") + 1)}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted([*folders, *files]):
            entry = tarfile.TarInfo(name)
            if name in folders:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(files[name])
                tar.addfile(entry, io.BytesIO(files[name]))
    return make_snapshot(stream.getvalue())


def read_files(snapshot: Snapshot, *, max_file_bytes: int) -> dict[str, bytes | None]:
    """Path -> content of its regular files; None for links, and for files above `max_file_bytes`.

    ValueError as `make_snapshot`: who made the snapshot is not trusted either.
    """
    make_snapshot(snapshot.archive)
    found: dict[str, bytes | None] = {}
    with tarfile.open(fileobj=io.BytesIO(snapshot.archive), mode="r:") as tar:
        for entry in tar:
            if entry.isdir():
                continue
            content = tar.extractfile(entry) if entry.isreg() and entry.size <= max_file_bytes else None
            found[entry.name] = None if content is None else content.read()  # no limit: it is in memory
    return found


def _check_member(entry: tarfile.TarInfo, folders: set[str], others: set[str]) -> None:
    name = entry.name
    parts = name.split("/")
    told = f"the archive's member {name[:80]!r}"
    is_file = entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not entry.issparse() and entry.size >= 0
    if not (entry.isdir() or entry.issym() or is_file):
        raise ValueError(f"{told} is no folder, regular file or symbolic link")
    if {"", ".", ".."} & set(parts) or "\0" in name + entry.linkname:
        raise ValueError(f"{told} does not lie below the top")
    if len(parts) > MAX_DEPTH or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"{told} has a name over {MAX_DEPTH} levels or {MAX_NAME_BYTES} bytes")
    if "/".join(parts[:-1]) not in folders:
        raise ValueError(f"{told} lies in what is no folder of it")
    if name in folders or name in others:
        raise ValueError(f"{told} comes twice")
