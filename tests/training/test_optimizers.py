"""The parameter split on official names, AdamW beside torch's own, the bias rule, state in and out."""

import pytest
import torch
from torch import nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.model.config import ModelConfig
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.kernels.newton_schulz import newton_schulz
from consilience.model.transformer import Transformer
from consilience.training.optimizers import (
    Owner,
    V4Optimizer,
    gate_bias_names,
    owner_of,
    parameter_groups,
    update_gate_bias,
)

torch.set_num_threads(1)

SHAPES = {  # D 8, N 4 streams, 2 heads of 4 channels in 2 groups, latent 6, E 3 experts of width 5
    "embed.weight": (11, 8),
    "head.weight": (11, 8),
    "norm.weight": (8,),
    "hc_head_fn": (4, 32),
    "hc_head_base": (4,),
    "hc_head_scale": (1,),
    "layers.0.attn_norm.weight": (8,),
    "layers.0.ffn_norm.weight": (8,),
    "layers.0.hc_attn_fn": (24, 32),
    "layers.0.hc_attn_base": (24,),
    "layers.0.hc_attn_scale": (3,),
    "layers.0.attn.wq_a.weight": (6, 8),
    "layers.0.attn.wq_b.weight": (8, 6),
    "layers.0.attn.wkv.weight": (4, 8),
    "layers.0.attn.wo_a.weight": (10, 4),
    "layers.0.attn.wo_b.weight": (8, 10),
    "layers.0.attn.q_norm.weight": (6,),
    "layers.0.attn.kv_norm.weight": (4,),
    "layers.0.attn.attn_sink": (2,),
    "layers.0.attn.compressor.wkv.weight": (8, 8),
    "layers.0.attn.compressor.wgate.weight": (8, 8),
    "layers.0.attn.compressor.ape": (4, 8),
    "layers.0.attn.compressor.norm.weight": (4,),
    "layers.0.attn.indexer.wq_b.weight": (6, 6),
    "layers.0.attn.indexer.weights_proj.weight": (3, 8),
    "layers.0.attn.indexer.compressor.wkv.weight": (4, 8),
    "layers.0.attn.indexer.compressor.wgate.weight": (4, 8),
    "layers.0.attn.indexer.compressor.ape": (4, 4),
    "layers.0.attn.indexer.compressor.norm.weight": (2,),
    "layers.0.ffn.gate.weight": (3, 8),
    "layers.0.ffn.gate.bias": (3,),
    "layers.0.ffn.experts.w1": (3, 5, 8),
    "layers.0.ffn.experts.w2": (3, 8, 5),
    "layers.0.ffn.experts.w3": (3, 5, 8),
    "layers.0.ffn.shared_experts.w1.weight": (5, 8),
    "layers.0.ffn.shared_experts.w2.weight": (8, 5),
    "layers.0.ffn.shared_experts.w3.weight": (5, 8),
    "layers.1.attn.compressor.wkv.weight": (4, 8),
    "layers.1.attn.compressor.norm.weight": (4,),
    "mtp.0.e_proj.weight": (8, 8),
    "mtp.0.enorm.weight": (8,),
    "mtp.0.hc_head_fn": (4, 32),
}


def module(shapes, seed=0):
    """A module tree whose parameters have the given dotted names and random values and gradients."""
    generator = torch.Generator().manual_seed(seed)
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in dict(node.named_children()):
                node.add_module(part, nn.Module())
            node = node.get_submodule(part)
        is_bias = name.endswith("gate.bias")
        node.register_parameter(leaf, nn.Parameter(torch.randn(shape, generator=generator), not is_bias))
        if not is_bias:
            node.get_parameter(leaf).grad = torch.randn(shape, generator=generator)
    return root


def test_every_parameter_has_exactly_one_owner():
    groups = parameter_groups(module(SHAPES))
    owned = [p.name for p in groups.muon] + [
        *groups.adamw,
        *groups.adamw_decayed,
        *groups.rule,
        *groups.frozen,
    ]
    assert sorted(owned) == sorted(SHAPES)
    assert set(groups.adamw_decayed) == {"embed.weight", "head.weight"}
    assert set(groups.rule) == {"layers.0.ffn.gate.bias"}
    vectors = {name for name, shape in SHAPES.items() if len(shape) == 1 and not name.endswith("gate.bias")}
    assert set(groups.adamw) == vectors | {name for name in SHAPES if name.endswith(".ape")}


