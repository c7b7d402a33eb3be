"""Initialisation is a function of the seed, and its hash table spreads tokens over experts."""

from dataclasses import replace

import pytest
import torch

from consilience.model.config import FLASH, MINI, TINY
from consilience.model.initialize import hash_table, initialize, num_parameters
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


def test_equal_seeds_give_equal_models_and_leave_torch_s_generator_alone():
    torch.manual_seed(5)
    models = [Transformer(TINY) for _ in range(3)]
    before = torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4)):
        initialize(model, seed)
    assert torch.equal(torch.get_rng_state(), before)
    states = [m.state_dict() for m in models]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    drawn = [n for n in states[0] if not torch.equal(states[0][n], states[2][n])]
    assert (
        "embed.weight" in drawn and "layers.0.ffn.gate.tid2eid" in drawn and "layers.1.hc_ffn.base" in drawn
    )


def test_every_tensor_is_finite_and_matrices_keep_the_size_of_what_they_multiply():
    model = initialize(Transformer(TINY), 0)
    assert all(p.isfinite().all() for p in model.parameters())
    for name, p in model.named_parameters():
        if p.dim() >= 2 and not name.endswith((".fn", ".ape")):
            assert p.square().mean().sqrt().item() == pytest.approx(p.shape[-1] ** -0.5, rel=0.15), name
    with torch.no_grad():
        logits = model(torch.randint(TINY.vocab_size, (2, 64)))
    assert 0.3 < logits.std() < 3


def test_gates_start_small_and_sinks_biases_and_position_biases_at_zero():
    model = initialize(Transformer(TINY), 0)
    for name, p in model.named_parameters():
        if name.endswith(".scale"):
            assert torch.all(p == 0.01), name
        if name.endswith((".attn_sink", ".ape", ".gate.bias")):
            assert not p.any(), name
        if name.endswith("norm.weight"):
            assert torch.all(p == 1), name


@pytest.mark.parametrize(
    "config", [TINY, MINI, FLASH, replace(TINY, n_routed_experts=7, num_experts_per_tok=3)]
)
def test_the_hash_table_gives_every_token_distinct_experts_and_every_expert_a_fair_load(config):
    config = replace(config, vocab_size=min(config.vocab_size, 20_000))
    table = hash_table(config, 11)
    experts, topk = config.n_routed_experts, config.num_experts_per_tok
    assert table.shape == (config.vocab_size, topk) and table.dtype == torch.int64
    ordered = table.sort(1).values
    assert (
        (ordered[:, 1:] > ordered[:, :-1]).all()
        and ordered[:, 0].min() >= 0
        and ordered[:, -1].max() < experts
    )
    load = torch.bincount(table.flatten(), minlength=experts).double()
    assert (load / load.mean() - 1).abs().max() < 0.2
    assert not torch.equal(table, hash_table(config, 12)) and torch.equal(table, hash_table(config, 11))


def test_two_hash_layers_have_different_tables():
    model = initialize(Transformer(replace(TINY, num_hash_layers=2)), 0)
    a, b = (model.layers[i].ffn.gate.tid2eid for i in range(2))
    assert (a != b).any(1).double().mean() > 0.5


def test_parameters_count_router_biases_but_not_hash_tables():
    hashed, learned = (num_parameters(Transformer(replace(TINY, num_hash_layers=n))) for n in (2, 1))
    assert learned - hashed == TINY.n_routed_experts
