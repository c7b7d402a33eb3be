"""The folder of entries: whole or absent, checked, bounded, shared, and what a kill leaves."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from consilience.rollout.prefix_store import ABANDONED_S, HEAD_BYTES, PrefixStore

torch.set_num_threads(1)
BIG = 1 << 30


def entry(seed, num_bytes=400):
    g = torch.Generator().manual_seed(seed)
    return {
        "a": torch.rand(num_bytes // 4, generator=g),
        "b": torch.tensor([seed]),
        "none": torch.empty(0, 3),
    }


def same(one, two):
    return one is not None and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def paths(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "lock")


def test_what_is_written_is_read_by_another_process_s_store(tmp_path):
    assert PrefixStore(tmp_path, BIG).write("abc.block", entry(1))
    store = PrefixStore(tmp_path, BIG)
    assert store.has("abc.block") and same(store.read("abc.block"), entry(1))
    assert store.read("abd.block") is None and store.num_corrupted == 0
    assert store.num_bytes() == sum(p.stat().st_size for p in paths(tmp_path))


@pytest.mark.parametrize("place", [0, 9, HEAD_BYTES + 3, -1])
def test_one_flipped_bit_is_a_miss_that_is_counted_and_removed(place, tmp_path):
    store = PrefixStore(tmp_path, BIG)
    store.write("abc", entry(1))
    (path,) = paths(tmp_path)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    assert store.read("abc") is None and store.num_corrupted == 1 and not paths(tmp_path)
    assert store.write("abc", entry(1)) and same(store.read("abc"), entry(1))


@pytest.mark.parametrize("keep", [0, 5, HEAD_BYTES, HEAD_BYTES + 30])
def test_a_file_cut_short_is_a_miss(keep, tmp_path):
    store = PrefixStore(tmp_path, BIG)
    store.write("abc", entry(1))
    os.truncate(paths(tmp_path)[0], keep)
    assert store.read("abc") is None and store.num_corrupted == 1


def test_an_entry_under_another_s_name_is_a_miss(tmp_path):
    store = PrefixStore(tmp_path, BIG)
    store.write("abc", entry(1))
    os.rename(tmp_path / "ab" / "abc", tmp_path / "ab" / "abd")
    assert store.read("abd") is None and store.num_corrupted == 1


def test_the_entries_used_longest_ago_go_first(tmp_path):
    size = len(b"".join(p.read_bytes() for p in _one_entry(tmp_path / "probe")))
    store = PrefixStore(tmp_path / "store", 8 * size)
    for n in range(8):
        store.write(f"{n}x", entry(n))
        store.touch([f"{n}x"])
    store.touch(["0x", "1x"])
    store.write("8x", entry(8))
    assert store.num_evicted == 2 and store.num_bytes() == 7 * size
    assert [store.has(f"{n}x") for n in range(9)] == [True, True, False, False, True, True, True, True, True]


def _one_entry(folder):
    PrefixStore(folder, BIG).write("ab", entry(0))
    return paths(folder)


def test_of_names_touched_together_the_last_one_is_the_oldest(tmp_path):
    store = PrefixStore(tmp_path, BIG)
    for name in ("ab", "cd", "ef"):
        store.write(name, entry(1))
    store.touch(["ef", "ab", "cd", "gone"])
    times = {p.name: p.stat().st_mtime_ns for p in paths(tmp_path)}
    assert times["ef"] > times["ab"] > times["cd"]


def test_an_unfinished_file_is_removed_once_its_writer_must_be_dead(tmp_path):
    (tmp_path / "ab").mkdir()
    for name, age in ((".1-0.tmp", 2 * ABANDONED_S), (".2-0.tmp", 0)):
        (tmp_path / "ab" / name).write_bytes(b"half")
        then = time.time() - age
        os.utime(tmp_path / "ab" / name, (then, then))
    assert PrefixStore(tmp_path, BIG).num_bytes() == 0
    assert [p.name for p in paths(tmp_path)] == [".2-0.tmp"]


def test_where_nothing_can_be_written_the_failure_is_counted(tmp_path):
    store = PrefixStore(tmp_path, BIG)
    (tmp_path / "ab").write_bytes(b"a file where the folder would be")
    assert not store.write("abc", entry(1)) and store.num_failed == 1 and store.read("abc") is None


def test_several_threads_and_budgets_never_show_a_part(tmp_path):
    """Writers that evict each other's entries all the time; whatever is read is whole."""
    faults = []

    def work(seed):
        store = PrefixStore(tmp_path, 20_000)
        for n in range(150):
            number = (n * 7 + seed) % 60
            store.write(f"{number:02d}", entry(number))
            found = store.read(f"{(n * 11 + seed) % 60:02d}")
            if found is not None and not same(found, entry((n * 11 + seed) % 60)):
                faults.append(n)
        faults.extend([store.num_corrupted] if store.num_corrupted else [])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert PrefixStore(tmp_path, 20_000).num_bytes() <= 20_000


WRITER = """
import sys, itertools, torch
from pathlib import Path
from consilience.rollout.prefix_store import PrefixStore
store = PrefixStore(Path(sys.argv[1]), 3_000_000)
print("on", flush=True)
for n in itertools.count():
    name = f"{n % 97:02d}"
    store.write(name, {"a": torch.full((20_000,), float(n % 97))})
    store.touch([name])
"""


def test_writers_killed_at_any_moment_leave_whole_entries_and_no_lock(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for attempt in range(3):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path)], env=environment, stdout=subprocess.PIPE
            )
            for _ in range(2)
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"on\n"
        time.sleep(0.05 + 0.07 * attempt)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        store = PrefixStore(Path(tmp_path), 3_000_000)  # takes the lock
        names = [p.name for p in paths(tmp_path) if not p.name.startswith(".")]
        assert names
        for name in names:
            found = store.read(name)
            assert found is not None and bool((found["a"] == float(int(name))).all())
        assert store.num_corrupted == 0 and store.num_bytes() <= 3_000_000
