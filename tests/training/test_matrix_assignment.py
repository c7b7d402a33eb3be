"""Every matrix has one owner and is never cut; what the bounds are for V4-Flash and V4-Pro."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from consilience.model.config import PRESETS
from consilience.model.transformer import Transformer
from consilience.training.matrix_assignment import assign_dense, assign_experts, is_expert, pack
from consilience.training.muon import MuonParameter
from consilience.training.optimizers import parameter_groups

torch.set_num_threads(1)


def weight(name, *shape, row_blocks=None):
    return MuonParameter(name, torch.empty(shape, device="meta"), row_blocks or (shape[-2],))


def test_the_largest_goes_first_to_the_emptiest_rank():
    """By hand: 7 -> 0, 5 -> 1, 4 -> 1 (5 < 7), 3 -> 0 (7 < 9), 3 -> 1 (9 < 10)."""
    assert pack([3, 7, 4, 5, 3], 2, most=3) == [[1, 0], [3, 2, 4]]


def test_a_full_rank_takes_no_more():
    assert pack([9, 1, 1, 1], 2, most=2) == [[0, 3], [1, 2]]
    with pytest.raises(ValueError, match="4 matrices do not go on 3 ranks at 1 a rank"):
        pack([1] * 4, 3, most=1)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 3))
def test_packing_keeps_every_item_the_cap_and_grahams_bound(sizes, num_ranks, spare):
    most = -(-len(sizes) // num_ranks) + spare
    packed = pack(sizes, num_ranks, most)
    assert sorted(itertools.chain(*packed)) == list(range(len(sizes)))
    assert max(map(len, packed)) <= most
    loads = [sum(sizes[i] for i in own) for own in pack(sizes, num_ranks, len(sizes))]
    assert max(loads) <= sum(sizes) / num_ranks + max(sizes)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(1, 3))
def test_packing_without_a_cap_is_within_a_third_of_the_best(sizes, num_ranks):
    """Graham 1969: largest first is at most 4/3 − 1/(3R) of the optimum, found here by trying all."""
    best = min(
        max(sum(s for s, r in zip(sizes, ranks) if r == rank) for rank in range(num_ranks))
        for ranks in itertools.product(range(num_ranks), repeat=len(sizes))
    )
    found = max(sum(sizes[i] for i in own) for own in pack(sizes, num_ranks, len(sizes)))
    assert 3 * num_ranks * found <= (4 * num_ranks - 1) * best


LAYERS = [
    weight("layers.0.attn.wq_b.weight", 64, 16),
    weight("layers.0.attn.wo_a.weight", 64, 16, row_blocks=(16,) * 4),
    weight("layers.0.hc_attn.fn", 24, 64, row_blocks=(4, 4, 16)),
    weight("layers.0.ffn.experts.w1", 5, 8, 16),
    weight("layers.0.ffn.experts.w2", 5, 16, 8),
    weight("layers.0.ffn.experts.w3", 5, 8, 16),
    weight("layers.1.ffn.experts.w1", 5, 8, 16),
    weight("layers.1.ffn.experts.w2", 5, 16, 8),
    weight("layers.1.ffn.experts.w3", 5, 8, 16),
    weight("layers.0.ffn.shared_experts.w1.weight", 8, 16),
]
DENSE = [p for p in LAYERS if not is_expert(p.name)]
EXPERTS = [p for p in LAYERS if is_expert(p.name)]


def covered(parameters, assignment):
    """name -> sorted row ranges with their blocks; each piece checked against its own numbers."""
    found = {p.name: [] for p in parameters}
    shapes = {p.name: p.parameter.shape for p in parameters}
    for piece in itertools.chain(*assignment.pieces):
        row = shapes[piece.name].numel() // shapes[piece.name][0]
        assert piece.offset == piece.start * row
        assert piece.num_elements == (piece.stop - piece.start) * row > 0
        found[piece.name].append((piece.start, piece.stop, piece.row_blocks))
    return {name: sorted(ranges) for name, ranges in found.items()}


def assert_partition(parameters, assignment):
    for owned in parameters:
        ranges = covered(parameters, assignment)[owned.name]
        ends = [0, *(stop for _, stop, _ in ranges)]
        assert [start for start, _, _ in ranges] == ends[:-1] and ends[-1] == owned.parameter.shape[0]
        if owned.parameter.ndim == 3:
            assert all(blocks == owned.row_blocks for _, _, blocks in ranges)
        else:  # borders of pieces are borders of matrices
            assert tuple(itertools.chain(*(blocks for _, _, blocks in ranges))) == owned.row_blocks
            assert all(sum(blocks) == stop - start for start, stop, blocks in ranges)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 7, 8, 30, 64])
def test_every_matrix_is_whole_on_one_rank(num_ranks):
    assert_partition(DENSE, assign_dense(DENSE, num_ranks))
    found = assign_experts(EXPERTS, num_ranks)
    assert_partition(EXPERTS, found)
    counts = [sum(p.stop - p.start for p in own) for own in found.pieces]
    assert len(counts) == num_ranks and max(counts) == -(-30 // num_ranks)


def test_experts_stand_in_line_w2_then_w3_then_w1():
    line = [piece for own in assign_experts(EXPERTS, 4).pieces for piece in own]
    kinds = [key for key, _ in itertools.groupby(piece.name.split(".")[-1] for piece in line)]
    assert kinds == ["w2", "w3", "w1"]
    first = [(p.name, p.start, p.stop) for p in line[:3]]
    assert first == [
        ("layers.0.ffn.experts.w2", 0, 5),
        ("layers.1.ffn.experts.w2", 0, 2),  # 7 of 30 matrices: the 8th has its middle at 7.5, the border
        ("layers.1.ffn.experts.w2", 2, 5),
    ]


def test_experts_one_by_one_stand_in_the_same_line():
    names = [f"layers.0.ffn.experts.{e}.w{k}.weight" for e in range(3) for k in (1, 2, 3)]
    found = assign_experts([weight(name, 4, 6) for name in names], 3)
    assert [p.name[-9:-7] for own in found.pieces for p in own] == ["w2"] * 3 + ["w3"] * 3 + ["w1"] * 3
    assert [len(own) for own in found.pieces] == [3, 3, 3]


def test_no_weights_of_a_kind_are_no_work():
    assert [*assign_dense([], 4).pieces] == [*assign_experts([], 4).pieces] == [()] * 4
    assert assign_dense([], 4).padding == 0


def test_ranks_beyond_what_the_largest_matrix_fills_repeat_the_work():
    """Two equal matrices: at 2 ranks no padding, at 4 it would be 100 %."""
    found = assign_dense([weight("a", 4, 4), weight("b", 4, 4)], 4)
    assert len(found.pieces) == 2 and found.padding == 0


@pytest.fixture(scope="module")
def kinds():
    """Preset -> (dense, experts) of Muon, no memory behind them."""
    found = {}
    for name in ("flash", "pro"):
        with torch.device("meta"):
            muon = parameter_groups(Transformer(PRESETS[name])).muon
        found[name] = [p for p in muon if not is_expert(p.name)], [p for p in muon if is_expert(p.name)]
    return found


# R -> ranks that own dense matrices, most pieces a rank, padding in % (rounded up to 0.1)
TABLE = {
    "flash": {
        8: (8, 82, 0.1),
        64: (64, 11, 0.5),
        128: (128, 10, 1.0),
        160: (160, 5, 4.7),
        256: (128, 10, 1.0),
    },
    "pro": {8: (8, 116, 0.1), 64: (64, 15, 0.1), 128: (128, 8, 0.2), 192: (192, 5, 1.2), 256: (128, 8, 0.2)},
}  # fmt: skip


@pytest.mark.parametrize("preset", TABLE)
def test_padding_and_matrices_a_rank_of_the_released_models(preset, kinds):
    dense, experts = kinds[preset]
    found = {}
    for num_ranks in TABLE[preset]:
        assignment = assign_dense(dense, num_ranks)
        assert_partition_of_sizes(dense, assignment)
        padding = -(-assignment.padding * 1000 // 1) / 10
        found[num_ranks] = (len(assignment.pieces), assignment.most_pieces, padding)
        assert assignment.padding < 0.10
        assert assign_experts(experts, num_ranks).padding < 0.005
    assert found == TABLE[preset]


def assert_partition_of_sizes(parameters, assignment):
    total = sum(p.parameter.numel() for p in parameters)
    assert sum(assignment.loads) == total


@pytest.mark.parametrize(
    ("preset", "rank_counts"), [("flash", (132, 144, 160, 192)), ("pro", (192, 200, 216))]
)
def test_the_reports_five_matrices_and_ten_per_cent_hold_together_on_ranks_enough(preset, rank_counts, kinds):
    for num_ranks in rank_counts:
        found = assign_dense(kinds[preset][0], num_ranks)
        assert (len(found.pieces), found.most_pieces) == (num_ranks, 5) and found.padding < 0.10
