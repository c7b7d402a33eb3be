"""A sequence's decode state on its way to the disk and back, and the states that are not let in."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from state_rows import BLOCKS_OF_12, allocate, feed, random_ids

from consilience.conf.errors import EngineError
from consilience.model.state import DecodeState

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(smallest, rough_model):
    """Blocks hold 12 tokens: 3 CSA entries or one of HCA."""
    config = replace(smallest, **BLOCKS_OF_12)
    return rough_model(config, dtype=torch.float64).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 5, 12, 23, 37])
def test_a_row_comes_back_from_disk_and_goes_on_bit_for_bit(
    length, dtype, model, smallest, rough_model, tmp_path
):
    if dtype != torch.float64:
        model = rough_model(model.config, dtype=dtype).requires_grad_(False)
    tokens, state = random_ids(60), allocate(model, 2, lookahead=1)
    if length:
        feed(model, state, 1, tokens[:length])
    file = tmp_path / "row.safetensors"
    save_file(state.export_row(1), file)
    elsewhere = allocate(model, 3, num_blocks=8, lookahead=1)
    elsewhere.reserve(0, 12)
    elsewhere.reserve(1, 24)
    feed(model, elsewhere, 1, random_ids(24, seed=1))
    elsewhere.import_row(1, load_file(file))
    # As many blocks as the row had or needs.
    assert len(elsewhere.owned[1]) == max(2, -(-length // 12))
    elsewhere.reserve(1, 60)
    for size in (1, 1, 9, 1):
        part = tokens[length : length + size]
        assert torch.equal(feed(model, elsewhere, 1, part), feed(model, state, 1, part))
        length += size


def test_what_is_saved_grows_by_blocks(model):
    state = allocate(model, 1, 60)
    sizes = []
    for _ in range(3):
        feed(model, state, 0, random_ids(12))
        sizes.append(sum(t.nbytes for t in state.export_row(0).values()))
    block = sum(pages[0].nbytes for layer in state.layers for pages in layer.pages())
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == block == 8 * (3 * 16 + 3 * 12 + 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("position"), "position is missing, this model needs torch.int64"),
        (lambda t: t.pop("layers.1.rings.2"), "layers.1.rings.2 is missing"),
        (lambda t: t.pop("layers.2.pages.0"), "layers.2.pages.0 is missing"),
        (lambda t: t.update({"layers.3.rings.0": t["position"]}), "this model knows no layers.3.rings.0"),
        (
            lambda t: t.update({"layers.1.pages.1": t["layers.1.pages.1"].float()}),
            r"layers.1.pages.1 is torch.float32 \(2, 3, 12\), this model needs torch.float64 \(2, 3, 12\)",
        ),
        (
            lambda t: t.update({"layers.1.pages.0": t["layers.1.pages.0"][:1]}),
            r"layers.1.pages.0 is torch.float64 \(1, 3, 16\), this model needs torch.float64 \(2, 3, 16\)",
        ),
        (
            lambda t: t.update({"layers.0.rings.0": t["layers.0.rings.0"][:5]}),
            r"layers.0.rings.0 is torch.float64 \(5, 16\), this model needs torch.float64 \(6, 16\); it was",
        ),
        (lambda t: t["position"].fill_(61), "sequence of 61 tokens was asked for, the decode state holds 60"),
    ],
)
def test_a_row_of_another_model_is_refused_by_name_and_nothing_changes(change, message, model):
    state = allocate(model, 2)
    feed(model, state, 0, random_ids(20))
    tensors = state.export_row(0)
    change(tensors)
    before = [t.clone() for t in state.tensors()], [list(own) for own in state.owned]
    with pytest.raises(EngineError, match=message):
        state.import_row(1, tensors)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), before[0])) and state.owned == before[1]


@pytest.mark.parametrize(
    "change",
    [
        {"compress_ratios": (0, 4, 4)},
        {"compress_ratios": (0, 4, 6)},
        {"compress_ratios": (0, 0, 0)},
        {"sliding_window": 5},
        {"head_dim": 32},
        {"index_head_dim": 8},
        {"num_hidden_layers": 2, "compress_ratios": (0, 4)},
        {"num_hidden_layers": 4, "compress_ratios": (0, 4, 12, 4)},
    ],
)
def test_rows_of_models_of_another_shape_are_refused(change, model):
    row = DecodeState.allocate(replace(model.config, **change), 1, 60).export_row(0)
    state = DecodeState.allocate(model.config, 1, 60)
    with pytest.raises(EngineError, match=r"saved decode state: .* saved by another model"):
        state.import_row(0, row)
    with pytest.raises(EngineError, match="or with another lookahead"):
        state.import_row(0, DecodeState.allocate(model.config, 1, 60, lookahead=1).export_row(0))
