"""Experts of a stream as bytes: what is stored comes back, what nobody recorded is marked."""

import numpy as np
import pytest

from consilience.rollout.token_routing import TokenRouting, choice_dtype, stitched


def test_a_choice_takes_a_byte_unless_its_type_must_hold_more():
    assert [choice_dtype(n, 6) for n in (4, 256, 257, 384)] == ["u1", "u1", "i2", "i2"]
    assert choice_dtype(256, 1) == "i2"  # expert 255 alone would look like a missing token
    assert choice_dtype(255, 1) == "u1"


def test_two_tokens_by_hand_and_their_size():
    chosen = np.array([[[3, 0], [255, 7]], [[255, 255], [1, 2]]], np.uint8)  # token 1 is missing in layer 5
    routing = TokenRouting.of((4, 5), chosen)
    assert routing.data == bytes([3, 0, 255, 7, 255, 255, 1, 2])
    assert (routing.num_tokens, routing.bytes_per_token) == (2, 4)
    assert routing.experts().tolist() == [[[3, 0], [255, 7]], [[-1, -1], [1, 2]]]
    wide = TokenRouting.of((4, 5), np.array([[[383, 0], [-1, -1]]], np.int16))
    assert wide.data == b"\x7f\x01\x00\x00\xff\xff\xff\xff" and wide.experts().tolist() == [
        [[383, 0], [-1, -1]]
    ]


def test_v4_takes_240_bytes_a_token_and_its_larger_form_696():
    """43 layers of which 3 are hashed, 6 of 256; 61 of which 3, 6 of 384 (post-training notes 7.3)."""
    for num_layers, num_experts, size in ((40, 256, 240), (58, 384, 696)):
        dtype = np.dtype(choice_dtype(num_experts, 6))
        routing = TokenRouting.of(range(3, 3 + num_layers), np.zeros((1, num_layers, 6), dtype))
        assert routing.bytes_per_token == size == len(routing.data)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
def test_json_brings_it_back(dtype):
    routing = TokenRouting.of((1, 2), np.arange(12, dtype=dtype).reshape(3, 2, 2))
    assert TokenRouting.from_json(routing.to_json()) == routing


def test_pieces_of_a_stream_are_put_where_they_belong_and_the_rest_is_missing():
    def piece(*experts):
        return TokenRouting.of((1,), np.array(experts, np.uint8)[:, None, None].repeat(2, 2))

    whole = stitched(6, [(2, piece(8, 9)), (5, piece(6, 7))])
    assert whole.experts()[:, 0, 0].tolist() == [8, 9, -1, 6, 7, -1]
    again = stitched(3, [(2, piece(8, 9)), (3, piece(4, 5, 6))])  # what was fed again counts
    assert again.experts()[:, 0, 1].tolist() == [4, 5, 6]
    assert stitched(6, []) is None
    with pytest.raises(ValueError, match=r"routing of tokens -1 to 0 in a stream of 6"):
        stitched(6, [(1, piece(8, 9))])
    with pytest.raises(ValueError, match=r"layers \(2,\) continues one of layers \(1,\)"):
        stitched(6, [(2, piece(1, 2)), (4, TokenRouting.of((2,), np.zeros((1, 1, 2), np.uint8)))])


def test_bytes_that_are_no_whole_tokens_are_refused():
    with pytest.raises(ValueError, match="7 bytes of type 'u1' are no routing of 2 layers with 2"):
        TokenRouting((1, 2), 2, "u1", bytes(7))
    with pytest.raises(ValueError, match="types are u1 and i2"):
        TokenRouting((1, 2), 2, "f4", bytes(16))
