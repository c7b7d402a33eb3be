"""A root file system from Debian packages, the same to the last bit for the same packages.

`debootstrap` fetches the packages and checks the archive's signatures; nothing of them is run. Their
files are laid into one layer, sorted, without times and owners, so that a lock of package names,
versions and checksums fixes the image's digest. Documentation and set-uid bits stay out.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import tarfile
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = ("usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/locale/", "usr/share/lintian/")
MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")  # links into /usr
FOLDERS = ("dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var", "workspace")
LINKS = {"usr/bin/awk": "mawk", "usr/bin/which": "which.debianutils", "usr/bin/python": "python3"}
TEXTS = {
    "etc/passwd": "root:x:0:0::/:/bin/false\nmodel:x:1000:1000::/workspace:/bin/sh\n",
    "etc/group": "root:x:0:\nmodel:x:1000:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
}


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """One file of the archive, by name."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Lock:
    """What an image is made of, and the digest that this gives."""

    suite: str
    architecture: str
    image: str  # "sha256:…"
    packages: tuple[Package, ...]

    def write(self) -> str:
        """As the text of a lock file."""
        head = f"suite {self.suite}\narchitecture {self.architecture}\nimage {self.image}\n"
        return head + "".join(f"{p.name} {p.version} {p.sha256}\n" for p in self.packages)


def read_lock(text: str) -> Lock:
    """ValueError for what is no lock file."""
    rows = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    heads = ["suite", "architecture", "image"]
    if [row[0] for row in rows[:3]] != heads or {len(row) for row in rows[3:]} - {3}:
        raise ValueError("the lock file must begin with suite, architecture and image, then hold packages")
    suite, architecture, image = (row[1] for row in rows[:3])
    return Lock(suite, architecture, image, tuple(sorted(Package(*row) for row in rows[3:])))


def changes(old: Lock, new: Lock) -> list[str]:
    """Each package that is another one now, as "libc6: 2.36-9 is 2.36-10 now"."""
    before, after = ({p.name: p for p in lock.packages} for lock in (old, new))
    told = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            told.append(f"{name}: {before[name].version} is gone")
        elif name not in before:
            told.append(f"{name}: {after[name].version} is new")
        elif before[name].version != after[name].version:
            told.append(f"{name}: {before[name].version} is {after[name].version} now")
        elif before[name] != after[name]:
            told.append(f"{name}: {before[name].version} has another content now")
    return told


def package_of(path: Path) -> Package:
    """By a package's file name, where apt writes the ":" of a version as "%3a"."""
    name, version, _ = path.name.split("_")
    return Package(name, urllib.parse.unquote(version), hashlib.sha256(path.read_bytes()).hexdigest())


def make_layer(packages: list[Path]) -> bytes:
    """The files of all packages, in the order given, as one tar. ValueError for what is no package."""
    entries: dict[str, tuple[tarfile.TarInfo, bytes]] = {}
    for name in FOLDERS:
        _put(entries, name, tarfile.DIRTYPE, mode=0o1777 if name in ("tmp", "workspace") else 0o755)
    for path in packages:
        with tarfile.open(fileobj=io.BytesIO(_data_member(path)), mode="r:*") as tar:
            for entry in tar:
                _take(entries, tar, entry)
    for name in MERGED:
        if any(path.startswith(f"usr/{name}/") for path in entries):
            _put(entries, name, tarfile.SYMTYPE, target=f"usr/{name}")
    for name, target in LINKS.items():
        if posixpath.join(posixpath.dirname(name), target) in entries and name not in entries:
            _put(entries, name, tarfile.SYMTYPE, target=target)
    for name, text in TEXTS.items():
        _put(entries, name, tarfile.REGTYPE, data=text.encode(), mode=0o644)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(entries):
            entry, data = entries[name]
            tar.addfile(entry, io.BytesIO(data))
    return out.getvalue()


def _data_member(path: Path) -> bytes:
    """`data.tar.*` of a package, which is an `ar` archive."""
    data = path.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise ValueError(f"{path.name} is no Debian package")
    place = 8
    while place + 60 <= len(data):
        name, size = data[place : place + 16].strip(b" /"), int(data[place + 48 : place + 58])
        if name.startswith(b"data.tar"):
            return data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
    raise ValueError(f"{path.name} is no Debian package")


def _take(
    entries: dict[str, tuple[tarfile.TarInfo, bytes]], tar: tarfile.TarFile, entry: tarfile.TarInfo
) -> None:
    name = _place(entry.name)
    if not name or (name + "/").startswith(LEFT_OUT) or name in MERGED:
        return
    mode = entry.mode & 0o777
    if entry.isdir():
        if name not in entries:
            _put(entries, name, tarfile.DIRTYPE, mode=mode)
    elif entry.issym():
        _put(entries, name, tarfile.SYMTYPE, target=entry.linkname)
    elif entry.islnk() and _place(entry.linkname) in entries:
        _put(entries, name, tarfile.REGTYPE, data=entries[_place(entry.linkname)][1], mode=mode)
    elif entry.isreg() and (file := tar.extractfile(entry)) is not None:
        _put(entries, name, tarfile.REGTYPE, data=file.read(), mode=mode)


def _place(name: str) -> str:
    """Below the real folder, as /bin and /lib are links into /usr."""
    name = posixpath.normpath(name).lstrip("./")
    return f"usr/{name}" if name.split("/")[0] in MERGED and "/" in name else name


def _put(
    entries: dict[str, tuple[tarfile.TarInfo, bytes]],
    name: str,
    kind: bytes,
    *,
    data: bytes = b"",
    target: str = "",
    mode: int = 0o777,
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, target, len(data)
    entries[name] = (entry, data)


def make_image(layer: bytes, name: str, architecture: str) -> tuple[str, bytes]:
    """The image's digest ("sha256:…") and what `docker load` reads: one layer, no time of making."""
    layer_digest = hashlib.sha256(layer).hexdigest()
    config = {
        "architecture": architecture,
        "config": {"Cmd": ["/bin/sh"], "WorkingDir": "/workspace"},
        "created": "1970-01-01T00:00:00Z",
        "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "consilience"}],
        "os": "linux",
        "rootfs": {"diff_ids": [f"sha256:{layer_digest}"], "type": "layers"},
    }
    text = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(text).hexdigest()
    manifest = [{"Config": f"{digest}.json", "RepoTags": [name], "Layers": [f"{layer_digest}/layer.tar"]}]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, data in (
            (f"{digest}.json", text),
            (f"{layer_digest}/layer.tar", layer),
            ("manifest.json", json.dumps(manifest).encode()),
        ):
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return f"sha256:{digest}", out.getvalue()
