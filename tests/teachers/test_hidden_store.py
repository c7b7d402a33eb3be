"""Hidden states survive a kill, are checked when read, used once and freed with their files."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.teachers.hidden_store import HiddenStore, hidden_key

ROOT = Path(__file__).resolve().parents[2]


def files(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_states_come_back_bit_for_bit_in_their_type(tmp_path, dtype):
    store = HiddenStore(tmp_path)
    states = torch.randn(5, 3).to(dtype)
    store.reserve(["k", "empty"])
    store.put({"k": states, "empty": states[:0]})
    assert torch.equal(store.take("k"), states) and store.take("empty").shape == (0, 3)
    assert store.size_bytes == states.nbytes and len(store) == 2


def test_every_reservation_allows_one_take_and_the_file_goes_with_the_last_entry(tmp_path):
    store = HiddenStore(tmp_path)
    store.put({"a": torch.ones(2, 4), "b": torch.zeros(3, 4)})
    store.reserve(["a", "a", "b"])
    held = store.take("a")
    assert store.free_taken() == 0
    store.take("a")
    with pytest.raises(EngineError, match="already used up"):
        store.take("a")
    assert store.free_taken() == 2 * 4 * 4 and "a" not in store and "b" in store
    assert len(files(tmp_path)) == 1
    store.take("b")
    store.free_taken()
    assert files(tmp_path) == [] and store.size_bytes == 0
    assert torch.equal(held, torch.ones(2, 4))  # a tensor that is still held outlives its file


def test_taking_what_was_never_scored_is_an_error(tmp_path):
    store = HiddenStore(tmp_path)
    store.reserve(["a"])
    with pytest.raises(EngineError, match="not stored; score the sample"):
        store.take("a")


def test_a_stored_key_is_not_written_again(tmp_path):
    store = HiddenStore(tmp_path)
    store.put({"a": torch.ones(1, 2)})
    store.put({"a": torch.zeros(1, 2)})
    store.reserve(["a"])
    assert store.take("a").tolist() == [[1, 1]] and len(files(tmp_path)) == 1


def test_tensors_that_share_memory_are_stored_apart(tmp_path):
    batch = torch.arange(12.0).view(6, 2)
    store = HiddenStore(tmp_path)
    store.put({"a": batch[:2], "b": batch[2:], "c": batch[1:3]})
    store.reserve("abc")
    assert [store.take(k).sum().item() for k in "abc"] == [6, 60, 14]


CHILD = """
import sys, torch
from consilience.teachers.hidden_store import HiddenStore
store = HiddenStore(sys.argv[1])
store.put({"a": torch.full((3, 2), 5.0), "b": torch.zeros(1, 2)})
print("stored", flush=True)
for name in ("half.partial", ".tmpXyZ"):
    (store.folder / name).write_bytes(b"half a file")
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_stored_before_a_kill_is_there_afterwards_and_half_files_are_gone(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == -signal.SIGKILL and child.stdout == "stored\n", child.stderr
    store = HiddenStore(tmp_path)
    assert "a" in store and "b" in store and len(files(tmp_path)) == 1
    store.reserve(["a"])
    assert store.take("a").tolist() == [[5, 5]] * 3
    store.free_taken()  # nobody of this run asked for b
    assert files(tmp_path) == []


def test_a_flipped_bit_is_found_and_the_file_makes_room_for_a_new_score(tmp_path):
    store = HiddenStore(tmp_path)
    store.put({"a": torch.ones(4, 4)})
    store.reserve(["a"])
    path = next(tmp_path.iterdir())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"checksum .* scored anew"):
        store.take("a")
    assert "a" not in store and files(tmp_path) == []
    store.put({"a": torch.ones(4, 4)})
    assert torch.equal(store.take("a"), torch.ones(4, 4))


