"""The list of tensors is the model: published totals, and what `Transformer` really has, part by part."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from consilience.model.config import FLASH, PRESETS, PRO, TINY
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.model.weights import (
    LAYOUTS,
    PARTS,
    main_weights,
    mtp_weights,
    num_active_parameters,
    num_parameters,
    released_layout,
    training_bytes,
    weight_bytes,
)
from consilience.training.optimizers import Owner, V4Optimizer, owner_of, parameter_groups

torch.set_num_threads(1)

RELEASED, BASE, _, FP32 = LAYOUTS


def part_of(name):
    """The part that a parameter of `Transformer` belongs to, by its released name."""
    if name.endswith("norm.weight"):
        return "norms"
    within = {"embed": "embedding", "head": "head", "hc_": "mHC", ".indexer.": "indexer"}
    within |= {".compressor.": "compressors", ".attn.": "attention", ".gate.": "router"}
    within |= {".shared_experts.": "shared experts", ".experts.": "routed experts"}
    order = ["hc_", ".indexer.", ".compressor.", ".attn.", ".gate.", ".shared_experts.", ".experts."]
    return within[next(key for key in [*order, "embed", "head"] if key in name)]


def main_parameters(config):
    """name -> parameter on the meta device, MTP left out."""
    with torch.device("meta"):
        model = Transformer(config)
    return {name: p for name, p in model.named_parameters() if not name.startswith("mtp.")}


def test_a_model_small_enough_to_count_by_hand(smallest):
    config = replace(smallest, num_hidden_layers=1, compress_ratios=(4,), num_hash_layers=0)
    found = {part: num_parameters(w for w in main_weights(config) if w.part == part) for part in PARTS}
    assert found == {
        "embedding": 53 * 24,
        "head": 53 * 24,
        # wq_a, wq_b, wkv, wo_a (two heads a group), wo_b, sinks
        "attention": 20 * 24 + 64 * 20 + 16 * 24 + 24 * 32 + 24 * 24 + 4,
        "compressors": 2 * 32 * 24 + 4 * 32,
        # wq_b, weights_proj, wkv and wgate, ape
        "indexer": 72 * 20 + 6 * 24 + 2 * 24 * 24 + 4 * 24,
        # fn, base, scale before attention and before MoE; fn, base, scale of the head
        "mHC": 2 * (24 * 96 + 24 + 3) + 4 * 96 + 4 + 1,
        "router": 6 * 24 + 6,
        "routed experts": 6 * 3 * 20 * 24,
        "shared experts": 3 * 20 * 24,
        # attn_norm, ffn_norm, norm; q_norm; kv_norm, compressor; index compressor
        "norms": 3 * 24 + 20 + 2 * 16 + 12,
    }
    # two experts of six, no row of the embedding
    assert num_active_parameters(main_weights(config)) == sum(found.values()) - 53 * 24 - 4 * 3 * 20 * 24


def test_totals_are_the_published_ones_exactly():
    for config, total, with_mtp in (
        (FLASH, 284_332_240_471, 290_942_289_362),
        (PRO, 1_572_997_201_763, 1_598_837_347_742),
    ):
        assert num_parameters(main_weights(config)) == total
        assert num_parameters([*main_weights(config), *mtp_weights(config)]) == with_mtp


def test_active_parameters_are_the_published_ones():
    assert f"{num_active_parameters(main_weights(FLASH)) / 1e9:.2f}" == "13.27"
    assert f"{num_active_parameters(main_weights(PRO)) / 1e9:.2f}" == "48.85"


@pytest.mark.parametrize("name", PRESETS)
def test_every_part_has_as_many_parameters_as_the_model_that_is_built(name):
    expected = Counter()
    for parameter, tensor in main_parameters(PRESETS[name]).items():
        expected[part_of(parameter)] += tensor.numel()
    weights = main_weights(PRESETS[name])
    assert {part: num_parameters(w for w in weights if w.part == part) for part in PARTS} == expected


def test_the_released_files_have_as_many_tensors_and_bytes_as_counted_in_the_real_ones():
    """Listings of the real checkpoints: 69,187 tensors, 159.6 GB; 145,116 tensors, 805 GiB."""
    for config, num_tensors in ((FLASH, 69_187), (PRO, 145_116)):
        weights = [*main_weights(config), *mtp_weights(config)]
        assert sum(w.num * (2 if w.format in ("fp8", "expert") else 1) for w in weights) == num_tensors
    flash, pro = ([*main_weights(c), *mtp_weights(c)] for c in (FLASH, PRO))
    assert f"{weight_bytes(flash, RELEASED) / 1e9:.1f}" == "159.6"
    assert f"{weight_bytes(pro, RELEASED) / 2**30:.0f}" == "805"


def test_base_checkpoints_keep_their_experts_in_fp8():
    assert released_layout(FLASH) == released_layout(replace(FLASH, expert_dtype="fp4")) == RELEASED
    assert released_layout(replace(FLASH, expert_dtype="fp8")) == BASE


def test_bytes_of_each_format_by_hand(smallest):
    """One expert matrix [20, 24]: FP4 packs 2 a byte and adds one scale a row; FP8 adds one a tensor."""
    experts = [w for w in main_weights(smallest) if w.part == "routed experts"]
    assert [weight_bytes(experts[:1], layout) for layout in LAYOUTS] == [
        12 * (20 * 12 + 20),
        12 * (20 * 24 + 1),
        12 * 20 * 24 * 2,
        12 * 20 * 24 * 4,
    ]


@pytest.mark.parametrize("name", PRESETS)
def test_an_fp32_model_takes_as_many_bytes_as_its_tensors(name):
    with torch.device("meta"):
        state = Transformer(PRESETS[name]).state_dict()
    held = sum(t.numel() * t.element_size() for key, t in state.items() if not key.startswith("mtp."))
    assert weight_bytes(main_weights(PRESETS[name]), FP32) == held


@pytest.mark.parametrize("name", PRESETS)
def test_the_optimisers_share_parameters_as_the_trainer_does(name):
    owned = Counter()
    for parameter, tensor in main_parameters(PRESETS[name]).items():
        owned[owner_of(parameter)] += tensor.numel()
    adamw = owned[Owner.ADAMW] + owned[Owner.ADAMW_DECAYED]
    total = owned.total()
    assert training_bytes(main_weights(PRESETS[name])) == {
        "master weights": 4 * total,
        "gradients": 4 * (total - owned[Owner.RULE]),
        "Muon momentum": 4 * owned[Owner.MUON],
        "AdamW moments": 8 * adamw,
    }


def test_optimiser_bytes_are_those_the_optimiser_really_holds():
    optimizer = V4Optimizer(parameter_groups(initialize(Transformer(TINY), 0)), lr=1e-3)
    held = Counter()
    for name, tensor in optimizer.state_tensors().items():
        if not name.startswith("adamw.step."):
            held[name.split(".")[0]] += tensor.numel() * tensor.element_size()
    expected = training_bytes(main_weights(TINY))
    assert held == {"muon": expected["Muon momentum"], "adamw": expected["AdamW moments"]}
