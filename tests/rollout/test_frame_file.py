"""Frames on disk: whatever happens to the bytes, what is read is a prefix of what was written."""

import os
import resource
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import EngineError
from consilience.rollout.frame_file import FRAME_BYTES, HEADER_BYTES, FrameFile, read_frames

PAYLOADS = st.lists(st.binary(max_size=40), min_size=1, max_size=12)


def written(folder, *batches, survives_power=False):
    path = Path(folder) / "f.log"
    file = FrameFile.create(path, survives_power=survives_power)
    for batch in batches:
        file.append(batch)
    file.close()
    return path


def test_a_frame_by_hand(tmp_path):
    path = written(tmp_path, [b"ab"], [b"c"])
    data = path.read_bytes()
    magic, number, zero, identity, crc = struct.unpack_from("<4sHHQI", data)
    assert (magic, number, zero, HEADER_BYTES) == (b"CSLF", 1, 0, 20) and crc == zlib.crc32(data[:16])
    at = 20
    for sequence, payload in enumerate((b"ab", b"c")):
        covered = struct.pack("<QIII", identity, len(payload), sequence, sequence) + payload
        head = struct.pack("<IIII", len(payload), sequence, sequence, zlib.crc32(covered))
        assert data[at : at + 16] == head  # the frames before were acknowledged: as many as the sequence says
        at += 16 + len(payload)
    assert at == len(data)
    found = read_frames(path)
    assert (found.payloads, found.num_bytes, found.is_torn, found.has_hole) == (
        [b"ab", b"c"],
        at,
        False,
        False,
    )


@settings(max_examples=150, deadline=None)
@given(PAYLOADS, st.data())
def test_any_prefix_of_the_bytes_reads_as_a_prefix_of_the_frames_and_is_no_hole(payloads, data):
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, payloads)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        junk = data.draw(st.sampled_from([b"", b"\0" * 50]))  # a file system may leave zeros behind the end
        path.write_bytes(whole[:cut] + junk)
        found = read_frames(path)
        ends = [HEADER_BYTES]
        for payload in payloads:
            ends.append(ends[-1] + FRAME_BYTES + len(payload))
        complete = sum(end <= cut for end in ends[1:])
        # A cut inside trailing zeros of a frame is healed by zeros behind it, no further.
        assert found.payloads[:complete] == payloads[:complete] == found.payloads[: len(payloads)][:complete]
        assert found.payloads == payloads[: len(found.payloads)]
        if not junk:
            assert len(found.payloads) == complete
        assert not found.has_hole
        reopened, before = FrameFile.reopen(path)
        reopened.append([b"next"])
        reopened.close()
        assert read_frames(path).payloads == [*before, b"next"] and before == found.payloads


@settings(max_examples=200, deadline=None)
@given(PAYLOADS, st.data())
def test_a_damaged_file_reads_as_a_prefix_and_says_so_if_later_frames_are_there(payloads, data):
    with tempfile.TemporaryDirectory() as folder:
        path = written(folder, *([p] for p in payloads))
        whole = path.read_bytes()
        start = data.draw(st.integers(0, len(whole) - 1))
        stop = data.draw(st.integers(start + 1, len(whole)))
        kind = data.draw(st.sampled_from(["zeros", "flip", "lost", "doubled"]))
        piece = whole[start:stop]
        new = {
            "zeros": b"\0" * len(piece),
            "flip": bytes([piece[0] ^ 0x10]) + piece[1:],
            "lost": b"",
            "doubled": piece + piece,
        }[kind]
        path.write_bytes(whole[:start] + new + whole[stop:])
        found = read_frames(path)
        assert found.payloads == payloads[: len(found.payloads)]
        ends = [HEADER_BYTES]
        for payload in payloads:
            ends.append(ends[-1] + FRAME_BYTES + len(payload))
        before = sum(end <= start for end in ends[1:])
        assert len(found.payloads) >= before
        untouched_behind = sum(begin >= stop for begin in ends[:-1])
        if start >= HEADER_BYTES and untouched_behind and len(found.payloads) < len(payloads):
            assert found.has_hole
            with pytest.raises(EngineError, match="damaged behind frame"):
                FrameFile.reopen(path)


def test_the_next_frame_behind_something_else_is_a_hole(tmp_path):
    """Bytes 20 to 102 doubled: what the first copy of a frame lacks, the second copy begins with."""
    path = written(tmp_path, *([p] for p in (b"", b"\0", b"\0", b"\0", b"\0", b"")))
    whole = path.read_bytes()
    path.write_bytes(whole[:103] + whole[20:])
    found = read_frames(path)
    assert found.payloads == [b"", b"\0", b"\0", b"\0", b"\0"] and found.has_hole


