"""Two windows by hand, and who sees which entry."""

from dataclasses import replace

import pytest
import torch

from consilience.model.compressor import Compressor
from consilience.model.config import TINY
from consilience.model.layout import packed_layout
from consilience.model.rope import inverse_frequencies, rotate, rotations

torch.set_num_threads(1)

CONFIG = replace(
    TINY,
    hidden_size=3,
    head_dim=4,
    qk_rope_head_dim=2,
    sliding_window=4,
    compress_ratios=(4, 3),
    num_hidden_layers=2,
)
FREQUENCIES = {c: inverse_frequencies(CONFIG, is_compressed=c) for c in (False, True)}


def layout_of(segments, positions=None):
    segments = torch.as_tensor(segments)
    if positions is None:
        positions = torch.arange(segments.shape[1]).expand_as(segments)
    return packed_layout(CONFIG, segments, torch.as_tensor(positions), None)


def compressor(ratio, seed=0):
    module = Compressor(CONFIG, 4, ratio, torch.float64).double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return module


def finish(module, pooled, position):
    entry = pooled / (pooled.square().mean() + 1e-6).sqrt() * module.norm.weight
    return rotate(entry, rotations(torch.tensor(position), FREQUENCIES[True]))


def pool(slots):
    """slots [(value, gate)], each a number: the softmax-weighted mean."""
    z = torch.stack([gate for _, gate in slots])
    return sum(torch.softmax(z, 0)[i] * value for i, (value, _) in enumerate(slots))


def test_csa_entry_1_pools_the_first_half_of_window_0_and_the_second_half_of_window_1_channel_by_channel():
    module, h = compressor(4), torch.randn(1, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        entries = module(h, layout_of(torch.zeros(1, 8, dtype=torch.long)), None)
        u, z = h[0] @ module.wkv.weight.T, h[0] @ module.wgate.weight.T
        first, second = [], []
        for channel in range(4):
            own = [(u[t, 4 + channel], z[t, 4 + channel] + module.ape[t % 4, 4 + channel]) for t in range(8)]
            gone = [(u[t, channel], z[t, channel] + module.ape[t % 4, channel]) for t in range(4)]
            first.append(pool(own[:4]))  # entry 0: slots of a window before the first are absent
            second.append(pool(gone + own[4:]))
    assert entries.shape == (1, 2, 4)
    torch.testing.assert_close(entries[0, 0], finish(module, torch.stack(first), 0), rtol=0, atol=1e-12)
    torch.testing.assert_close(entries[0, 1], finish(module, torch.stack(second), 4), rtol=0, atol=1e-12)


def test_csa_halves_do_what_the_specification_says_and_not_the_other_way_round():
    module, h = compressor(4), torch.randn(1, 12, 3, dtype=torch.float64)
    layout = layout_of(torch.zeros(1, 12, dtype=torch.long))
    with torch.no_grad():
        before = module(h, layout, None)
        module.wkv.weight[:4] += 1  # the first half of the channels, of all tokens
        after = module(h, layout, None)
        assert torch.equal(before[0, 0], after[0, 0])  # entry 0 has no earlier window to take them from
        assert not torch.equal(before[0, 1], after[0, 1])
        h[0, :4] += 1  # tokens of window 0 reach entries 0 and 1, no further
        moved = module(h, layout, None)
    assert [not torch.equal(after[0, i], moved[0, i]) for i in range(3)] == [True, True, False]


def test_hca_windows_do_not_overlap():
    module, h = compressor(3), torch.randn(1, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        entries = module(h, packed(7), None)
        u, z = h[0] @ module.wkv.weight.T, h[0] @ module.wgate.weight.T
        for i in range(2):
            span = range(3 * i, 3 * i + 3)
            pooled = torch.stack(
                [pool([(u[t, c], z[t, c] + module.ape[t % 3, c]) for t in span]) for c in range(4)]
            )
            torch.testing.assert_close(entries[0, i], finish(module, pooled, 3 * i), rtol=0, atol=1e-12)
    assert entries.shape == (1, 2, 4)  # token 6 is a window that has not closed


def packed(length):
    """One sample of `length` tokens, padded to a multiple of the window."""
    padded = -(-length // 4) * 4
    segments = torch.zeros(1, padded, dtype=torch.long)
    segments[:, length:] = -1
    return layout_of(segments)


@pytest.mark.parametrize("ratio", [3, 4])
def test_a_query_sees_entry_i_once_all_its_tokens_have_come(ratio):
    windows = packed(12).windows[ratio]
    assert not windows.first.any()
    assert windows.stop.tolist() == [[(t + 1) // ratio for t in range(12)]]


def test_entries_belong_to_their_segment_and_start_at_its_own_positions():
    #           sample 5: 6 tokens         sample 9: 5 tokens    padding
    segments = [[5] * 6 + [9] * 5 + [-1]]
    positions = [[*range(6), *range(5), 0]]
    windows = layout_of(segments, positions).windows[4]
    closing = windows.closing
    assert (closing.row.tolist(), closing.column.tolist(), closing.position.tolist()) == (
        [0, 0],
        [0, 1],
        [0, 0],
    )
    assert closing.source[1, 4:].tolist() == [6, 7, 8, 9] and not closing.is_present[:, :4].any()
    seen = [(t, a, b) for t, (a, b) in enumerate(zip(windows.first[0].tolist(), windows.stop[0].tolist()))]
    assert [x for x in seen if x[1] < x[2]] == [(3, 0, 1), (4, 0, 1), (5, 0, 1), (9, 1, 2), (10, 1, 2)]


def test_without_a_closed_window_there_is_no_entry():
    module = compressor(4)
    out = module(
        torch.randn(2, 3, 3, dtype=torch.float64), layout_of(torch.zeros(2, 3, dtype=torch.long)), None
    )
    assert out.shape == (2, 0, 4)
