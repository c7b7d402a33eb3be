import hashlib
import pickle

import pytest
import torch

from consilience.conf.errors import WeightsRefused
from consilience.model.digest import tensor_digest, weights_digest
from consilience.rollout.publishing import PackedTensor, announce, compare, pack, unpack, verify

WEIGHTS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "table": torch.tensor([[5, 1 << 40]]),
    "scalar": torch.tensor(2.0),
    "empty": torch.zeros(0, 4),
}


def flip(tensor, byte, bit):
    copy = tensor.clone()
    copy.reshape(-1).view(torch.uint8)[byte] ^= 1 << bit
    return copy


def test_the_digest_of_one_tensor_worked_by_hand():
    header = b"w\0float32\0(2,)"
    data = bytes.fromhex("0000803f" "00000040")  # 1.0 and 2.0, little-endian  # fmt: skip
    expected = hashlib.sha256(len(header).to_bytes(8, "little") + header + data).hexdigest()
    assert weights_digest({"w": torch.tensor([1.0, 2.0])}) == expected


def test_the_digest_ignores_order_and_strides_but_not_names_types_shapes_or_values():
    digest = weights_digest(WEIGHTS)
    assert weights_digest(dict(reversed(WEIGHTS.items()))) == digest
    strided = {**WEIGHTS, "b": WEIGHTS["b"].t().contiguous().t()}
    assert not strided["b"].is_contiguous() and weights_digest(strided) == digest
    changed = [
        {**WEIGHTS, "b": WEIGHTS["b"].reshape(3, 2)},
        {**WEIGHTS, "b": WEIGHTS["b"].view(torch.int32)},
        {("c" if k == "a" else k): v for k, v in WEIGHTS.items()},
        {k: v for k, v in WEIGHTS.items() if k != "empty"},
    ]
    assert len({digest, *map(weights_digest, changed)}) == 5


@pytest.mark.parametrize(
    "name, byte, bit", [("b", 0, 0), ("b", 23, 7), ("a", 5, 0), ("table", 13, 3), ("scalar", 1, 6)]
)
def test_a_single_flipped_bit_is_refused(name, byte, bit):
    digest = weights_digest(WEIGHTS)
    verify(WEIGHTS, digest)
    with pytest.raises(WeightsRefused, match="old weights stay"):
        verify({**WEIGHTS, name: flip(WEIGHTS[name], byte, bit)}, digest)


def test_packed_weights_travel_unchanged_and_arrive_writable():
    packed = pickle.loads(pickle.dumps(pack(WEIGHTS)))
    for item in packed.values():
        item.data.flags.writeable = False
    weights = unpack(packed)
    assert weights_digest(weights) == weights_digest(WEIGHTS)
    weights["b"][0, 0] = 9.0
    assert weights["scalar"].shape == () and weights["empty"].shape == (0, 4)


def test_bytes_that_do_not_fill_their_shape_are_refused():
    item = pack(WEIGHTS)["b"]
    with pytest.raises(WeightsRefused, match="24 bytes"):
        unpack({"b": PackedTensor(item.dtype, (5, 5), item.data)})
    with pytest.raises(WeightsRefused, match="float12"):
        unpack({"b": PackedTensor("float12", (2, 3), item.data)})


def test_a_publication_names_the_tensor_that_is_not_as_announced():
    publication = announce(WEIGHTS, 7, "fp4")
    verify(WEIGHTS, publication)
    assert (publication.version, publication.digest, publication.quantization) == (
        7,
        weights_digest(WEIGHTS),
        "fp4",
    )
    for name, byte, bit in (("b", 23, 7), ("a", 5, 0), ("table", 13, 3), ("scalar", 1, 6)):
        wrong = flip(WEIGHTS[name], byte, bit)
        found, right = tensor_digest(wrong)[:12], tensor_digest(WEIGHTS[name])[:12]
        with pytest.raises(
            WeightsRefused, match=rf"tensor {name}: found .*{found}.*expected .*{right}.*1 of 5"
        ):
            verify({**WEIGHTS, name: wrong}, publication)
    with pytest.raises(WeightsRefused, match=r"tensor b: found float32 \[3, 2\] .*expected float32 \[2, 3\]"):
        verify({**WEIGHTS, "b": WEIGHTS["b"].reshape(3, 2)}, publication)
    with pytest.raises(WeightsRefused, match=r"tensor a: found int16"):
        verify({**WEIGHTS, "a": WEIGHTS["a"].view(torch.int16)}, publication)


def test_a_part_of_a_publication_is_refused_and_so_is_more_than_it():
    publication = announce(WEIGHTS, 7)
    part = {n: t for n, t in WEIGHTS.items() if n not in ("empty", "table")}
    with pytest.raises(
        WeightsRefused, match=r"tensor empty is missing, expected float32 \[0, 4\].*2 of 5 missing"
    ):
        verify(part, publication)
    with pytest.raises(WeightsRefused, match="found tensor extra"):
        verify({**WEIGHTS, "extra": torch.ones(1)}, publication)
    with pytest.raises(WeightsRefused, match="worker 3: version 7: tensor"):
        compare({}, publication, "worker 3")


def test_what_is_announced_stays_what_it_was_when_the_weights_move_on():
    moving = {"w": torch.ones(4)}
    publication = announce(moving, 1)
    moving["w"][2] += 2**-20
    with pytest.raises(WeightsRefused, match="tensor w"):
        verify(moving, publication)
