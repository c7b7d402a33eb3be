"""Rows cut for several ranks against one process: forward, auxiliary losses and every gradient."""

import pickle
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from context_cases import rows_of, run, run_all, run_composed, shapes

from consilience.conf.errors import EngineError
from consilience.model.context_parallel import borders_of, context_parallel, piece_of_rows
from consilience.model.layout import packed_layout
from consilience.model.ranks import ALONE, Ranks
from tests.rank_processes import on_ranks
from tests.ranks_table import keep

pytestmark = pytest.mark.row("rows cut over ranks: a model", "library")

torch.set_num_threads(1)

# Samples of each row, odd lengths; the second row's one goes over every border.
TOKENS = 97
ROWS = rows_of(((41, 3, 30, 1, 12), (95,)), TOKENS)
CUTS = {
    2: (0, 45, 97),
    3: (0, 50, 53, 97),  # the middle piece is shorter than the window and than every compression window
    4: (0, 3, 5, 9, 97),  # the last looks back at all the others; nothing closes in the first
}


@pytest.fixture
def config(smallest):
    return replace(smallest, num_nextn_predict_layers=2, mtp_compress_ratios=(0, 4))


def check(one, pieces, rtol):
    """`pieces` of all ranks put together are `one`, to rtol of each tensor's norm."""

    def equal(found, expected, name):
        error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
        keep(error)
        assert error <= rtol, f"{name}: {error:.2e}"

    for i, expected in enumerate(one["results"]):
        equal(torch.cat([piece["results"][i] for piece in pieces], dim=1), expected, f"result {i}")
    equal(sum(piece["losses"] for piece in pieces), one["losses"], "losses")
    for name, expected in one["grads"].items():
        parts = [piece["grads"][name] for piece in pieces if piece["grads"][name] is not None]
        assert (expected is None) == (not parts), name
        if expected is not None:
            equal(sum(parts), expected, name)
    assert one["counts"] == [sum(n) for n in zip(*(piece["counts"] for piece in pieces))]
    for layer, load in one["load"].items():
        assert torch.equal(load, sum(piece["load"][layer] for piece in pieces))
    for piece in pieces:  # every rank knows the choices for all rows
        assert all(torch.equal(piece["routing"][layer], x) for layer, x in one["routing"].items())


