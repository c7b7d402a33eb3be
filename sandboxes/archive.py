"""Archives of workspaces, which a program of the box wrote: looked at before anything is made of them.

Allowed are folders, regular files and symbolic links below the top, each once, parents first, nothing
through a link. Never compressed: an archive is as large as what it holds.
"""

from __future__ import annotations

import hashlib
import io
import tarfile

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
    except (tarfile.TarError, EOFError, OSError, UnicodeError) as error:
        raise ValueError(f"the archive cannot be read ({error})") from None
    return Snapshot(hashlib.sha256(archive).hexdigest(), archive, num_files)


def _check_member(entry: tarfile.TarInfo, folders: set[str], others: set[str]) -> None:
    name = entry.name
    parts = name.split("/")
    told = f"the archive's member {name[:80]!r}"
    if not (entry.isdir() or entry.issym() or entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE)):
        raise ValueError(f"{told} is no folder, regular file or symbolic link")
    if {"", ".", ".."} & set(parts) or "\0" in name + entry.linkname:
        raise ValueError(f"{told} does not lie below the top")
    if len(parts) > MAX_DEPTH or len(name.encode("utf-8", "surrogateescape")) > MAX_NAME_BYTES:
        raise ValueError(f"{told} has a name over {MAX_DEPTH} levels or {MAX_NAME_BYTES} bytes")
    if "/".join(parts[:-1]) not in folders:
        raise ValueError(f"{told} lies in what is no folder of it")
    if name in folders or name in others:
        raise ValueError(f"{told} comes twice")
