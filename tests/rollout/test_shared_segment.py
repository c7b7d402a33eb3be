"""Weights in shared memory: mapped, unchangeable, and gone with the processes that held them."""

import contextlib
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.rollout.publishing import announce, verify
from consilience.rollout.shared_segment import SharedSegment, is_available, map_segment

pytestmark = pytest.mark.skipif(not is_available(), reason="needs Linux: anonymous files in memory")

WEIGHTS = {
    "w": torch.randn(300, 70, generator=torch.Generator().manual_seed(0)),
    "b": torch.ones(3, dtype=torch.bfloat16),
    "table": torch.tensor([[5, 1 << 40]]),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}


def holders(inode):
    """Processes that hold or map the file of this inode; the kernel keeps its pages for nobody else."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # another user's, or gone
            maps = (process / "maps").read_text().splitlines()
            if any("consilience-weights" in line and line.split()[4] == str(inode) for line in maps):
                found.add(int(process.name))
            for fd in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # the one that lists this folder
                    if "consilience-weights" in os.readlink(fd) and fd.stat().st_ino == inode:
                        found.add(int(process.name))
    return found


def inode_of(address):
    return os.stat(f"/proc/{address.pid}/fd/{address.descriptor}").st_ino


def test_what_is_mapped_is_what_was_published_without_a_copy():
    publication = announce(WEIGHTS, 3)
    segment = SharedSegment(WEIGHTS, publication)
    mapped = map_segment(segment.address, publication)
    verify(mapped, publication)
    first = mapped["w"].data_ptr()
    (line,) = [
        s
        for s in Path("/proc/self/maps").read_text().splitlines()
        if int(s.split("-")[0], 16) <= first < int(s.split("-")[1].split()[0], 16)
    ]
    assert "memfd:consilience-weights" in line  # the tensor lies in the segment's own pages


def test_nobody_can_change_a_segment_and_a_reader_s_write_stays_its_own():
    publication = announce(WEIGHTS, 3)
    segment = SharedSegment(WEIGHTS, publication)
    one, other = (map_segment(segment.address, publication) for _ in range(2))
    one["w"].zero_()
    verify(other, publication)
    path = f"/proc/self/fd/{segment.address.descriptor}"
    descriptor = os.open(path, os.O_RDWR)
    for change in (lambda: os.pwrite(descriptor, b"x", 100), lambda: os.ftruncate(descriptor, 10)):
        with pytest.raises(PermissionError):
            change()
    os.close(descriptor)
    verify(map_segment(segment.address, publication), publication)


def test_a_segment_that_is_gone_or_another_one_is_an_error():
    publication = announce(WEIGHTS, 3)
    segment = SharedSegment(WEIGHTS, publication)
    address, kept = segment.address, map_segment(segment.address, publication)
    with pytest.raises(EngineError, match="no longer the segment"):
        map_segment(replace(address, mark=bytes(64)), publication)
    with pytest.raises(EngineError, match="announced were 64"):
        map_segment(address, announce({"w": torch.zeros(2)}, 1))
    segment.close()
    segment.close()
    with pytest.raises(EngineError, match="cannot reach"):
        map_segment(address, publication)
    verify(kept, publication)  # what is mapped stays
    with pytest.raises(WeightsRefused, match="tensor b: found nothing"):
        SharedSegment({n: t for n, t in WEIGHTS.items() if n != "b"}, publication)


def test_a_segment_nobody_refers_to_is_closed():
    publication = announce(WEIGHTS, 3)
    segment = SharedSegment(WEIGHTS, publication)
    inode = inode_of(segment.address)
    assert holders(inode) == {os.getpid()}
    del segment
    assert holders(inode) == set()


def _publish(pipe):
    publication = announce(WEIGHTS, 3)
    segment = SharedSegment(WEIGHTS, publication)
    pipe.send((segment.address, publication))
    pipe.recv()


def test_after_kill_9_of_the_publisher_nothing_is_left_but_what_a_worker_maps():
    before = set(os.listdir("/dev/shm"))
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_publish, args=(theirs,))
    child.start()
    address, publication = ours.recv()
    mapped = map_segment(address, publication)
    inode = inode_of(address)
    assert holders(inode) == {child.pid, os.getpid()}
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert holders(inode) == {os.getpid()}
    verify(mapped, publication)  # whole to the end: a worker in the middle of loading is not disturbed
    del mapped
    assert holders(inode) == set()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "consilience" in name]