def test_weights_fall_into_their_logical_matrices():
    blocks = {p.name: p.row_blocks for p in parameter_groups(module(SHAPES)).muon}
    assert blocks["layers.0.attn.wo_a.weight"] == (5, 5)
    assert blocks["layers.0.attn.compressor.wkv.weight"] == (4, 4)
    assert blocks["layers.0.attn.indexer.compressor.wgate.weight"] == (2, 2)
    assert blocks["layers.1.attn.compressor.wkv.weight"] == (4,)
    assert blocks["layers.0.hc_attn_fn"] == (4, 4, 16)
    assert blocks["hc_head_fn"] == blocks["mtp.0.hc_head_fn"] == (4,)
    assert blocks["layers.0.ffn.experts.w2"] == (8,)
    assert blocks["layers.0.attn.wkv.weight"] == (4,)


def test_matrices_of_dense_models_are_muons_and_all_else_is_adamws():
    inner = "model.layers.3."
    assert {owner_of(f"{inner}self_attn.{n}_proj.weight") for n in "qkvo"} == {Owner.MUON}
    assert {owner_of(f"{inner}mlp.{n}_proj.weight") for n in ("gate", "up", "down")} == {Owner.MUON}
    assert {owner_of(n) for n in ("model.embed_tokens.weight", "lm_head.weight")} == {Owner.ADAMW_DECAYED}
    norms = ("model.norm", f"{inner}input_layernorm", f"{inner}self_attn.q_norm")
    assert {owner_of(f"{n}.weight") for n in norms} == {Owner.ADAMW}
    assert owner_of(f"{inner}self_attn.q_proj.bias") is Owner.ADAMW


@pytest.mark.parametrize(
    "name", ["layers.0.attn.wq.weight", "layers.x.attn_norm.weight", "model.embed.weight", "lm_head.bias"]
)
def test_an_unknown_name_is_an_error_that_names_it(name):
    with pytest.raises(EngineError, match=f"parameter {name} has no optimiser"):
        parameter_groups(module({"embed.weight": (3, 2), name: (2, 2)}))


def test_names_one_by_one_and_as_modules_have_owners_too():
    assert owner_of("layers.12.ffn.experts.255.w2.weight") is Owner.MUON
    assert owner_of("layers.3.hc_ffn.fn") is Owner.MUON and owner_of("hc_head.base") is Owner.ADAMW
    assert owner_of("layers.0.ffn.gate.tid2eid") is Owner.FROZEN


def test_a_parameter_without_requires_grad_is_frozen():
    model = module({"embed.weight": (3, 2), "norm.weight": (2,)})
    model.get_parameter("embed.weight").requires_grad_(False)
    groups = parameter_groups(model)
    assert set(groups.frozen) == {"embed.weight"} and set(groups.adamw) == {"norm.weight"}


def test_streams_other_than_four_split_by_their_own_number():
    groups = parameter_groups(module({"layers.0.hc_ffn_fn": (8, 16)}))
    assert groups.muon[0].row_blocks == (2, 2, 4)
    with pytest.raises(EngineError, match="N streams need"):
        parameter_groups(module({"layers.0.hc_ffn_fn": (9, 16)}))


def adamw_by_hand(w, grads, lr, decay):
    """fp64 AdamW with V4's betas and epsilon."""
    w, m, v = w.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        w = w * (1 - lr * decay) - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-20)
    return w


def test_adamw_parameters_follow_the_formula_and_only_embedding_and_head_decay():
    model = module({"embed.weight": (4, 3), "norm.weight": (3,)})
    optimizer = V4Optimizer(parameter_groups(model), lr=0.01, weight_decay=0.1)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    grads = [[torch.randn_like(p) for p in model.parameters()] for _ in range(4)]
    for row in grads:
        for p, g in zip(model.parameters(), row):
            p.grad = g.clone()
        optimizer.step()
    for i, (name, p) in enumerate(model.named_parameters()):
        decay = 0.1 if name == "embed.weight" else 0.0
        expected = adamw_by_hand(start[name], [row[i] for row in grads], 0.01, decay)
        torch.testing.assert_close(p.detach().double(), expected, rtol=0, atol=1e-6)


def test_rows_of_the_embedding_that_never_had_a_gradient_stay_finite():
    model = module({"embed.weight": (4, 3)})
    embed = model.get_parameter("embed.weight")
    embed.grad[1:] = 0
    optimizer = V4Optimizer(parameter_groups(model), lr=0.1, weight_decay=0.0)
    before = embed.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert torch.equal(embed[1:], before[1:]) and torch.isfinite(embed).all()