def test_an_unfinished_write_whose_pages_arrive_out_of_order_is_no_hole(tmp_path):
    path = written(tmp_path, [b"a"], [b"b" * 50, b"c"], survives_power=True)
    whole = path.read_bytes()
    at = whole.index(b"bbb")
    path.write_bytes(whole[:at] + b"\0" * 20 + whole[at + 20 :])
    found = read_frames(path)
    assert (found.payloads, found.is_torn, found.has_hole) == ([b"a"], True, False)
    file, before = FrameFile.reopen(path)
    file.append([b"d"])
    file.sync()
    file.append([b"e"])
    assert read_frames(path).payloads == [*before, b"d", b"e"]
    whole = path.read_bytes()
    at = whole.index(b"d", whole.index(b"a"))
    path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])  # "d" was on the disk, and "e" knows it
    assert read_frames(path).has_hole


def test_a_doubled_write_of_several_frames_is_read_once(tmp_path):
    path = written(tmp_path, [b"a"], [b"b", b"c"])
    whole = path.read_bytes()
    again = whole[HEADER_BYTES + FRAME_BYTES + 1 :]
    path.write_bytes(whole + again)
    found = read_frames(path)
    assert (found.payloads, found.is_torn, found.has_hole) == ([b"a", b"b", b"c"], False, False)


def test_a_frame_of_another_file_is_none_here(tmp_path):
    (tmp_path / "x").mkdir()
    mine, other = written(tmp_path, [b"a"]), written(tmp_path / "x", [b"q"], [b"b"])
    mine.write_bytes(mine.read_bytes() + other.read_bytes()[HEADER_BYTES + FRAME_BYTES + 1 :])
    found = read_frames(mine)
    assert found.payloads == [b"a"] and found.is_torn and not found.has_hole


def test_a_file_of_a_later_format_is_refused(tmp_path):
    path = written(tmp_path, [b"a"])
    head = struct.pack("<4sHHQ", b"CSLF", 2, 0, 7)
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)))
    with pytest.raises(EngineError, match="format 2"):
        read_frames(path)


def test_two_writers_cannot_make_one_file(tmp_path):
    written(tmp_path, [b"a"])
    with pytest.raises(EngineError, match="exists"):
        FrameFile.create(tmp_path / "f.log")


FULL = """
import resource, sys
from pathlib import Path
from consilience.conf.errors import EngineError
from consilience.rollout.frame_file import FrameFile, read_frames

path = Path(sys.argv[1])
file = FrameFile.create(path)
file.append([b"x" * 100])
acknowledged = 1
resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
try:
    while True:
        file.append([bytes([acknowledged]) * 100])
        acknowledged += 1
except EngineError as error:
    assert "free space there and resume" in str(error), error
found = read_frames(path)
assert len(found.payloads) == acknowledged == 2 and not found.is_torn, found
try:
    file.append([b"more"])
    raise SystemExit("a full disk took a frame")
except EngineError:
    pass
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
file.append([])
file.sync()
assert read_frames(path).payloads == [b"x" * 100, b"\\1" * 100, b"\\2" * 100, b"more"]
"""


def test_a_full_disk_is_one_clear_error_and_nothing_is_lost(tmp_path):
    """The limit makes the kernel take a part of the third frame and then refuse, as a full disk does."""
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "f.log")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_written_behind_half_a_frame_that_cannot_be_cut_off(tmp_path, monkeypatch):
    path = tmp_path / "f.log"
    file = FrameFile.create(path)
    file.append([b"kept"])
    write, calls = os.write, []

    def half(descriptor, data):
        calls.append(1)
        if len(calls) == 1:
            return write(descriptor, data[:7])
        raise OSError(28, "No space left on device")

    def refused(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", half)
        broken.setattr(os, "ftruncate", refused)
        with pytest.raises(EngineError, match="cannot write"):
            file.append([b"lost"])
    with pytest.raises(EngineError, match="half a frame"):
        file.append([b"more"])
    file.close()
    found = read_frames(path)
    assert found.payloads == [b"kept"] and found.is_torn and not found.has_hole
    reopened, before = FrameFile.reopen(path)
    reopened.append([b"next"])
    reopened.close()
    assert before == [b"kept"] and read_frames(path).payloads == [b"kept", b"next"]