def test_two_ranks_give_the_forward_and_the_gradients_of_one(config, rough_model, tmp_path):
    model = rough_model(config)
    one = run(ALONE, model, ROWS)
    assert one["counts"][1] > 0  # the indexer chooses
    assert all(grad.any() for name, grad in one["grads"].items() if not name.endswith("gate.bias"))
    # fp32: 1e-5 is some hundred roundings, here of sums in another order.
    check(one, on_ranks(2, run, model, ROWS, CUTS[2], folder=tmp_path), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_cut_gives_one_process_in_fp64_and_fp32(size, config, rough_model, tmp_path):
    plain, wide = rough_model(config), rough_model(config, dtype=torch.float64)
    tied = deepcopy(wide)  # every index score is 0: the lowest indices win, also across borders
    for name, parameter in tied.named_parameters():
        if name.endswith("indexer.weights_proj.weight"):
            parameter.data.zero_()
    released = replace(config, compress_ratios=(0, 128, 4, 128), sliding_window=16)
    long = rows_of(((385,),), 391)
    cuts = {2: (0, 200, 391), 3: (0, 127, 130, 391), 4: (0, 61, 127, 255, 391)}
    padded = rows_of(((20,), (5, 3)), TOKENS)  # some ranks have nothing but padding
    cases = [
        (wide, ROWS, CUTS[size], "plain"),
        (tied, ROWS, CUTS[size], "plain"),
        (rough_model(released, dtype=torch.float64), long, cuts[size], "plain"),
        (wide, padded, None, "plain"),
        (wide, ROWS, CUTS[size], "warm up"),
        (wide, ROWS, CUTS[size], "pieces"),
        (plain, ROWS, CUTS[size], "plain"),
        (plain, ROWS, CUTS[size], "mhc"),
        (plain, ROWS, CUTS[size], "block"),
    ]
    alone = [run(ALONE, *case[:2], None, case[3] if case[3] == "warm up" else "plain") for case in cases]
    # Whole, as so many tensors would be sent as too many handles.
    ranks = on_ranks(size, run_all, pickle.dumps(cases), folder=tmp_path)
    for case, one, *pieces in zip(cases, alone, *ranks):
        check(one, pieces, rtol=1e-10 if case[0] is not plain else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_exact_mode_gives_every_bit_of_one_process(size, config, rough_model, tmp_path):
    model = rough_model(config)
    one = run(ALONE, model, ROWS, None, "exact")
    pieces = on_ranks(size, run, model, ROWS, CUTS[size], "exact", folder=tmp_path)
    for i, expected in enumerate(one["results"]):
        assert torch.equal(torch.cat([piece["results"][i] for piece in pieces], dim=1), expected)
    check(one, pieces, rtol=1e-5)


@pytest.mark.slow
def test_pieces_batches_and_experts_of_four_ranks_compose(config, rough_model, tmp_path):
    """Ranks 0, 1 cut one batch and 2, 3 another; each rank has one or two of the six experts."""
    model = rough_model(config, dtype=torch.float64)
    batches = (ROWS, rows_of(((60, 31),), TOKENS, seed=4))
    alone = [run(ALONE, model, rows) for rows in batches]
    found = on_ranks(4, run_composed, model, batches, CUTS[2], folder=tmp_path)
    # fp64: sums in another order.
    total = sum(one["losses"] for one in alone)
    torch.testing.assert_close(sum(losses for losses, _, _ in found), total, rtol=1e-10, atol=0)
    for name in alone[0]["grads"]:
        expected = [one["grads"][name] for one in alone]
        if expected[0] is None:
            continue
        parts = [grads[name] for _, grads, _ in found]
        if name in found[0][2]:  # an expert's gradient is whole where it lives
            assert [0, *(places[name][1] for _, _, places in found)] == [
                *(places[name][0] for _, _, places in found),
                model.config.n_routed_experts,
            ]
            whole = torch.cat(parts)
        else:
            whole = sum(parts)
        assert (whole - sum(expected)).norm() <= 1e-10 * sum(expected).norm(), name


@pytest.mark.slow
def test_no_rank_holds_a_tensor_of_all_tokens(config, rough_model, tmp_path):
    rows = rows_of(((97,),), TOKENS)
    model = rough_model(config)
    alone = {n for shape in shapes(ALONE, model, rows, None) for n in shape}
    assert TOKENS in alone
    for rank, found in enumerate(on_ranks(2, shapes, model, rows, CUTS[2], folder=tmp_path)):
        own, lengths = (45, 52)[rank], {n for shape in found for n in shape}
        assert own in lengths and not any(n % TOKENS == 0 for n in lengths - {0})
        # Own tokens and those before them: 5 for a window of 6, 7 for CSA, 11 for HCA.
        tails = {own + tail for tail in (5, 7, 11)} if rank else set()
        assert tails <= lengths


# ---- one process ----


def piece_of(rank, borders, lengths=(29,), padding=0):
    """Layout and piece of one row that is cut, as rank `rank` sees it."""
    _, segments, positions = rows_of((lengths,), sum(lengths) + padding)
    with context_parallel(Ranks(rank, len(borders) - 1), borders):
        piece = piece_of_rows(positions, segments >= 0)
    return segments, positions, piece


def test_a_piece_sees_the_window_and_the_entries_that_the_whole_row_sees(config):
    segments, positions, piece = piece_of(1, (0, 9, 20, 29), (6, 23))
    whole = packed_layout(config, segments, positions, None)
    layout = packed_layout(config, segments, positions, None, piece)
    assert (piece.start, piece.stop, layout.offset) == (9, 20, 5)
    # Token 9 is the fourth of its sample, of which it sees all; its oldest key is token 6, slot 2 of 4 … 19.
    assert layout.oldest[0].tolist()[:3] == [2, 2, 2] and layout.position[0].tolist() == [*range(3, 14)]
    assert torch.equal(layout.oldest - 5 + 9, whole.oldest[:, 9:20])
    for ratio in (4, 12):
        own, all_of_it = layout.windows[ratio], whole.windows[ratio]
        assert torch.equal(own.first, all_of_it.first[:, 9:20]) and own.num_columns == all_of_it.num_columns
        assert torch.equal(own.stop, all_of_it.stop[:, 9:20])
    # Tokens 9, 13 and 17 end windows of 4: entries 1 … 3. Slots count from token 9 - 7.
    closing = layout.windows[4].closing
    assert closing.column.tolist() == [1, 2, 3] and closing.position.tolist() == [0, 4, 8]
    assert closing.source[1].tolist() == [*range(4, 12)] and closing.source[0, 4:].tolist() == [4, 5, 6, 7]
    assert closing.is_present[0].tolist() == [False] * 4 + [True] * 4
    places = layout.windows[4].places
    assert places.counts == [1, 3, 2] and places.target.tolist() == [0, 1, 2, 3, 4, 5]


def test_pieces_tell_where_samples_and_followed_tokens_are_in_the_whole_rows(config):
    segments, positions, piece = piece_of(1, (0, 7, 12), (3, 4, 4), padding=1)
    layout = packed_layout(config, segments, positions, None, piece)
    assert layout.sample.tolist() == [2, 2, 2, 2, -1] and piece.num_samples == 3
    assert layout.without_last().is_valid.tolist() == [[True, True, True, False, False]]
    first = packed_layout(config, segments, positions, None, piece_of(0, (0, 5, 12), (3, 4, 4), 1)[2])
    # Token 4 is followed by one of the next rank, token 6 of the sample's four by none.
    once, twice, thrice = first.without_last(), *(first.without_last().without_last(),) * 2
    assert once.is_valid.tolist() == [[True, True, False, True, True]]
    assert twice.is_valid.tolist() == [[True, False, False, True, True]]
    assert thrice.without_last().is_valid.tolist() == [[False, False, False, True, False]]


def test_a_rank_looks_back_over_pieces_shorter_than_the_window():
    piece = piece_of(3, (0, 3, 5, 9, 29))[2]
    assert piece.overlaps(5) == {
        (0, 1): (0, 3),
        (0, 2): (0, 3),
        (1, 2): (3, 5),
        (1, 3): (4, 5),
        (2, 3): (5, 9),
    }
    assert piece.tail(5) == 5 and piece.tail(11) == 9


def test_borders_are_multiples_of_a_unit_and_pieces_nearly_equal():
    assert borders_of(4096, 2) == (0, 2048, 4096)
    assert borders_of(1000, 3) == (0, 320, 640, 1000)
    assert borders_of(3, 3) == (0, 1, 2, 3)
    for num_tokens, size in ((8192, 5), (640, 7), (129, 16)):
        borders = borders_of(num_tokens, size)
        lengths = [stop - start for start, stop in pairwise(borders)]
        mean = num_tokens / size
        assert len(lengths) == size and min(lengths) > 0 and max(lengths) <= mean * 9 / 8 + 1


def test_rows_that_cannot_be_cut_so_are_refused():
    with pytest.raises(EngineError, match=r"rows of 3 tokens cannot be cut for 4 context ranks"):
        borders_of(3, 4)
    for borders in ((0, 9), (0, 9, 9), (0, 9, 28), (1, 9, 29)):
        with pytest.raises(EngineError, match=r"do not cut rows of 29 tokens for 2 ranks"):
            _, segments, positions = rows_of(((29,),), 29)
            with context_parallel(Ranks(0, 2), borders):
                piece_of_rows(positions, segments >= 0)
    with pytest.raises(ValueError, match="found 11 tokens a row, the rows that were cut have 29"):
        piece_of(0, (0, 9, 29))[2].cut(torch.zeros(1, 11))


def test_one_rank_is_a_forward_as_ever(config, rough_model):
    model = rough_model(config)
    with torch.no_grad():
        expected = model.hidden(*ROWS)
        with context_parallel(ALONE):
            assert torch.equal(model.hidden(*ROWS), expected)