def test_the_learning_rate_scale_reaches_both_optimisers():
    model = module(SHAPES)
    optimizer = V4Optimizer(parameter_groups(model), lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert optimizer.step(0.0) == 0.0
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert optimizer.step(0.5) == pytest.approx(0.05)
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert set(moved) == set(SHAPES) - {"layers.0.ffn.gate.bias"}


def test_the_bias_moves_against_the_load():
    bias = torch.zeros(4)
    update_gate_bias(bias, torch.tensor([10, 0, 5, 5]), speed=0.25)
    assert bias.tolist() == [-0.25, 0.25, 0, 0]
    with pytest.raises(EngineError, match="differ in shape"):
        update_gate_bias(bias, torch.zeros(3))


def test_loads_given_to_a_step_move_the_bias_of_their_layer():
    model = module(SHAPES)
    optimizer = V4Optimizer(parameter_groups(model), lr=0.1, bias_speed=0.5)
    bias = model.get_parameter("layers.0.ffn.gate.bias")
    before = bias.detach().clone()
    optimizer.step(expert_loads={"layers.0.ffn.gate.bias": torch.tensor([0, 3, 9])})
    assert (bias - before).tolist() == pytest.approx([0.5, 0.5, -0.5])
    with pytest.raises(EngineError, match=r"expert loads for layers\.7"):
        optimizer.step(expert_loads={"layers.7.ffn.gate.bias": torch.zeros(3)})


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in optimizer.parameters.values():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_state_taken_out_and_put_in_continues_bit_for_bit():
    straight, resumed = module(SHAPES), module(SHAPES)
    one = V4Optimizer(parameter_groups(straight), lr=0.02)
    train(straight, one, 5)
    two = V4Optimizer(parameter_groups(resumed), lr=0.02)
    train(resumed, two, 2)
    state = {name: tensor.clone() for name, tensor in two.state_tensors().items()}
    three = V4Optimizer(parameter_groups(resumed), lr=0.02)
    three.load_state_tensors(state)
    train(resumed, three, 3, first=2)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), resumed.parameters()))


def test_state_of_another_model_is_refused_by_name():
    optimizer = V4Optimizer(parameter_groups(module(SHAPES)), lr=0.1)
    state = optimizer.state_tensors()
    gone = {k: v for k, v in state.items() if k != "muon.momentum.layers.0.attn.wkv.weight"}
    with pytest.raises(CheckpointError, match=r"muon.momentum.layers.0.attn.wkv.weight is missing"):
        optimizer.load_state_tensors(gone)
    with pytest.raises(CheckpointError, match=r"extra is not a state"):
        optimizer.load_state_tensors(state | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"adamw.exp_avg.norm.weight has shape \[9\], expected \[8\]"):
        optimizer.load_state_tensors(state | {"adamw.exp_avg.norm.weight": torch.zeros(9)})


CONFIG = ModelConfig(
    vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
    qk_rope_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=4, sliding_window=8,
    compress_ratios=(0, 4, 8), index_n_heads=2, index_head_dim=8, index_topk=2,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_hash_layers=1,
    num_nextn_predict_layers=1, mtp_compress_ratios=(0,),
)  # fmt: skip


