import pytest
import torch

from consilience.conf.errors import WeightsRefused
from consilience.rollout.publishing import Publication, TensorRecord, announce
from consilience.rollout.weight_bytes import ALIGNMENT, buckets, check_fits, flat_bytes, places, tensors_in

WEIGHTS = {
    "a": torch.arange(17, dtype=torch.bfloat16),  # 34 bytes
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 4),
    "b": torch.arange(40).reshape(5, 8),  # 320 bytes
    "codes": torch.randn(4, 4).to(torch.float8_e4m3fn),
}


def test_places_worked_by_hand():
    those, size = places(announce(WEIGHTS, 0))
    assert [(p.name, p.first, p.num_bytes) for p in those] == [
        ("a", 0, 34),
        ("scalar", 64, 4),
        ("empty", 128, 0),
        ("b", 128, 320),
        ("codes", 448, 16),
    ]
    assert size == 512 and all(p.first % ALIGNMENT == 0 for p in those)


def test_bytes_become_the_tensors_they_were():
    those, size = places(announce(WEIGHTS, 0))
    data = torch.zeros(size, dtype=torch.uint8)
    for place in those:
        data[place.first : place.first + place.num_bytes] = flat_bytes(WEIGHTS[place.name])
    found = tensors_in(data, those)
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in WEIGHTS.items()
    }
    assert all(torch.equal(flat_bytes(found[n]), flat_bytes(t)) for n, t in WEIGHTS.items())


def test_buckets_keep_the_order_and_the_limit_and_a_large_tensor_is_alone():
    those, _ = places(announce(WEIGHTS, 0))
    found = [[p.name for p in bucket] for bucket in buckets(those, 130)]
    assert found == [["a", "scalar", "empty"], ["b"], ["codes"]]
    assert [[p.name for p in bucket] for bucket in buckets(those, 1 << 20)] == [list(WEIGHTS)]
    assert list(buckets([], 10)) == []


def test_weights_that_are_not_as_announced_are_refused_by_name():
    those, _ = places(announce(WEIGHTS, 0))
    for wrong in (torch.zeros(5, 9), torch.zeros(5, 8)):
        with pytest.raises(WeightsRefused, match=r"tensor b: found .*, announced torch.int64 \[5, 8\]"):
            check_fits({**WEIGHTS, "b": wrong}, those)
    with pytest.raises(WeightsRefused, match="tensor a: found nothing"):
        check_fits({n: t for n, t in WEIGHTS.items() if n != "a"}, those)
    with pytest.raises(WeightsRefused, match="float12 is no type"):
        places(Publication(0, "", {"w": TensorRecord("float12", (2,), "")}))
