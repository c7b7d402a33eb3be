"""Files of the workspace: opened without following links, emptied, packed into one archive and unpacked.

Part of the runner: standard library only, shipped into the box by `runner_bundle.py`. The archive is a
tar stream of folders, regular files and symbolic links in sorted order, without owners and times; the
process that writes or reads it has the model's identity and limits.
"""

import contextlib
import errno
import os
import stat
import time


def open_inside(workspace, path, flags, *, make_parents=False):
    """A descriptor below the workspace; every step refuses links, so nothing leads outside."""
    if path.startswith(workspace + "/"):
        path = path[len(workspace) :].lstrip("/")
    *parents, name = [part for part in path.split("/") if part != "."]
    if path.startswith("/") or not name or "" in parents or ".." in (*parents, name):
        raise PermissionError(errno.EPERM, "the path leaves the workspace")
    here = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parents:
            if make_parents:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=here)
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
            os.close(here)
            here = below
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=here)
    finally:
        os.close(here)


def read_whole(fd, max_bytes):
    """The bytes of a regular file as memory that the caller wipes; OSError where it is larger."""
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        raise PermissionError(errno.EPERM, "not a regular file")
    if info.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"it holds {info.st_size} bytes, max_bytes is {max_bytes}")
    data = bytearray(info.st_size)
    view, num_read = memoryview(data), 0
    while num_read < len(data):
        num_bytes = os.readv(fd, [view[num_read:]])
        if not num_bytes:
            break
        num_read += num_bytes
    return view[:num_read]


def empty_folder(path):
    """Removes all that lies below, at constant depth: deeper folders are first moved up to the top."""
    for name in os.listxattr(path) if hasattr(os, "listxattr") else ():
        with contextlib.suppress(OSError):
            os.removexattr(path, name)
    with contextlib.suppress(PermissionError):
        os.chmod(path, 0o1777)
    top = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    counter = 0
    try:
        while names := os.listdir(top):
            for name in names:
                if not stat.S_ISDIR(os.lstat(name, dir_fd=top).st_mode):
                    os.unlink(name, dir_fd=top)
                    continue
                counter = _dissolve(top, name, counter)
    finally:
        os.close(top)


def _dissolve(top, name, counter):
    """Removes one folder of `top`; the folders in it move up to `top`. The number of moves so far."""
    os.chmod(name, 0o700, dir_fd=top)
    folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=top)
    try:
        for entry in os.listdir(folder):
            if not stat.S_ISDIR(os.lstat(entry, dir_fd=folder).st_mode):
                os.unlink(entry, dir_fd=folder)
                continue
            os.chmod(entry, 0o700, dir_fd=folder)
            counter += 1
            moved = f".moved-{time.monotonic_ns()}-{counter}"
            os.rename(entry, moved, src_dir_fd=folder, dst_dir_fd=top)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=top)
    return counter


# -- the whole workspace as one archive -------------------------------------------------------------


def tell_failure(work, top):
    """`work(top)` in a confined child: a failure is a line on stderr and an exit status of 1."""
    os.close(3)
    try:
        return work(top)
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
        return 1


def pack_tree(top):
    """Writes everything below `top` to stdout as a tar stream. Runs in a confined child."""
    import tarfile

    with (
        open(1, "wb", closefd=False) as out,
        tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        _pack_folder(tar, top, "")
    return 0


def _pack_folder(tar, folder, prefix):
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        info = os.lstat(path)
        entry = tar.tarinfo(prefix + name)
        entry.mode = stat.S_IMODE(info.st_mode) & 0o777
        if stat.S_ISDIR(info.st_mode):
            entry.type = b"5"
            tar.addfile(entry)
            with _readable(path, info.st_mode, 0o700):
                _pack_folder(tar, path, f"{prefix}{name}/")
        elif stat.S_ISLNK(info.st_mode):
            entry.type, entry.linkname = b"2", os.readlink(path)
            tar.addfile(entry)
        elif stat.S_ISREG(info.st_mode):
            entry.size = info.st_size
            with _readable(path, info.st_mode, 0o600), open(path, "rb") as file:
                tar.addfile(entry, file)
        # pipes, sockets and devices are not files of a project


@contextlib.contextmanager
def _readable(path, mode, needed):
    """A file whose owner shut it is opened for the time of the copy."""
    is_shut = mode & needed != needed
    if is_shut:
        os.chmod(path, needed)
    try:
        yield
    finally:
        if is_shut:
            os.chmod(path, stat.S_IMODE(mode))


def unpack_tree(top):
    """Reads such a stream from stdin into `top`, which is empty. Runs in a confined child."""
    import tarfile

    modes = []
    with open(0, "rb", closefd=False) as source, tarfile.open(fileobj=source, mode="r|") as tar:
        for entry in tar:
            path = f"{top}/{entry.name}"
            if entry.isdir():
                os.mkdir(path, 0o700)
                modes.append((path, entry.mode))
            elif entry.issym():
                os.symlink(entry.linkname, path)
            else:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
                with open(fd, "wb") as file:
                    content = tar.extractfile(entry)
                    while content is not None and (chunk := content.read(1 << 16)):
                        file.write(chunk)
                os.chmod(path, entry.mode)
    for path, mode in reversed(modes):  # inner ones first: an outer one may shut them
        os.chmod(path, mode)
    return 0
