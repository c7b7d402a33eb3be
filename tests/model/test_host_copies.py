"""Tensors whose memory is away for a while come back to the bit, under every name they have."""

import torch
from torch import nn

from consilience.model.host_copies import HostCopies


def test_memory_is_given_back_and_every_tensor_that_shares_it_comes_back_to_the_bit():
    model = nn.Linear(64, 32)
    view, before = model.weight.detach()[3:5, 7], model.weight.detach().clone()
    copies = HostCopies()
    copies.put_away([*model.parameters(), view])
    assert copies.num_bytes == (64 * 32 + 32) * 4
    assert model.weight.untyped_storage().nbytes() == 0 and model.weight.shape == (32, 64)
    copies.put_away(model.parameters())  # once more changes nothing
    copies.restore()
    copies.restore()
    assert torch.equal(model.weight, before) and torch.equal(view, before[3:5, 7])
    assert copies.num_bytes == 0


def test_what_need_not_be_kept_is_zero_afterwards():
    cache = torch.full((5, 3), float("nan"), dtype=torch.bfloat16)
    copies = HostCopies()
    copies.put_away([cache], keeps=False)
    copies.restore()
    assert torch.equal(cache, torch.zeros(5, 3, dtype=torch.bfloat16))


def test_memory_of_a_mapped_file_stays_where_it_is(tmp_path):
    (tmp_path / "numbers").write_bytes(bytes(range(64)))
    mapped = torch.from_file(str(tmp_path / "numbers"), size=64, dtype=torch.uint8)
    copies = HostCopies()
    copies.put_away([mapped])
    assert copies.num_bytes in (0, 64)  # as torch says whether it can be resized
    copies.restore()
    assert mapped.tolist() == list(range(64))
