"""Safetensors by hand, against the library: what is read, what is written, what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from consilience.conf.errors import CheckpointError
from consilience.model.shards import (
    DTYPES,
    INDEX,
    ShardWriter,
    header_bytes,
    read_folder,
    read_header,
    read_into,
    read_rows,
)

torch.set_num_threads(1)


def tensors():
    """One of every type; odd sizes, so that a wrong order of types would lie unaligned."""
    g = torch.Generator().manual_seed(0)
    drawn = {
        f"t.{name}": torch.randint(0, 120, (3, 5), generator=g, dtype=torch.uint8)
        .repeat(1, dtype.itemsize)
        .view(dtype)
        for name, dtype in DTYPES.items()
        if dtype is not torch.bool
    }
    return drawn | {"t.BOOL": torch.tensor([[True, False, True]]), "ü": torch.arange(24.0).view(2, 3, 4)}


def same(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.view(torch.uint8).equal(b.view(torch.uint8))


@pytest.fixture
def file(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_every_type_is_read_as_the_library_reads_it(file):
    header = read_header(file)
    expected = load_file(file)
    assert header.keys() == expected.keys()
    for name, stored in header.items():
        assert stored.shape == expected[name].shape
        assert same(read_rows(stored), expected[name]), name
        place = torch.zeros_like(expected[name])
        read_into(place, stored)
        assert same(place, expected[name]), name


def test_rows_are_those_of_the_tensor_in_memory_of_their_own(file):
    stored = read_header(file)["ü"]
    rows = read_rows(stored, 1, 2)
    assert rows.equal(torch.arange(12.0, 24.0).view(1, 3, 4)) and rows.untyped_storage().nbytes() == 48
    assert read_rows(stored, 2, 2).shape == (0, 3, 4)


def test_a_file_filled_by_rows_in_any_order_is_the_library_s_own(file, tmp_path):
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out")
    values = tensors()
    writer.lay_out("a.safetensors", {name: (t.dtype, tuple(t.shape)) for name, t in values.items()})
    for name, tensor in reversed(values.items()):
        for row in reversed(range(tensor.shape[0])):
            writer.write_rows(name, row, tensor[row : row + 1])
    writer.close()
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == file.read_bytes()
    assert writer.total_bytes == sum(t.nbytes for t in values.values())
    assert set(writer.weight_map.values()) == {"a.safetensors"}


def test_a_header_is_taken_over_byte_for_byte(tmp_path):
    a = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    b = {"shape": [1], "dtype": "F32", "data_offsets": [2, 6]}
    table = {"b": b, "a": a, "__metadata__": {"by": "hand"}}
    odd = json.dumps(table, indent=3).encode()
    writer = ShardWriter(tmp_path)
    writer.take_over("x.safetensors", odd)
    writer.write_rows("b", 0, torch.tensor([1.5]))
    writer.write_rows("a", 0, torch.tensor([7, 9], dtype=torch.uint8))
    writer.close()
    data = len(odd).to_bytes(8, "little") + odd + b"\x07\x09" + torch.tensor([1.5]).numpy().tobytes()
    assert (tmp_path / "x.safetensors").read_bytes() == data
    assert header_bytes(tmp_path / "x.safetensors") == odd


def test_rows_of_a_packed_tensor_are_those_of_its_matrix(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.lay_out("x.safetensors", {"packed": (torch.float32, (2, 3, 2))})
    values = torch.arange(12.0).view(6, 2)
    writer.write_rows("packed", 2, values[2:])
    writer.write_rows("packed", 0, values[:2])
    writer.close()
    assert load_file(tmp_path / "x.safetensors")["packed"].equal(values.view(2, 3, 2))


def test_a_tensor_that_was_not_filled_is_named(tmp_path):
    writer = ShardWriter(tmp_path)
    writer.lay_out("x.safetensors", {"a": (torch.float32, (2, 3))})
    writer.write_rows("a", 0, torch.zeros(1, 3))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor a has 12 bytes unwritten"):
        writer.close()
    with pytest.raises(ValueError, match=r"found torch.int8"):
        writer.write_rows("a", 1, torch.zeros(1, 3, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"found torch.float32 \(1, 2\)"):
        writer.write_rows("a", 1, torch.zeros(1, 2))


def change_header(file, change):
    header = header_bytes(file)
    table = json.loads(header)
    change(table)
    new = json.dumps(table).encode()
    file.write_bytes(len(new).to_bytes(8, "little") + new + file.read_bytes()[8 + len(header) :])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.unlink(), "is missing"),
        (lambda f: f.write_bytes(f.read_bytes()[:-1]), r"has \d+ bytes, its header promises \d+; it is tr"),
        (lambda f: f.write_bytes(f.read_bytes() + b"x"), "it is damaged"),
        (lambda f: f.write_bytes(f.read_bytes()[:40]), "truncated or damaged"),
        (lambda f: f.write_bytes(b"\xff" * 64), "truncated or damaged"),
        (lambda f: f.write_bytes(b"PK"), "truncated or damaged"),
        (
            lambda f: change_header(f, lambda t: t["ü"].update(shape=[2, 3, 5])),
            r"tensor ü fills bytes \d+ to \d+, F32 \[2, 3, 5\] takes 120",
        ),
        (lambda f: change_header(f, lambda t: t["ü"].update(dtype="F4")), "tensor ü is of type F4, known"),
        (lambda f: change_header(f, lambda t: t.pop("t.I16")), "tensor .* fills bytes"),
        (lambda f: change_header(f, lambda t: t["ü"].pop("data_offsets")), "data_offsets"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_name(file, damage, message):
    damage(file)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert "model.safetensors" in str(caught.value)


def test_a_file_that_shrinks_after_its_header_was_read_is_noticed(file):
    stored = read_header(file)
    last = max(stored.values(), key=lambda s: s.begin)
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CheckpointError, match="ends early"):
        read_rows(last)
    with pytest.raises(CheckpointError, match="ends early"):
        read_into(torch.empty(last.shape, dtype=last.dtype), last)


def write_two(folder, index=None):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, folder / "one.safetensors")
    save_file({"c": torch.ones(4)}, folder / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": index or weight_map}))


def test_a_sharded_folder_is_read_through_its_index(tmp_path):
    write_two(tmp_path)
    save_file({"z": torch.ones(1)}, tmp_path / "not-listed.safetensors")
    assert {n: (s.file.name, s.shape) for n, s in read_folder(tmp_path).items()} == {
        "a": ("one.safetensors", (2,)),
        "b": ("one.safetensors", (3,)),
        "c": ("two.safetensors", (4,)),
    }


def test_a_single_file_needs_no_index(file):
    assert read_folder(file.parent).keys() == tensors().keys()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": "one.safetensors"}, r"one\.safetensors: tensor b is not listed for it in model"),
        (
            {"a": "one.safetensors", "b": "one.safetensors", "x": "one.safetensors"},
            r"one\.safetensors: tensor x is missing",
        ),
        ({"a": "gone.safetensors"}, r"gone\.safetensors is missing"),
        ({"a": "../one.safetensors"}, "lies outside the checkpoint folder"),
        ({"a": 3}, "cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(tmp_path, index, message):
    write_two(tmp_path, index)
    with pytest.raises(CheckpointError, match=message):
        read_folder(tmp_path)


def test_a_folder_without_weights_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"index\.json is missing; the folder is no checkpoint"):
        read_folder(tmp_path)
