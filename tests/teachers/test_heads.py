"""Heads come from checkpoint folders, one at a time, and their loads are counted."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file

from consilience.conf.errors import AdmissionError, CheckpointError
from consilience.model.digest import weights_digest
from consilience.teachers.heads import HeadCache, HeadLoads, head_digest, head_shape, read_digests, read_head
from consilience.teachers.registry import TeacherRecord


def record(name, folder="."):
    return TeacherRecord(name, folder, (name,))


def write_sharded(folder, head):
    files = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(("embed", "head"), 1)}
    save_file({"embed.weight": torch.zeros(2, 2)}, folder / files["embed"])
    save_file({"head.weight": head}, folder / files["head"])
    index = {"weight_map": {f"{name}.weight": file for name, file in files.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_loads_equal_distinct_teachers_when_a_minibatch_is_sorted_and_more_when_not():
    heads = HeadCache(read=lambda r: torch.full((2, 2), float(len(r.name))))
    for name in ("a", "a", "bb", "ccc", "ccc"):
        assert heads.take(record(name))[0, 0] == len(name)
    assert heads.finish() == HeadLoads(distinct=3, loads=3)
    for name in ("a", "bb", "a"):
        heads.take(record(name))
    assert heads.finish() == HeadLoads(distinct=2, loads=3)
    assert heads.finish() == HeadLoads(distinct=0, loads=0)


def test_the_next_minibatch_loads_its_first_head_itself():
    heads = HeadCache(read=lambda r: torch.zeros(1, 1))
    heads.take(record("a"))
    heads.finish()
    heads.begin()
    heads.take(record("a"))
    assert heads.finish() == HeadLoads(distinct=1, loads=1)


def test_no_second_head_is_read_before_the_first_is_released():
    import weakref

    alive = []

    def read(r):
        assert all(ref() is None for ref in alive)
        head = torch.zeros(3, 3)
        alive.append(weakref.ref(head))
        return head

    heads = HeadCache(read=read)
    for name in "abcab":
        heads.take(record(name))
    assert len(alive) == 5


def test_two_names_of_one_head_share_a_load_and_the_announced_order_is_read_ahead():
    began = []

    def read(r):
        began.append(r.name)
        return torch.full((2, 2), float(ord(r.name[0])))

    digest = {name: head_digest(torch.full((2, 2), float(ord(name[0])))) for name in ("a", "again", "b", "c")}
    assert digest["a"] == digest["again"] != digest["b"]
    heads, order = HeadCache(read=read), ["a", "again", "b", "c"]
    heads.begin([(record(name), digest[name]) for name in order])
    for i, name in enumerate(order):
        assert heads.take(record(name), digest[name])[0, 0] == ord(name[0])
        expected = [["a", "b"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]][i]
        deadline = time.monotonic() + 10
        while began != expected and time.monotonic() < deadline:
            time.sleep(0.001)
        assert began == expected  # the next one is under way while this one is used, and no third
    assert heads.finish() == HeadLoads(distinct=3, loads=3)


def test_a_head_that_is_not_the_one_the_states_belong_to_is_refused_now_or_read_ahead():
    wrong = head_digest(torch.ones(2, 2))
    heads = HeadCache(read=lambda r: torch.zeros(2, 2))
    with pytest.raises(AdmissionError, match="the folder changed during the run"):
        heads.take(record("a"), wrong)
    right = head_digest(torch.zeros(2, 2))
    heads.begin([(record("a"), right), (record("b"), wrong)])
    heads.take(record("a"), right)
    with pytest.raises(AdmissionError, match="head of teacher 'b'"):
        heads.take(record("b"), wrong)


def test_an_order_that_is_not_kept_gives_the_right_heads_all_the_same():
    heads = HeadCache(read=lambda r: torch.full((1, 1), float(ord(r.name))))
    heads.begin([(record("a"), None), (record("b"), None), (record("c"), None)])
    assert [heads.take(record(name)).item() for name in "acb"] == [ord(name) for name in "acb"]
    assert heads.finish() == HeadLoads(distinct=3, loads=3)


def test_a_head_is_read_from_the_shard_the_index_names_or_from_the_only_file(tmp_path):
    head = torch.randn(7, 3)
    write_sharded(tmp_path, head)
    assert torch.equal(read_head(tmp_path), head) and head_shape(tmp_path) == (7, 3)
    single = tmp_path / "single"
    single.mkdir()
    half = {"embed.weight": torch.zeros(7, 3).bfloat16(), "head.weight": head.bfloat16()}
    save_file(half, single / "model.safetensors")
    assert read_head(single).dtype == torch.bfloat16
    assert HeadCache(dtype=torch.float32).take(record("x", single)).dtype == torch.float32


def test_digests_are_read_without_loading_the_teacher(tmp_path):
    head = torch.randn(7, 3)
    write_sharded(tmp_path, head)
    (tmp_path / "consilience.json").write_text('{"digest": "abc"}')
    found = read_digests(record("x", tmp_path))
    assert found.weights == "abc" and found.head == head_digest(head) == weights_digest({"head.weight": head})
    (tmp_path / "consilience.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no digest"):
        read_digests(record("x", tmp_path))


def test_folders_without_a_readable_head_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"index\.json is missing"):
        read_head(tmp_path)
    write_sharded(tmp_path, torch.zeros(2, 2))
    file = tmp_path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    for read in (read_head, head_shape):
        with pytest.raises(CheckpointError, match=r"00002\.safetensors cannot be read as safetensors"):
            read(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        read_head(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match=r"index\.json: tensor head\.weight is missing"):
        read_head(tmp_path)
