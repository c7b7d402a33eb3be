"""Official names, both ways, and a load that changes nothing unless everything fits."""

from dataclasses import replace

import pytest
import torch

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import load_official, official_name, to_official
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

MHC = {"fn": (8, 12), "base": (8,), "scale": (3,)}
ATTENTION = {
    "attn_sink": (2,),
    "wq_a.weight": (5, 6),
    "q_norm.weight": (5,),
    "wq_b.weight": (16, 5),
    "wkv.weight": (8, 6),
    "kv_norm.weight": (8,),
    "wo_a.weight": (6, 8),
    "wo_b.weight": (6, 6),
}
CSA = {
    "compressor.wkv.weight": (16, 6),
    "compressor.wgate.weight": (16, 6),
    "compressor.ape": (4, 16),
    "compressor.norm.weight": (8,),
    "indexer.wq_b.weight": (18, 5),
    "indexer.weights_proj.weight": (3, 6),
    "indexer.compressor.wkv.weight": (12, 6),
    "indexer.compressor.wgate.weight": (12, 6),
    "indexer.compressor.ape": (4, 12),
    "indexer.compressor.norm.weight": (6,),
}
HCA = {
    "compressor.wkv.weight": (8, 6),
    "compressor.wgate.weight": (8, 6),
    "compressor.ape": (7, 8),
    "compressor.norm.weight": (8,),
}


def config(smallest):
    return replace(
        smallest, vocab_size=11, hidden_size=6, num_hidden_layers=3, compress_ratios=(0, 4, 7), head_dim=8,
        qk_rope_head_dim=4, num_attention_heads=2, o_groups=2, o_lora_rank=3, q_lora_rank=5, index_n_heads=3,
        index_head_dim=6, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=4, hc_mult=2,
    )  # fmt: skip


def expected_layout():
    """Section 11.1 for that model: name -> shape."""
    names = {"embed.weight": (11, 6), "head.weight": (11, 6), "norm.weight": (6,)}
    names |= {"hc_head_fn": (2, 12), "hc_head_base": (2,), "hc_head_scale": (1,)}
    for layer, extra in enumerate(({}, CSA, HCA)):
        p = f"layers.{layer}"
        names |= {f"{p}.attn_norm.weight": (6,), f"{p}.ffn_norm.weight": (6,)}
        names |= {f"{p}.hc_{where}_{leaf}": shape for where in ("attn", "ffn") for leaf, shape in MHC.items()}
        names |= {f"{p}.attn.{name}": shape for name, shape in (ATTENTION | extra).items()}
        names |= {f"{p}.ffn.gate.weight": (2, 6)}
        names |= {f"{p}.ffn.gate.tid2eid": (11, 1)} if layer == 0 else {f"{p}.ffn.gate.bias": (2,)}
        for expert in ("experts.0", "experts.1", "shared_experts"):
            names |= {f"{p}.ffn.{expert}.{w}.weight": (4, 6) for w in ("w1", "w3")}
            names |= {f"{p}.ffn.{expert}.w2.weight": (6, 4)}
    return names


def test_names_and_shapes_are_the_released_ones(smallest):
    tensors = to_official(Transformer(config(smallest)))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected_layout()
    assert tensors["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    assert not any(t.requires_grad for t in tensors.values())


def test_official_name_touches_hyper_connections_only():
    assert official_name("layers.3.hc_attn.fn") == "layers.3.hc_attn_fn"
    assert official_name("hc_head.scale") == "hc_head_scale"
    assert official_name("layers.3.attn.wq_a.weight") == "layers.3.attn.wq_a.weight"


def test_round_trip_gives_the_same_model(smallest, rough_model):
    source, target = rough_model(smallest, seed=1), initialize(Transformer(smallest), 2)
    tensors = {name: t.clone() for name, t in to_official(source).items()}
    load_official(target, tensors)
    a, b = source.state_dict(), target.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    tokens = torch.randint(smallest.vocab_size, (1, 20))
    assert torch.equal(source(tokens), target(tokens))


def test_expert_tensors_share_memory_with_the_stack(smallest):
    model = initialize(Transformer(config(smallest)), 0)
    tensors = to_official(model)
    tensors["layers.1.ffn.experts.1.w3.weight"].fill_(7.0)
    assert (model.layers[1].ffn.experts.w3[1] == 7).all() and not (
        model.layers[1].ffn.experts.w3[0] == 7
    ).any()


def test_loading_keeps_requires_grad_and_converts_the_type(smallest):
    model = initialize(Transformer(config(smallest)), 0)
    load_official(
        model, {n: t.double() if t.is_floating_point() else t for n, t in to_official(model).items()}
    )
    assert model.head.weight.requires_grad and model.head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop("layers.1.attn.indexer.compressor.ape"),
            "misses layers.1.attn.indexer.compressor.ape",
        ),
        (
            lambda t: t.pop("layers.2.ffn.experts.1.w2.weight"),
            r"misses layers.2.ffn.experts.1.w2.weight \(1 m",
        ),
        (lambda t: t.update({"model.norm.weight": torch.ones(6)}), "unexpected model.norm.weight"),
        (
            lambda t: t.update({"norm.weight": torch.ones(7)}),
            r"norm.weight: found shape \(7,\), expected \(6,\)",
        ),
        (lambda t: t.update({"head.weight": t["head.weight"].T}), "head.weight: found shape"),
        (
            lambda t: t.update({"layers.0.ffn.gate.tid2eid": t["layers.0.ffn.gate.tid2eid"] + 2}),
            "tid2eid.*expert",
        ),
        (
            lambda t: t.update({"layers.0.ffn.gate.tid2eid": t["layers.0.ffn.gate.tid2eid"] - 5}),
            "tid2eid.*expert",
        ),
    ],
)
def test_an_error_names_the_tensor_and_nothing_has_changed(damage, message, smallest):
    model, other = (initialize(Transformer(config(smallest)), seed) for seed in (0, 1))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    tensors = {n: t.clone() for n, t in to_official(other).items()}
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        load_official(model, tensors)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
