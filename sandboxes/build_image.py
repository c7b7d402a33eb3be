"""Builds the image that Docker boxes use, without a registry: `python -m consilience.sandboxes.build_image`.

Two sources. "debootstrap" (root, the tool installed): a minimal Debian with python3, from the packages
that `image.lock` names, fetched from the machine's own mirror and kept; the same lock gives the same
image digest. Packages that moved upstream are named, the image is made of what there is, and `--repin`
writes the new lock. "host": the interpreter, its library and a shell's tools copied from this machine,
about 60 MB, no root needed. `--engine` first installs and starts a Docker Engine where none answers.
An image that exists is kept unless `--rebuild` is given.
"""

from __future__ import annotations

import argparse
import glob
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.docker_driver import BUILD_COMMAND, DEFAULT_IMAGE, find_engine
from consilience.sandboxes.docker_engine import ensure_engine
from consilience.sandboxes.image_packages import Lock, changes, make_image, make_layer, package_of, read_lock

LOCK_FILE = Path(__file__).with_name("image.lock")

TOOLS = (
    "sh bash ls cat cp mv rm mkdir rmdir ln touch chmod head tail wc sort uniq cut tr tee seq sleep true "
    "false echo printf env test expr date id pwd stat du df find grep sed awk xargs diff cmp tar gzip "
    "basename dirname readlink realpath mktemp yes timeout nice setsid kill ps od base64 sha256sum md5sum"
)
FOLDERS = ("dev", "proc", "sys", "tmp", "workspace", "etc", "root", "run", "var")


def build(
    image: str = DEFAULT_IMAGE, *, source: str = "auto", is_rebuild: bool = False, is_repin: bool = False
) -> str:
    """Makes `image` if it is missing; the source it came from, or "kept". SandboxUnavailable says why not."""
    engine = find_engine(image)
    if not isinstance(engine, str) and not (is_rebuild or is_repin):
        return "kept"
    if isinstance(engine, str) and "has no image" not in engine:
        raise SandboxUnavailable(f"cannot build {image}: {engine}")
    if shutil.which("docker") is None:
        raise SandboxUnavailable(f"cannot build {image}: the docker command line client is not installed")
    can_bootstrap = os.geteuid() == 0 and shutil.which("debootstrap") is not None
    if source == "auto":
        source = "debootstrap" if can_bootstrap else "host"
    if source == "debootstrap" and not can_bootstrap:
        raise SandboxUnavailable(
            f"cannot build {image} by debootstrap: it needs root and the package debootstrap"
        )
    with tempfile.TemporaryDirectory(prefix="consilience-image-") as folder:
        archive = Path(folder, "image.tar")
        if source == "debootstrap":
            lock, layer = locked_layer(is_repin=is_repin)
            archive.write_bytes(make_image(layer, image, lock.architecture)[1])
            _run("docker", "load", "--input", str(archive))
        else:
            _copy_host(Path(folder), archive)
            _run("docker", "import", str(archive), image)
    return source


COMMAND_LIMIT_S = 3600.0  # a bootstrap fetches a few hundred packages


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise SandboxUnavailable(f"{command[0]} took over {COMMAND_LIMIT_S:g} s and was ended") from None
    if done.returncode:
        raise SandboxUnavailable(
            f"{command[0]} ended with {done.returncode}: {(done.stderr or done.stdout)[-400:]}"
        )


def locked_layer(*, is_repin: bool = False) -> tuple[Lock, bytes]:
    """The image's layer and the lock it answers to: `image.lock`, or what upstream has become.

    Packages that are kept from before are not fetched again. SandboxUnavailable when the files of the
    lock give another digest than it says.
    """
    lock, folder = read_lock(LOCK_FILE.read_text()), cache_folder()
    kept = [folder / f"{package.sha256}.deb" for package in lock.packages]
    if not is_repin and all(path.exists() for path in kept):
        return _checked(lock, make_layer(kept))
    with tempfile.TemporaryDirectory(prefix="consilience-packages-") as scratch:
        suite, mirror = _debian_source()
        command = ["debootstrap", "--variant=minbase", "--include=python3", "--download-only"]
        _run(*command, suite, f"{scratch}/root", mirror)
        fetched = sorted(Path(scratch, "root/var/cache/apt/archives").glob("*.deb"))
        found = {package_of(path): path for path in fetched}
        folder.mkdir(parents=True, exist_ok=True)
        for package, path in found.items():
            shutil.copyfile(path, folder / f"{package.sha256}.deb")
    packages = tuple(sorted(found))
    layer = make_layer([folder / f"{package.sha256}.deb" for package in packages])
    architecture = packages_architecture(fetched)
    new = Lock(suite, architecture, make_image(layer, "", architecture)[0], packages)
    if told := changes(lock, new):
        print("the archive has moved since image.lock was written:", *told, sep="\n  ", file=sys.stderr)
        print(f"re-pin with `{BUILD_COMMAND} --repin` and commit image.lock", file=sys.stderr)
    if is_repin:
        LOCK_FILE.write_text(new.write())
    return _checked(lock, layer) if not told and not is_repin else (new, layer)