@pytest.mark.parametrize("keep", [0, 4, 60])
def test_a_file_cut_short_is_an_error_while_running_and_forgotten_on_restart(tmp_path, keep):
    store = HiddenStore(tmp_path)
    store.put({"a": torch.ones(4, 4)})
    store.reserve(["a"])
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:keep])
    assert "a" not in HiddenStore(tmp_path)
    with pytest.raises(EngineError, match="scored anew"):
        store.take("a")


def test_a_disk_that_refuses_leaves_nothing_half_written_and_keeps_the_rest(tmp_path):
    """A file-size limit stands for the full disk: the write fails half-way."""
    script = (
        "import resource, signal, sys, torch\n"
        "from consilience.conf.errors import EngineError\n"
        "from consilience.teachers.hidden_store import HiddenStore\n"
        "store = HiddenStore(sys.argv[1])\n"
        "store.put({'small': torch.ones(2, 2)})\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    store.put({'large': torch.ones(1000, 1000)})\n"
        "except EngineError as error:\n"
        "    print(error, 'large' in store, 'small' in store)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert child.stdout.startswith("cannot write 4000000 bytes of hidden states"), child.stderr
    assert child.stdout.endswith("False True\n") and len(files(tmp_path)) == 1


def test_a_key_names_everything_the_states_depend_on():
    given = ("teacher", "head", [1, 2, 3], [0, 1], torch.float32)
    others = [
        ("Teacher", "head", [1, 2, 3], [0, 1], torch.float32),
        ("teacher", "Head", [1, 2, 3], [0, 1], torch.float32),
        ("teacher", "head", [1, 2, 4], [0, 1], torch.float32),
        ("teacher", "head", [1, 2, 3], [0, 2], torch.float32),
        ("teacher", "head", [1, 2], [3, 0, 1], torch.float32),
        ("teacher", "head", [1, 2, 3], [0, 1], torch.bfloat16),
    ]
    assert hidden_key(*given) == hidden_key("teacher", "head", (1, 2, 3), range(2), torch.float32)
    assert len({hidden_key(*key) for key in [given, *others]}) == 7


def test_reading_a_large_entry_by_memory_map_does_not_load_its_neighbours(tmp_path):
    """The file has 64 MB; taking an entry of 1 MB must not bring the rest into this process."""
    store = HiddenStore(tmp_path)
    store.put({"big": torch.ones(63, 2**18), "small": torch.ones(1, 2**18)})
    script = (
        "import os, sys, psutil\n"
        "from consilience.teachers.hidden_store import HiddenStore\n"
        "store = HiddenStore(sys.argv[1])\n"
        "store.reserve(['small'])\n"
        "before = psutil.Process().memory_info().rss\n"
        "store.take('small')\n"
        "print(psutil.Process().memory_info().rss - before)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 32 * 2**20
    assert os.listdir(tmp_path)


def test_a_budget_is_asked_before_anything_is_written_and_what_nobody_wants_makes_room(tmp_path):
    store = HiddenStore(tmp_path, budget_bytes=100)
    store.put({"stale": torch.ones(10)[:, None]})  # 40 bytes that nobody has reserved
    store.put({"wanted": torch.ones(5, 2)})
    store.make_room(20, {"wanted"})
    assert "stale" in store  # 100 bytes fit
    with pytest.raises(EngineError, match=r"61 bytes .* may hold 100 and holds 40; nothing was written"):
        store.make_room(61, {"wanted"})
    assert "stale" not in store and store.size_bytes == 40
    with pytest.raises(EngineError, match=r"distill\.store_bytes"):
        store.put({"large": torch.ones(101, dtype=torch.uint8)})
    assert len(files(tmp_path)) == 1
    store.put({"fits": torch.ones(15)})
    assert store.size_bytes == 100


def test_a_store_that_keeps_frees_nothing_and_serves_any_number_of_uses(tmp_path):
    store = HiddenStore(tmp_path, keeps=True, budget_bytes=60)
    store.put({"a": torch.ones(4, 2)})
    for _ in range(3):
        store.reserve(["a"])
        assert store.take("a").shape == (4, 2)
        assert store.free_taken() == 0
        with pytest.raises(EngineError, match="already used up"):
            store.take("a")
    with pytest.raises(EngineError, match=r"holds 32; distill.keep_states=false frees"):
        store.put({"b": torch.ones(4, 2)})
    again = HiddenStore(tmp_path)  # a stage that does not keep takes over what another kept
    again.reserve(["a"])
    again.take("a")
    assert again.free_taken() == 32 and files(tmp_path) == []


def test_another_stages_store_is_read_and_never_changed(tmp_path):
    theirs = HiddenStore(tmp_path / "theirs", keeps=True)
    theirs.put({"a": torch.ones(4, 2)}, "teacher 'math'")
    (tmp_path / "theirs" / "half.partial").write_bytes(b"being written")
    before = {name: (tmp_path / "theirs" / name).read_bytes() for name in files(tmp_path / "theirs")}
    ours = HiddenStore(tmp_path / "ours", also=[tmp_path / "theirs"], budget_bytes=16)
    assert ours.size_bytes == 0 and ours.origins == {"teacher 'math'": 1}
    ours.reserve(["a"])
    ours.put({"own": torch.ones(2, 2)})  # what is read elsewhere is not in the budget
    assert torch.equal(ours.take("a"), torch.ones(4, 2)) and ours.free_taken() == 16
    assert {n: (tmp_path / "theirs" / n).read_bytes() for n in files(tmp_path / "theirs")} == before
    name = next(n for n in before if n.endswith("safetensors"))
    (tmp_path / "theirs" / name).write_bytes(before[name][:-1] + b"\x01")
    ours.reserve(["a"])
    with pytest.raises(EngineError, match="belongs to another stage and is only read"):
        ours.take("a")
    assert files(tmp_path / "theirs") == sorted(before)
    with pytest.raises(EngineError, match="no such folder"):
        HiddenStore(tmp_path / "ours", also=[tmp_path / "nowhere"])


def test_a_reader_adds_what_it_is_asked_for_though_it_saw_it_before_the_first_made_room(tmp_path):
    first = HiddenStore(tmp_path, budget_bytes=48)
    reader = HiddenStore(tmp_path, is_reader=True)
    first.put({"a": torch.ones(2, 2), "b": torch.ones(4, 2)})
    for store in (first, reader):
        store.expect(["b"], later=["a"])
    first.make_room(16)  # "a" gives way, its file stays for "b"
    assert "a" not in first and "a" in reader
    reader.put({"a": torch.ones(2, 2), "c": torch.ones(2, 2)})
    for store in (first, reader):
        store.expect(["a", "c"])
        assert [store.take(key).shape for key in "bac"] == [(4, 2), (2, 2), (2, 2)]
    assert reader.free_taken() > 0 and len(files(tmp_path)) == 2
    assert first.free_taken() == 64 and files(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(EngineError, match=r"cannot be kept in .*file/states .* writable"):
        HiddenStore(tmp_path / "file" / "states")


READ_ONLY = """
import os, sys, torch
from consilience.conf.errors import EngineError
from consilience.teachers.hidden_store import HiddenStore
store = HiddenStore(sys.argv[1])
store.put({"a": torch.ones(2, 2)})
os.chmod(sys.argv[1], 0o555)
next(store.folder.iterdir()).chmod(0o644)
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write anywhere
try:
    store.put({"b": torch.ones(2, 2)})
except EngineError as error:
    print(error)
store.reserve(["a"])
print(store.take("a").sum().item())
"""


def test_a_store_that_became_read_only_refuses_clearly_and_still_reads():
    with tempfile.TemporaryDirectory(dir="/tmp") as outer:  # pytest's own folders are closed to others
        os.chmod(outer, 0o755)
        folder = Path(outer) / "states"
        folder.mkdir()
        command = [sys.executable, "-c", READ_ONLY, str(folder)]
        child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        folder.chmod(0o755)
    assert "Permission denied" in child.stdout and "make it writable" in child.stdout, child.stderr
    assert child.stdout.endswith("\n4.0\n")
