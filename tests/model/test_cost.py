"""FLOPs and decode state: by hand, against the report's figures, against what is really allocated."""

import statistics
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from consilience.model.config import FLASH, PRESETS, PRO
from consilience.model.cost import (
    EQUIVALENT,
    allocated_bytes,
    equivalent_flops,
    forward_work,
    report_state_bytes,
    serving_format,
    state_bytes,
    training_flops,
)
from consilience.model.cost_v32 import v32_state_bytes, v32_work
from consilience.model.state import DecodeState

torch.set_num_threads(1)

N = 10**6  # the "1M" of the report's figure 1
ALIKE = dict.fromkeys(EQUIVALENT, 1.0)


def flops_share(config, num_tokens=N, weighting=EQUIVALENT):
    return equivalent_flops(forward_work(config, num_tokens), weighting) / equivalent_flops(
        v32_work(num_tokens), weighting
    )


def state_share(config, num_tokens=N, *, has_scales=True):
    parts = state_bytes(config, num_tokens, serving_format(config, has_scales=has_scales))
    return report_state_bytes(parts) / v32_state_bytes(num_tokens, has_scales=has_scales)


def by_part(work):
    return {(row.part, row.kind): row.flops for row in work}


def test_the_work_of_a_token_by_hand(smallest):
    """Token 30 of layers (sliding, CSA 4, HCA 12, CSA 4): 7 CSA entries of which 5 are kept, 2 of HCA."""
    found = by_part(forward_work(smallest, 30))
    heads, width, window = 4, 16, 6
    assert found["core, sliding", "core"] == 4 * heads * width * window
    assert found["core, CSA", "core"] == 2 * 4 * heads * width * (window + 5)
    assert found["core, HCA", "core"] == 4 * heads * width * (window + 2)
    assert found["index scores", "index"] == 2 * 2 * 6 * 12 * 7
    assert found["routed experts", "low"] == 4 * 2 * 2 * 3 * 20 * 24  # layers, multiply-add, K, matrices
    assert found["shared experts", "low"] == 4 * 2 * 3 * 20 * 24
    assert found["router", "high"] == 4 * 2 * 6 * 24
    assert found["head", "high"] == 2 * 53 * 24
    assert found["indexer", "low"] == 2 * 2 * 72 * 20
    assert found["indexer", "high"] == 2 * 2 * (6 * 24 + 2 * 24 * 24)
    assert found["mHC", "high"] == 2 * (4 * 2 * 24 * 96 + 4 * 96)


def test_the_mean_is_the_mean_of_every_token(smallest):
    for length in (1, 3, 4, 6, 23, 24, 61):
        each = [by_part(forward_work(smallest, n)) for n in range(1, length + 1)]
        for key, flops in by_part(forward_work(smallest, length, is_mean=True)).items():
            assert flops == pytest.approx(statistics.fmean(row[key] for row in each), rel=1e-12), key


def test_projections_are_counted_as_torch_counts_them(smallest, rough_model):
    """Sliding layers only: their scores run as batched products, and so does wo_a; the rest is `mm`.

    In fp64 the experts run as plain products too, which torch's counter knows.
    """
    config = replace(smallest, compress_ratios=(0, 0, 0, 0), num_hash_layers=4)
    model = rough_model(config, dtype=torch.float64).requires_grad_(False)
    tokens = torch.arange(1, 7)[None]
    with FlopCounterMode(display=False) as counter:
        model.head(model.hidden(tokens))
    operators = counter.get_flop_counts()["Global"]
    linear = operators[torch.ops.aten.mm]
    expected = [row for row in forward_work(config, 6) if row.kind in ("low", "high")]
    grouped = 2 * 24 * 32 * 4  # wo_a runs as a batched product
    assert linear == 6 * (sum(row.flops for row in expected) - grouped)


def test_shares_of_the_report_are_reproduced():
    """Figure 1: FLOPs 27 % and 10 %, 3.7 and 9.8 times lower; KV 10 % and 7 %, 9.5 and 13.7 times."""
    for share, percent, times in (
        (flops_share(PRO), "27.1", "3.69"),
        (flops_share(FLASH), "10.2", "9.83"),
        (state_share(PRO), "10.5", "9.54"),
        (state_share(FLASH), "7.3", "13.67"),
    ):
        assert (f"{100 * share:.1f}", f"{1 / share:.2f}") == (percent, times)


def test_the_parts_of_the_flops_are_those_of_the_specification():
    for config, linear, core, index, total in (
        (PRO, "0.102", "0.147", "0.061", "0.310"),
        (FLASH, "0.028", "0.045", "0.043", "0.117"),
    ):
        work = forward_work(config, N)
        groups = (("low", "high"), ("core",), ("index",), EQUIVALENT)
        sums = [equivalent_flops(row for row in work if row.kind in kinds) / 1e12 for kinds in groups]
        assert [f"{flops:.3f}" for flops in sums] == [linear, core, index, total]


