"""The image of Debian packages: the same lock, the same digest; what moved is named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from consilience.sandboxes import build_image
from consilience.sandboxes.image_packages import (
    Lock,
    Package,
    changes,
    make_image,
    make_layer,
    package_of,
    read_lock,
)

FILES = {
    "./bin/tool": (0o4755, b"#!/bin/sh\n"),
    "./usr/lib/data": (0o644, b"data"),
    "./usr/share/doc/tool/copyright": (0o644, b"words"),
}


def deb(path: Path, files: dict[str, tuple[int, bytes]], *, mtime: int = 0) -> Path:
    """A package as dpkg would make it, with a hard link and a symbolic one beside the files."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as tar:
        for name, (mode, content) in files.items():
            entry = tarfile.TarInfo(name)
            entry.mode, entry.size, entry.mtime, entry.uid = mode, len(content), mtime, mtime % 1000
            tar.addfile(entry, io.BytesIO(content))
        for kind, name in ((tarfile.LNKTYPE, "./bin/hard"), (tarfile.SYMTYPE, "./bin/soft")):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "./bin/tool" if kind == tarfile.LNKTYPE else "tool"
            tar.addfile(entry)
    members = [("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())]
    text = b"!<arch>\n"
    for name, content in members:
        text += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        text += b"\n" * (len(content) % 2)
    path.write_bytes(text)
    return path


def test_a_layer_holds_the_files_below_usr_without_documentation_owners_times_and_set_uid(tmp_path):
    layer = make_layer([deb(tmp_path / "tool_1_all.deb", FILES, mtime=1234567)])
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        entries = {entry.name: entry for entry in tar}
        assert tar.extractfile("usr/bin/hard").read() == b"#!/bin/sh\n"
    assert entries["usr/bin/tool"].mode == 0o755 and entries["usr/bin/soft"].linkname == "tool"
    assert entries["bin"].linkname == "usr/bin" and entries["workspace"].mode == 0o1777
    assert {"etc/passwd", "usr/lib/data"} <= set(entries)
    assert not [name for name in entries if "doc" in name]
    assert {(entry.mtime, entry.uid, entry.gid) for entry in entries.values()} == {(0, 0, 0)}


def test_the_same_files_give_the_same_digest_whenever_they_were_packed(tmp_path):
    one = make_layer([deb(tmp_path / "tool_1_all.deb", FILES, mtime=1)])
    two = make_layer([deb(tmp_path / "tool_2_all.deb", FILES, mtime=999)])
    assert make_image(one, "a:1", "amd64")[0] == make_image(two, "b:2", "amd64")[0]
    other = make_layer([deb(tmp_path / "tool_3_all.deb", {**FILES, "./usr/lib/data": (0o644, b"else")})])
    digest, archive = make_image(other, "a:1", "amd64")
    assert digest != make_image(one, "a:1", "amd64")[0]
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        manifest = json.loads(tar.extractfile("manifest.json").read())
    assert manifest[0]["RepoTags"] == ["a:1"] and digest == "sha256:" + manifest[0]["Config"][:64]


def test_a_lock_is_read_as_it_was_written_and_changes_are_named():
    packages = (Package("bash", "5.2-1", "a1"), Package("dash", "0.5", "b1"), Package("sed", "4.9", "c1"))
    lock = Lock("bookworm", "amd64", "sha256:0", packages)
    assert read_lock(lock.write()) == lock and changes(lock, lock) == []
    moved = (Package("bash", "5.2-2", "a2"), Package("sed", "4.9", "c2"), Package("zsh", "5", "d1"))
    assert changes(lock, Lock("bookworm", "amd64", "sha256:1", moved)) == [
        "bash: 5.2-1 is 5.2-2 now",
        "dash: 0.5 is gone",
        "sed: 4.9 has another content now",
        "zsh: 5 is new",
    ]
    for text in ("", "suite x\n", "suite a\narchitecture b\nimage c\nbash 1\n"):
        with pytest.raises(ValueError, match="lock file"):
            read_lock(text)


def test_the_lock_in_the_repository_names_an_image_and_a_python():
    lock = read_lock(build_image.LOCK_FILE.read_text())
    assert lock.image.startswith("sha256:") and len(lock.image) == 71
    names = {package.name for package in lock.packages}
    assert {"python3", "bash", "libc6", "coreutils"} <= names
    assert all(len(package.sha256) == 64 for package in lock.packages)


def test_kept_packages_are_used_without_the_network_and_must_give_the_digest(tmp_path, monkeypatch):
    path = deb(tmp_path / "tool_1%3a2_amd64.deb", FILES)
    package = package_of(path)
    assert (package.name, package.version) == ("tool", "1:2")
    assert build_image.packages_architecture([path, tmp_path / "x_1_all.deb"]) == "amd64"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = build_image.cache_folder()
    folder.mkdir(parents=True)
    (folder / f"{package.sha256}.deb").write_bytes(path.read_bytes())
    lock = Lock("bookworm", "amd64", make_image(make_layer([path]), "", "amd64")[0], (package,))
    monkeypatch.setattr(build_image, "LOCK_FILE", tmp_path / "image.lock")
    build_image.LOCK_FILE.write_text(lock.write())
    assert build_image.locked_layer() == (lock, make_layer([path]))
    build_image.LOCK_FILE.write_text(lock.write().replace(lock.image, "sha256:" + "0" * 64))
    with pytest.raises(build_image.SandboxUnavailable, match="it says sha256:000"):
        build_image.locked_layer()


def test_a_package_that_moved_is_named_and_the_lock_is_written_only_on_demand(tmp_path, monkeypatch, capsys):
    old = Lock("bookworm", "amd64", "sha256:0", (Package("tool", "1", "0" * 64),))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(build_image, "LOCK_FILE", tmp_path / "image.lock")
    monkeypatch.setattr(build_image, "_debian_source", lambda: ("bookworm", "http://mirror"))

    def fetch(*command: str) -> None:  # what debootstrap leaves behind
        folder = Path(command[-2], "var/cache/apt/archives")
        folder.mkdir(parents=True)
        deb(folder / "tool_2_amd64.deb", FILES)

    monkeypatch.setattr(build_image, "_run", fetch)
    build_image.LOCK_FILE.write_text(old.write())
    new, layer = build_image.locked_layer()
    told = capsys.readouterr().err
    assert "tool: 1 is 2 now" in told and "--repin" in told
    assert (
        new.image == make_image(layer, "", "amd64")[0] and read_lock(build_image.LOCK_FILE.read_text()) == old
    )
    assert build_image.locked_layer(is_repin=True)[0] == new == read_lock(build_image.LOCK_FILE.read_text())
    capsys.readouterr()
    assert build_image.locked_layer() == (new, layer) and capsys.readouterr().err == ""


def test_what_is_no_package_is_refused(tmp_path):
    path = tmp_path / "x_1_all.deb"
    for content in (b"no ar", b"!<arch>\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no Debian package"):
            make_layer([path])