def whole_model():
    """All three attention kinds, both routers, and the MTP block, with random values and gradients."""
    model = initialize(Transformer(CONFIG), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
    return model


BLOCK_OWNERS = {  # the table of section 12.2, by name
    "attn_norm.weight ffn_norm.weight attn.q_norm.weight attn.kv_norm.weight attn.attn_sink": Owner.ADAMW,
    "hc_attn.base hc_attn.scale hc_ffn.base hc_ffn.scale": Owner.ADAMW,
    "hc_attn.fn hc_ffn.fn attn.wq_a.weight attn.wq_b.weight attn.wkv.weight": Owner.MUON,
    "attn.wo_a.weight attn.wo_b.weight ffn.gate.weight": Owner.MUON,
    "ffn.experts.w1 ffn.experts.w2 ffn.experts.w3": Owner.MUON,
    "ffn.shared_experts.w1.weight ffn.shared_experts.w2.weight ffn.shared_experts.w3.weight": Owner.MUON,
}
COMPRESSOR_OWNERS = {"wkv.weight wgate.weight": Owner.MUON, "ape norm.weight": Owner.ADAMW}
OWN_NAMES = {
    "embed.weight head.weight": Owner.ADAMW_DECAYED,
    "norm.weight hc_head.base hc_head.scale": Owner.ADAMW,
    "hc_head.fn layers.1.attn.indexer.wq_b.weight layers.1.attn.indexer.weights_proj.weight": Owner.MUON,
    "mtp.0.e_proj.weight mtp.0.h_proj.weight mtp.0.hc_head.fn": Owner.MUON,
    "mtp.0.enorm.weight mtp.0.hnorm.weight mtp.0.norm.weight mtp.0.hc_head.base": Owner.ADAMW,
    "mtp.0.hc_head.scale": Owner.ADAMW,
    "layers.1.ffn.gate.bias layers.2.ffn.gate.bias mtp.0.ffn.gate.bias": Owner.RULE,
    "layers.0.ffn.gate.tid2eid": Owner.FROZEN,
}


def expected_owners():
    blocks = ("layers.0.", "layers.1.", "layers.2.", "mtp.0.")
    compressors = [f"layers.{part}compressor." for part in ("1.attn.", "1.attn.indexer.", "2.attn.")]
    tables = [("", OWN_NAMES), *((b, BLOCK_OWNERS) for b in blocks)]
    tables += [(c, COMPRESSOR_OWNERS) for c in compressors]
    return {prefix + n: owner for prefix, t in tables for names, owner in t.items() for n in names.split()}


def test_every_parameter_of_the_whole_model_has_the_owner_of_the_table():
    model, expected = whole_model(), expected_owners()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {name: owner_of(name) for name in tensors} == expected
    groups = parameter_groups(model)
    found = {p.name: Owner.MUON for p in groups.muon}
    for owner, names in (
        (Owner.ADAMW, groups.adamw),
        (Owner.ADAMW_DECAYED, groups.adamw_decayed),
        (Owner.RULE, groups.rule),
    ):
        found |= dict.fromkeys(names, owner)
    assert found | {"layers.0.ffn.gate.tid2eid": Owner.FROZEN} == expected and not groups.frozen
    given = parameter_groups(model, o_groups=CONFIG.o_groups)
    assert [p.row_blocks for p in groups.muon] == [p.row_blocks for p in given.muon]


def logical_matrices(name, tensor):
    """Section 12.2 by hand: what is orthogonalised on its own."""
    if name.endswith("attn.wo_a.weight"):
        return [*tensor.view(2, 4, 16)]  # a group reads 2 heads of 8 channels
    if name.startswith("layers.1.") and name.endswith(("compressor.wkv.weight", "compressor.wgate.weight")):
        return [*tensor.chunk(2)]  # CSA: previous window, current window
    if name.endswith(("hc_attn.fn", "hc_ffn.fn")):
        return [tensor[:4], tensor[4:8], tensor[8:]]  # pre, post, comb
    return [*tensor] if tensor.ndim == 3 else [tensor]  # an expert each


def test_every_logical_matrix_of_the_whole_model_moves_as_if_it_were_alone():
    """Against V4's Algorithm 1 on each in fp64; fp32 and 1e-3 of an update apart, where a wrong cut is ~1."""
    model = whole_model()
    optimizer = V4Optimizer(parameter_groups(model), lr=0.1, weight_decay=0.1)
    before = {p.name: (p.parameter.detach().clone(), p.parameter.grad.clone()) for p in optimizer.groups.muon}
    optimizer.step()
    counts = {}
    for name, (weight, gradient) in before.items():
        after = logical_matrices(name, model.get_parameter(name).detach())
        parts = list(zip(after, logical_matrices(name, weight), logical_matrices(name, gradient)))
        counts[name] = len(parts)
        for found, w, g in parts:
            nesterov = g.double() * 1.95  # momentum starts at G: G + 0.95 G
            update = newton_schulz(nesterov[None])[0] * 0.18 * max(w.shape) ** 0.5
            expected = w.double() * (1 - 0.1 * 0.1) - 0.1 * update
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-3 * 0.1 * 0.18, msg=name)
    assert counts["layers.0.attn.wo_a.weight"] == counts["mtp.0.attn.wo_a.weight"] == 2
    assert counts["layers.1.attn.indexer.compressor.wkv.weight"] == 2
    assert counts["layers.2.attn.compressor.wkv.weight"] == 1
    assert counts["mtp.0.hc_attn.fn"] == 3 and counts["mtp.0.ffn.experts.w3"] == 4
    assert counts["mtp.0.e_proj.weight"] == counts["hc_head.fn"] == 1


def test_the_rule_reaches_every_learned_router_and_no_hash_router():
    model = whole_model()
    names = {1: "layers.1.ffn.gate.bias", 2: "layers.2.ffn.gate.bias", 3: "mtp.0.ffn.gate.bias"}
    assert gate_bias_names(model) == names
    trace = Trace()
    ids = torch.randint(32, (2, 9))
    streams, layout = model.streams(ids, trace=trace)
    model.mtp_hidden(streams, ids, layout)
    assert {layer for layer, is_hash in trace.is_hash.items() if not is_hash} == set(names)