def _checked(lock: Lock, layer: bytes) -> tuple[Lock, bytes]:
    digest, _ = make_image(layer, "", lock.architecture)
    if digest != lock.image:
        raise SandboxUnavailable(f"the packages of image.lock give {digest}; it says {lock.image}")
    return lock, layer


def packages_architecture(paths: list[Path]) -> str:
    """The machine's, from the packages' file names; "all" is every machine's."""
    found = {path.stem.rpartition("_")[2] for path in paths} - {"all"}
    if len(found) != 1:
        raise SandboxUnavailable(f"the packages are for {sorted(found)}; one architecture is needed")
    return found.pop()


def cache_folder() -> Path:
    """Where packages are kept by checksum between builds."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "consilience", "packages")


def _debian_source() -> tuple[str, str]:
    """Suite and mirror that this machine itself installs from."""
    suite = re.search(r"^VERSION_CODENAME=(\w+)", Path("/etc/os-release").read_text(), re.M)
    if suite is None:
        raise SandboxUnavailable("debootstrap needs a Debian or Ubuntu machine; use --source host")
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    texts = [path.read_text(errors="replace") for path in sources if path.is_file()]
    return suite[1], mirror_of("\n\n".join(texts), suite[1])


def mirror_of(sources: str, suite: str) -> str:
    """The address that apt's sources, in either of their two forms, give for a suite."""
    if line := re.search(rf"^deb\s+(?:\[[^]]*\]\s+)?(\S+)\s+{suite}\s", sources, re.M):
        return line[1]
    for stanza in re.split(r"\n\s*\n", sources):
        address = re.search(r"^URIs:\s*(\S+)", stanza, re.M)
        if address and re.search(rf"^Suites:.*(?<!\S){suite}(?!\S)", stanza, re.M):
            return address[1]
    return "http://deb.debian.org/debian"


def _copy_host(folder: Path, archive: Path) -> None:
    """A root file system from this machine's /usr: tools, the libraries they link, python3."""
    python = os.path.realpath("/usr/bin/python3")
    if not os.path.exists(python):
        raise SandboxUnavailable(
            "the image's interpreter is copied from /usr/bin/python3, which does not exist here"
        )
    version = os.path.basename(python)
    programs = [path for name in TOOLS.split() if (path := shutil.which(name, path="/usr/bin:/bin"))]
    extensions = glob.glob(f"/usr/lib/{version}/lib-dynload/*.so")
    libraries = [library for path in (*programs, python, *extensions) for library in _linked(path)]
    files = {_place(path): os.path.realpath(path) for path in (*programs, *libraries, python)}
    with tarfile.open(archive, "w") as tar:
        for name in FOLDERS:
            entry = tarfile.TarInfo(name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o1777 if name in ("tmp", "workspace") else 0o755
            tar.addfile(entry)
        for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
            if os.path.islink(f"/{name}"):
                tar.add(f"/{name}", name, recursive=False)
        for place, path in files.items():
            tar.add(path, place, recursive=False)
        link = tarfile.TarInfo("usr/bin/python3")
        link.type, link.linkname = tarfile.SYMTYPE, version
        tar.addfile(link)
        tar.add(f"/usr/lib/{version}", f"usr/lib/{version}", filter=_without_caches)
        passwd = b"root:x:0:0::/:/bin/sh\n"
        entry = tarfile.TarInfo("etc/passwd")
        entry.size = len(passwd)
        tar.addfile(entry, io.BytesIO(passwd))


def _place(path: str) -> str:
    """Where a file goes in the archive: below the real folder, as /bin and /lib are links into /usr."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)).lstrip("/")


def _linked(path: str) -> list[str]:
    """Absolute paths of the shared libraries, the loader included, that a program needs."""
    told = subprocess.run(["ldd", path], capture_output=True, text=True, timeout=60)
    return re.findall(r"(?:=> |^\s+)(/\S+)", told.stdout, re.M)


def _without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    skipped = ("__pycache__", "/test/", "/config-", "/ensurepip/", "/idlelib/", "/tkinter/")
    return None if any(part in entry.name + "/" for part in skipped) else entry


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the image that Docker sandboxes use.")
    parser.add_argument("--image", default=DEFAULT_IMAGE)
    parser.add_argument("--source", choices=("auto", "debootstrap", "host"), default="auto")
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--repin", action="store_true", help="write image.lock as the archive is now")
    parser.add_argument("--engine", action="store_true", help="install and start a Docker Engine if needed")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.engine:
            print(f"engine: {ensure_engine()}")
        source = "debootstrap" if chosen.repin else chosen.source
        made = build(chosen.image, source=source, is_rebuild=chosen.rebuild, is_repin=chosen.repin)
        print(f"{chosen.image}: {made}")
    except SandboxUnavailable as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
