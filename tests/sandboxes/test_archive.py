"""Snapshots: what comes back is what was there, and an archive that tricks is refused before it is used."""

from __future__ import annotations

import errno
import io
import tarfile

import pytest

from consilience.sandboxes.archive import MAX_DEPTH, make_snapshot, pack_files, read_files
from consilience.sandboxes.protocol import Limits, Snapshot


def tar_of(*members: tuple[str, bytes, bytes | str]) -> bytes:
    """(name, type, content or link target) as an archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            if isinstance(content, str):
                entry.linkname = content
            else:
                entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


MESS = (
    "import os\nos.makedirs('a/b'); open('a/b/f', 'wb').write(bytes(range(256)) * 300)\n"
    "open('run.sh', 'w').write('echo ran'); os.chmod('run.sh', 0o755)\nos.symlink('/etc/passwd', 'link')\n"
    "os.mkfifo('pipe'); os.mkdir('shut'); open('shut/in', 'w').write('x'); os.chmod('shut/in', 0)\n"
    "os.chmod('shut', 0); os.mkdir('empty'); open('\\u00e4 b', 'w')"
)
LIST = (
    "import os, hashlib\nos.chmod('shut', 0o700); os.chmod('shut/in', 0o600)\n"
    "for top, folders, files in sorted(os.walk('.')):\n    print(top)\n"
    "    for f in sorted(files):\n        p = top + '/' + f; s = os.lstat(p)\n"
    "        if os.path.islink(p): print(p, os.readlink(p))\n"
    "        else: print(p, oct(s.st_mode), hashlib.md5(open(p, 'rb').read()).hexdigest())\n"
)


def test_a_workspace_comes_back_in_the_same_and_in_another_box(box, open_box):
    assert box.run_python(MESS).is_ok
    snapshot = box.snapshot()
    assert snapshot.num_files == 4 and box.snapshot() == snapshot
    assert box.exec(["rm", "pipe"]).is_ok
    before = box.run_python(LIST)
    assert before.is_ok, before.stderr
    box.restore(snapshot)
    assert box.run_python(LIST).stdout == before.stdout
    other = open_box()
    other.write("old", b"gone")
    other.restore(snapshot)
    assert other.run_python(LIST).stdout == before.stdout


def test_the_box_stands_still_while_it_is_packed_and_goes_on_after(box):
    code = (
        "import os\nn = 0\nwhile True:\n    n += 1\n    for name in ('one', 'two'):\n"
        "        open(name + '.new', 'w').write(str(n)); os.replace(name + '.new', name)"
    )
    process = box.spawn(["python3", "-I", "-c", code])
    while not box.exec(["test", "-s", "two"]).is_ok:
        pass
    snapshot = box.snapshot()
    with tarfile.open(fileobj=io.BytesIO(snapshot.archive)) as tar:
        one, two = (int(tar.extractfile(name).read()) for name in ("one", "two"))
    assert one - two in (0, 1)
    assert box.exec(["sh", "-c", "x=$(cat one); sleep 0.2; test $x != $(cat one)"]).is_ok
    process.kill()
    process.wait(5)


def test_one_too_large_is_refused_both_ways_and_the_box_lives(box, open_box):
    box.run_python("import os\nopen('f', 'wb').write(os.urandom(3 << 20))")
    with pytest.raises(OSError, match="over 1000000 bytes") as told:
        box.snapshot(max_bytes=1_000_000)
    assert told.value.errno == errno.EFBIG
    snapshot = box.snapshot()
    small = open_box(Limits(workspace_bytes=1 << 20))
    with pytest.raises(OSError, match="no room") as told:
        small.restore(snapshot)
    assert told.value.errno == errno.ENOSPC
    assert small.exec(["ls", "-A"]).stdout == b"" and box.exec(["ls"]).stdout == b"f\n"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("../x", tarfile.REGTYPE, b"")], "below the top"),
        ([("/x", tarfile.REGTYPE, b"")], "below the top"),
        ([("a", tarfile.DIRTYPE, b""), ("a/../../x", tarfile.REGTYPE, b"")], "below the top"),
        ([("a", tarfile.SYMTYPE, "/etc"), ("a/x", tarfile.REGTYPE, b"")], "lies in what is no folder"),
        ([("a", tarfile.SYMTYPE, "/etc"), ("a", tarfile.DIRTYPE, b"")], "comes twice"),
        ([("a", tarfile.LNKTYPE, "/etc/passwd")], "no folder, regular file"),
        ([("a", tarfile.FIFOTYPE, b"")], "no folder, regular file"),
        ([("a", tarfile.CHRTYPE, b"")], "no folder, regular file"),
        ([("n" * 1025, tarfile.REGTYPE, b"")], "has a name over"),
        ([("/".join("d" * k), tarfile.DIRTYPE, b"") for k in range(1, MAX_DEPTH + 2)], "has a name over"),
    ],
)
def test_members_that_lead_elsewhere_are_refused(members, words):
    with pytest.raises(ValueError, match=words):
        make_snapshot(tar_of(*members))


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)},
        {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 20)},
        {"size": "-5"},
        {"size": str(1 << 99)},
        {"path": "a\0b"},
    ],
)
def test_a_member_of_another_size_than_it_holds_is_refused(headers):
    stream, entry = io.BytesIO(), tarfile.TarInfo("f")
    entry.size, entry.pax_headers = 512, headers
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(entry, io.BytesIO(b"0\n".ljust(512, b"\0")))
    with pytest.raises(ValueError, match="the archive"):
        make_snapshot(stream.getvalue())


def test_what_is_no_archive_and_what_was_changed_are_refused(box):
    with pytest.raises(ValueError, match="cannot be read"):
        make_snapshot(b"no tar" * 1000)
    good = make_snapshot(tar_of(("f", tarfile.REGTYPE, b"x")))
    box.write("kept", b"x")
    with pytest.raises(ValueError, match="the snapshot says"):
        box.restore(Snapshot("0" * 64, good.archive, 1))
    assert box.read("kept") == b"x"


def test_a_compressed_archive_is_refused():
    import gzip

    with pytest.raises(ValueError, match="cannot be read"):
        make_snapshot(gzip.compress(tar_of(("f", tarfile.REGTYPE, b"x"))))


def test_packed_files_are_read_back_and_what_is_no_file_or_too_large_is_named():
    files = {"a/b/c.txt": b"1", "a.txt": b"", "z": b"12345"}
    assert read_files(pack_files(files), max_file_bytes=5) == files
    assert read_files(pack_files(files), max_file_bytes=4) == {**files, "z": None}
    assert pack_files(files) == pack_files(dict(reversed(files.items())))
    linked = make_snapshot(tar_of(("d", tarfile.DIRTYPE, b""), ("d/l", tarfile.SYMTYPE, "/etc/passwd")))
    assert read_files(linked, max_file_bytes=5) == {"d/l": None}
    with pytest.raises(ValueError):
        read_files(Snapshot("", b"no archive", 0), max_file_bytes=5)
