"""Shards by size, and tensors that are views of one another."""

import pytest
import torch

from consilience.training.tensor_files import as_bytes, as_bytes_tensor, read_tensors, shards, write_tensors


def test_shards_keep_the_order_and_a_tensor_over_the_limit_stands_alone():
    tensors = {name: torch.zeros(n) for name, n in (("a", 2), ("b", 2), ("c", 9), ("d", 1), ("e", 1))}
    found = [(file, list(group)) for file, group in shards(tensors, 16)]
    assert [group for _, group in found] == [["a", "b"], ["c"], ["d", "e"]]
    assert found[0][0] == "model-00001-of-00003.safetensors"


def test_experts_of_one_stack_and_transposed_views_are_written_as_their_own_values(tmp_path):
    stack = torch.arange(12.0).view(2, 2, 3)
    views = {"0": stack[0], "1": stack[1], "t": stack[1].T, "same": stack[0]}
    write_tensors(tmp_path / "t.safetensors", views)
    found = read_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(found[name], views[name]) for name in views)


@pytest.mark.parametrize("data", [b"", b"\x00\xff state"])
def test_bytes_travel_as_a_tensor(data):
    assert as_bytes(as_bytes_tensor(data)) == data
