"""What a GPU holds and the least time of a step: by hand, beside the real owners, and the docs' tables."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.model.config import FLASH, PRESETS, PRO
from consilience.model.cost import forward_work, training_flops
from consilience.model.cost_training import TYPES, Layout, device_bytes, least_seconds
from consilience.model.transformer import Transformer
from consilience.model.weights import main_weights, mtp_weights, num_parameters
from consilience.training.optimizers import parameter_groups
from consilience.training.shards import state_bytes

GIB = 2**30
FITS = 71  # of the 79 GiB of a card of 80 GB; a tenth for the allocator, libraries and the context
RATES = 989e12, 50e9  # H100: bf16 FLOP/s of the data sheet; one 400 Gb/s link a GPU
DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "scale.md").read_text(encoding="utf-8")
NAMES = ("weights", "gradients", "masters", "optimiser state")
ROWS = {
    "whole, fp32": ("fp32", False),
    "whole, bf16, fp32 gradients": ("bf16, fp32 gradients", False),
    "whole, bf16": ("bf16", False),
    "divided, fp32": ("fp32", True),
    "divided, bf16, fp32 gradients": ("bf16, fp32 gradients", True),
    "divided, bf16": ("bf16", True),
}


def flash(gpus, row="divided, bf16", **more):
    types, is_divided = ROWS[row]
    return Layout(gpus, gpus, types=types, is_dense_divided=is_divided, micro_batch=4096, **more)


def gib(layout, config=FLASH, names=None):
    found = device_bytes(config, layout)
    return sum(found[name] for name in names or found) / GIB


def counts(config):
    """Parameters of routed experts, and of all the rest."""
    weights = [*main_weights(config), *mtp_weights(config)]
    experts = num_parameters(w for w in weights if w.part == "routed experts")
    return experts, num_parameters(weights) - experts


def test_one_gpu_holds_everything_once(smallest):
    experts, dense = counts(smallest)
    found = device_bytes(smallest, Layout(1, types="bf16", micro_batch=40, recompute="none", kl_chunk=10))
    assert found["weights"] == found["gradients"] == 2 * (experts + dense)
    assert found["masters"] == 4 * (experts + dense)
    assert found["activations"] == 4 * 15 * 2 * 40 * 96  # layers, sets of streams, bytes, tokens, N·D
    assert found["distillation"] == 3 * 4 * 10 * 53 + 2 * 53 * 24 + 2 * 40 * 24
    assert found["gathered"] == 0


@pytest.mark.parametrize("types", TYPES)
def test_what_is_divided_by_what(smallest, types):
    """Six experts over 3 of 12 GPUs, rows over 4."""
    experts, dense = counts(smallest)
    kind = TYPES[types]
    layout = Layout(12, 3, 4, types=types, micro_batch=40)
    found, divided = (device_bytes(smallest, replace(layout, is_dense_divided=cut)) for cut in (False, True))
    assert found["weights"] == pytest.approx(kind.weight * (experts / 3 + dense))
    assert divided["gradients"] == pytest.approx(kind.gradient * (experts / 3 + dense / 12))
    assert found["masters"] == pytest.approx(kind.master * (experts + dense) / 12)
    alone = device_bytes(smallest, Layout(1, types=types, micro_batch=40))
    assert found["optimiser state"] == pytest.approx(alone["optimiser state"] / 12)
    assert found["activations"] == pytest.approx(alone["activations"] / 4)
    whole = device_bytes(smallest, replace(layout, is_state_divided=False))
    assert whole["masters"] == pytest.approx(kind.master * (experts / 3 + dense))
    head = 53 * 24
    assert divided["gathered"] > 2 * head * (kind.weight + kind.gradient)


def test_activations_are_no_less_than_those_measured():
    """GiB beyond weights and gradients, four layers of Flash's widths in bf16, of the docs' table."""
    four = replace(FLASH, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
    text = (DOCS / "kernels.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| ours(.*?) \|.*\| ([\d.]+) \|$", text, re.MULTILINE)
    found = {
        (int(tokens.replace(",", "")), "block" if more else "none"): float(x) for tokens, more, x in rows
    }
    assert set(found) >= {(4096, "none"), (4096, "block"), (32768, "none"), (32768, "block")}
    for (tokens, recompute), measured in found.items():
        layout = Layout(1, types="bf16", recompute=recompute, micro_batch=tokens)
        counted = device_bytes(four, layout)["activations"] / GIB
        assert measured <= counted < 2 * measured


@pytest.mark.parametrize("gpus", [64, 128])
@pytest.mark.parametrize("preset", ["flash", "pro"])
def test_the_state_is_that_of_the_real_owners(preset, gpus):
    """Owners of whole matrices are uneven; their mean is ours but for a count by tensor and repeats."""
    with torch.device("meta"):
        model = Transformer(PRESETS[preset])
    real = state_bytes(parameter_groups(model), gpus)
    ours = device_bytes(PRESETS[preset], Layout(gpus))["optimiser state"]
    assert ours == pytest.approx(sum(real) / gpus, rel=1e-3)
    assert max(real) / ours < 1.01


def test_least_times_by_hand(smallest):
    """Six micro-batches of 40 tokens over 2 GPUs each; experts over 3 of 12 GPUs."""
    experts, dense = counts(smallest)
    layout = Layout(12, 3, 2, micro_batch=40, num_micro_batches=6)
    found = least_seconds(smallest, layout, 10.0, 100.0)
    once_more = sum(w.flops for w in forward_work(smallest, 40, is_mean=True))
    assert found["matrix products"] == pytest.approx(12 * (training_flops(smallest, 40) + once_more))
    rows = 120 * 4 * 2 * 24  # tokens, layers, K, D
    assert found["all-to-all"] == pytest.approx(4 * 6 * rows * 2 / 3 / 100)
    assert found["weights and gradients"] == pytest.approx(8 * (experts / 3 * 3 / 4 + dense * 11 / 12) / 100)
    divided = least_seconds(smallest, replace(layout, is_dense_divided=True), 10.0, 100.0)
    each = 12 * dense * 11 / 12
    assert divided["weights and gradients"] == pytest.approx((8 * experts / 4 + 6 * each) / 100)
    kept = least_seconds(smallest, replace(layout, recompute="none"), 10.0, 100.0)
    assert kept["all-to-all"] == pytest.approx(found["all-to-all"] * 4 / 6)
    assert kept["matrix products"] == pytest.approx(12 * training_flops(smallest, 40))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 8, "expert_ranks": 3}, "a divisor of the 8 GPUs"),
        ({"gpus": 8, "context_ranks": 8, "micro_batch": 20}, "a multiple of the 8 context_ranks"),
        ({"gpus": 8, "types": "fp8"}, "types is 'fp8'; one of 'fp32'"),
        ({"gpus": 8, "recompute": "mhc"}, "recompute is 'mhc'; one of 'block'"),
        ({"gpus": 8, "kl_chunk": -1}, "kl_chunk is -1"),
    ],
)
def test_layouts_that_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Layout(**given)


def test_experts_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="a divisor of the 256 experts"):
        device_bytes(FLASH, Layout(96, 96))


def table(first):
    """Cells of the docs' table whose header begins so, by its first column."""
    (body,) = re.findall(rf"^\| {re.escape(first)} .*\n\|[-|]+\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.splitlines()]
    return {row[0]: row[1:] for row in rows}


def cells(row):
    for gpus in (64, 128):
        held, whole = gib(flash(gpus, row), names=NAMES), gib(flash(gpus, row))
        distilled = gib(flash(gpus, row, kl_chunk=256))
        yield from (f"{held:.1f}", f"{whole:.1f}", f"{distilled:.1f}", "yes" if distilled < FITS else "no")


def test_the_table_of_layouts_is_what_is_counted():
    assert table("dense part, types") == {row: list(cells(row)) for row in ROWS}


def test_the_table_of_times_is_what_is_counted():
    found = {}
    for gpus in (64, 128):
        for row in ("whole, bf16", "divided, bf16"):
            times = least_seconds(FLASH, flash(gpus, row, num_micro_batches=4), *RATES)
            found[f"{gpus}, {row}"] = [f"{seconds:.1f}" for seconds in times.values()]
    assert table("GPUs, dense part, types") == found


def test_rows_over_context_ranks_take_what_as_many_tokens_of_one_take():
    long = replace(flash(64), micro_batch=131072, context_ranks=32)
    assert device_bytes(FLASH, long) == device_bytes(FLASH, flash(64))


def test_half_the_tokens_make_room_for_fp32_on_64():
    assert gib(replace(flash(64, "divided, fp32", kl_chunk=256), micro_batch=2048)) < FITS


def test_experts_within_a_machine_of_eight_do_not_fit():
    assert gib(replace(flash(128), expert_ranks=8), names=("weights",)) > 60
    assert gib(replace(flash(128), expert_ranks=8), names=NAMES) > FITS


def test_what_the_text_says_beside_the_tables():
    experts, dense = counts(FLASH)
    total = experts + dense
    pro = [gib(Layout(g, g, types="bf16", is_dense_divided=True), PRO, NAMES) for g in (64, 128)]
    said = [
        f"{total / 1e9:.1f} G parameters",
        f"{experts / 1e9:.1f} G of routed experts",
        f"hold {2 * total / GIB:.0f} GiB in bf16",
        f"{16 * total / 64 / GIB:.1f} GiB on 64",
        f"{16 * total / 128 / GIB:.1f} on 128",
        f"{4 * 3 * 256 * 2048 * 4096 / GIB:.0f} GiB of one block's experts",
        f"V4-Pro's {pro[0]:.0f} GiB on 64 and {pro[1]:.0f} on 128",
    ]
    assert [text for text in said if text not in " ".join(TEXT.split())] == []
