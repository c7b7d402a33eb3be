"""The digest covers names, types, shapes and every bit, and nothing else."""

import hashlib

import pytest
import torch

from consilience.model.digest import tensor_bytes, tensor_digest, weights_digest

torch.set_num_threads(1)


def weights():
    g = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4, generator=g),
        "b": torch.randn(5, generator=g).bfloat16(),
        "tid2eid": torch.arange(6).view(3, 2),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(2.5),
    }


def test_one_tensor_by_hand():
    header = b"w\0float32\0(2,)"
    body = bytes([0, 0, 128, 63, 0, 0, 0, 64])  # 1.0 and 2.0, little-endian
    expected = hashlib.sha256(len(header).to_bytes(8, "little") + header + body).hexdigest()
    assert weights_digest({"w": torch.tensor([1.0, 2.0])}) == expected


def test_order_strides_and_autograd_do_not_matter():
    w = weights()
    digest = weights_digest(w)
    assert len(digest) == 64 and digest == weights_digest(dict(reversed(w.items())))
    strided = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in w.items()}
    assert weights_digest(strided) == digest
    assert (
        weights_digest({n: t.clone().requires_grad_(t.is_floating_point()) for n, t in w.items()}) == digest
    )


@pytest.mark.parametrize("name", ["a.weight", "b", "tid2eid", "one"])
def test_one_flipped_bit_changes_it(name):
    w = weights()
    digest = weights_digest(w)
    w[name].reshape(-1).view(torch.uint8)[-1] ^= 1
    assert weights_digest(w) != digest
    w[name].reshape(-1).view(torch.uint8)[-1] ^= 1
    assert weights_digest(w) == digest


def test_names_types_shapes_and_the_set_of_tensors_matter():
    w = weights()
    zeros = torch.zeros(2, 2)
    variants = [
        w,
        {**w, "more": torch.zeros(0)},
        {n: t for n, t in w.items() if n != "empty"},
        {**{n: t for n, t in w.items() if n != "b"}, "c": w["b"]},
        {**w, "a.weight": w["a.weight"].view(4, 3)},
        {**w, "b": w["b"].view(torch.int16)},
        {"z": zeros},
        {"z": zeros.view(4)},
        {"z": zeros.to(torch.int32)},
        {"z": -zeros},  # the sign of zero is a bit too
        {},
    ]
    assert len({weights_digest(v) for v in variants}) == len(variants)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_every_stored_type_has_bytes(dtype):
    tensor = torch.ones(3, 2).to(dtype)
    assert len(tensor_bytes(tensor)) == 6 * tensor.element_size()
    assert len(weights_digest({"w": tensor})) == 64


def test_the_digest_of_a_tensor_covers_type_shape_and_bits_but_no_name():
    body = bytes([0, 0, 128, 63, 0, 0, 0, 64])
    one = torch.tensor([1.0, 2.0])
    assert tensor_digest(one) == hashlib.sha256(b"float32\0(2,)\0" + body).hexdigest()
    others = [one[None], one.view(torch.int32), one.double(), torch.tensor([1.0, 2.0000002])]
    assert len({tensor_digest(t) for t in (one, *others)}) == 5
    grid = torch.randn(4, 5)
    assert tensor_digest(grid.t().contiguous().t()) == tensor_digest(grid)