def test_other_weightings_do_not_fit_the_report():
    unhalved, single_speed = {**EQUIVALENT, "index": 1.0}, {**ALIKE, "index": 0.5}
    for config, alike, index_at_one, bf16_at_one, power_of_two in (
        (PRO, "26.5", "32.4", "21.0", "26.7"),
        (FLASH, "12.2", "13.9", "8.3", "10.1"),
    ):
        shares = [flops_share(config, weighting=w) for w in (ALIKE, unhalved, single_speed)]
        shares.append(flops_share(config, 2**20))
        assert [f"{100 * s:.1f}" for s in shares] == [alike, index_at_one, bf16_at_one, power_of_two]


def test_the_sizes_of_a_serving_cache_are_those_of_the_specification():
    for config, per_token, gb, of_gqa in ((PRO, "5036", "5.04", "2.0"), (FLASH, "3517", "3.52", "2.0")):
        assert (serving_format(config).entry, serving_format(config).index_key) == (584, 68)
        total = report_state_bytes(state_bytes(config, N, serving_format(config)))
        assert (f"{total / N:.0f}", f"{total / 1e9:.2f}") == (per_token, gb)
        # grouped-query attention of the same depth: 8 heads of 128 channels, keys and values, BF16
        assert f"{100 * total / (N * config.num_hidden_layers * 8 * 128 * 2 * 2):.1f}" == of_gqa


def test_without_scales_or_with_tails_the_shares_move_as_specified():
    for config, plain, with_tails, tails_mib in (
        (PRO, "9.48", "9.51", 17.8),
        (FLASH, "13.57", "13.62", 11.6),
    ):
        assert f"{1 / state_share(config, has_scales=False):.2f}" == plain
        parts = state_bytes(config, N, serving_format(config))
        assert f"{v32_state_bytes(N) / sum(parts.values()):.2f}" == with_tails
        assert parts["compressor tails"] / 2**20 == pytest.approx(tails_mib, abs=0.05)


def test_window_entries_of_all_tokens_would_be_about_eight_times_the_compressed_ones():
    for config, times in ((PRO, "7.88"), (FLASH, "7.95")):
        parts = state_bytes(config, N, serving_format(config, has_scales=False))
        whole = parts["window"] / config.sliding_window * N
        assert f"{whole / (parts['CSA entries'] + parts['HCA entries']):.2f}" == times


def test_one_csa_and_one_hca_layer_have_the_tails_of_the_specification():
    for ratio, kib in ((4, 64 + 16), (128, 512), (0, 0)):
        config = replace(FLASH, num_hidden_layers=1, compress_ratios=(ratio,))
        assert state_bytes(config, N, serving_format(config))["compressor tails"] == kib << 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", PRESETS)
def test_the_state_takes_as_many_bytes_as_are_really_allocated(name, dtype):
    """On the meta device: shapes and types are those of any other, and Flash at 1M fits nowhere else."""
    config = PRESETS[name]
    for num_slots, length in ((1, config.max_position_embeddings), (3, 1000)):
        state = DecodeState.allocate(config, num_slots, length, device="meta", dtype=dtype)
        assert allocated_bytes(config, num_slots, length, dtype.itemsize) == state.num_bytes()


def test_the_serving_cache_is_the_allocated_one_in_other_formats():
    """Count entries of the allocated tensors, price each as served: the report's figure."""
    length = N - N % FLASH.block_tokens  # whole blocks
    layers = DecodeState.allocate(FLASH, 1, length, device="meta", dtype=torch.bfloat16).layers
    entry, key = serving_format(FLASH).entry, serving_format(FLASH).index_key
    stored = lambda part: (part.entries.shape[0] - 1) * part.entries.shape[1]  # block 0 is nobody's
    total = sum(layer.window.shape[1] * entry for layer in layers)
    total += sum(stored(layer.compressor) * entry for layer in layers if layer.compressor)
    total += sum(stored(layer.indexer) * key for layer in layers if layer.indexer)
    assert total == report_state_bytes(state_bytes(FLASH, length, serving_format(FLASH)))


def test_training_is_three_forwards_but_the_indexers():
    """No gradient of the language-model loss reaches the indexer (specification 5.3)."""
    work = forward_work(FLASH, 4096, is_mean=True)
    indexer = sum(row.flops for row in work if row.part in ("indexer", "index scores"))
    assert training_flops(FLASH, 4096) == pytest.approx(3 * sum(row.flops for row in work) - 2 * indexer)
    short = replace(FLASH, compress_ratios=(0,) * 43)
    assert training_flops(short, 1) == 3 * sum(row.flops for row in forward_work(short, 1))
