"""The whole model against a token-by-token fp64 twin, against transformers, and packed against alone."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import softplus

from consilience.conf.errors import EngineError
from consilience.model.checkpoint import official_name, to_official
from consilience.model.forward_trace import Trace
from consilience.model.rope import inverse_frequencies
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


# ---- the twin: specification sections 2-9, streaming state, no masks, official tensor names ----


def normed(x, weight=None, eps=1e-6):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if weight is None else y * weight


def turned(x, position, frequencies, sign=1):
    """Interleaved pairs of the last channels, one complex number each. x [..., C] of one token."""
    width = 2 * len(frequencies)
    angle = torch.tensor(float(position)) * frequencies  # fp32 product
    unit = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)
    unit = unit if sign > 0 else unit.conj()
    tail = x[..., -width:]
    z = torch.complex(tail[..., 0::2], tail[..., 1::2]) * unit
    out = x.clone()
    out[..., -width::2], out[..., -width + 1 :: 2] = z.real, z.imag
    return out


class StreamingCompressor:
    """Section 8's update rule: slots, -inf where nothing was, pool when (pos + 1) mod m is 0."""

    def __init__(self, w, prefix, ratio, frequencies):
        self.w, self.prefix, self.m, self.frequencies = w, prefix, ratio, frequencies
        self.width = w[f"{prefix}.norm.weight"].shape[0]
        num_slots = 2 * ratio if ratio == 4 else ratio
        series = w[f"{prefix}.wkv.weight"].shape[0]
        self.u = torch.zeros(num_slots, series, dtype=torch.float64)
        self.z = torch.full((num_slots, series), float("-inf"), dtype=torch.float64)
        self.entries = []

    def feed(self, h, pos):
        slot = pos % self.m + (4 if self.m == 4 else 0)
        self.u[slot] = self.w[f"{self.prefix}.wkv.weight"] @ h
        self.z[slot] = self.w[f"{self.prefix}.wgate.weight"] @ h + self.w[f"{self.prefix}.ape"][pos % self.m]
        if (pos + 1) % self.m:
            return
        u, z = self.u, self.z
        if self.m == 4:
            c = self.width
            u = torch.cat((u[:4, :c], u[4:, c:]))
            z = torch.cat((z[:4, :c], z[4:, c:]))
        pooled = (torch.softmax(z, 0) * u).sum(0)
        entry = normed(pooled, self.w[f"{self.prefix}.norm.weight"])
        self.entries.append(turned(entry, pos + 1 - self.m, self.frequencies))
        if self.m == 4:
            self.u[:4], self.z[:4] = self.u[4:].clone(), self.z[4:].clone()


def twin_attention(c, w, layer, hidden):
    """hidden [T, D] -> [T, D], one token after the other."""
    p, ratio = f"layers.{layer}.attn", c.compress_ratios[layer]
    f = inverse_frequencies(c, is_compressed=ratio > 0)
    main = StreamingCompressor(w, f"{p}.compressor", ratio, f) if ratio else None
    index = StreamingCompressor(w, f"{p}.indexer.compressor", 4, f) if ratio == 4 else None
    window, outputs = [], []
    for t, h in enumerate(hidden):
        latent = normed(w[f"{p}.wq_a.weight"] @ h, w[f"{p}.q_norm.weight"])
        q = normed((w[f"{p}.wq_b.weight"] @ latent).view(c.num_attention_heads, c.head_dim))
        q = turned(q, t, f)
        kv = turned(normed(w[f"{p}.wkv.weight"] @ h, w[f"{p}.kv_norm.weight"]), t, f)
        window = [*window, kv][-c.sliding_window :]
        keys = list(window)
        if main is not None:
            main.feed(h, t)
            chosen = range(len(main.entries))
            if index is not None:
                index.feed(h, t)
                if len(index.entries) > c.index_topk:
                    iq = (w[f"{p}.indexer.wq_b.weight"] @ latent).view(c.index_n_heads, c.index_head_dim)
                    match = torch.relu(turned(iq, t, f) @ torch.stack(index.entries).T)
                    score = (w[f"{p}.indexer.weights_proj.weight"] @ h) @ match
                    chosen = sorted(chosen, key=lambda i: (-score[i].item(), i))[: c.index_topk]
            keys += [main.entries[i] for i in chosen]
        k = torch.stack(keys)
        exps = torch.exp(q @ k.T * c.head_dim**-0.5)
        total = exps.sum(1) + torch.exp(w[f"{p}.attn_sink"])
        o = turned(exps @ k / total[:, None], t, f, sign=-1)
        groups = o.reshape(c.o_groups, -1)
        wo_a = w[f"{p}.wo_a.weight"].view(c.o_groups, c.o_lora_rank, -1)
        low = torch.cat([a @ g for a, g in zip(wo_a, groups)])
        outputs.append(w[f"{p}.wo_b.weight"] @ low)
    return torch.stack(outputs)


def twin_expert(w, prefix, x, limit):
    gate, up = w[f"{prefix}.w1.weight"] @ x, w[f"{prefix}.w3.weight"] @ x
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return w[f"{prefix}.w2.weight"] @ (gate / (1 + torch.exp(-gate)) * up)


def twin_moe(c, w, layer, hidden, tokens):
    p, outputs = f"layers.{layer}.ffn", []
    for h, token in zip(hidden, tokens):
        s = softplus(w[f"{p}.gate.weight"] @ h).sqrt()
        if layer < c.num_hash_layers:
            chosen = w[f"{p}.gate.tid2eid"][token]
        else:
            chosen = (s + w[f"{p}.gate.bias"]).argsort(descending=True)[: c.num_experts_per_tok]
        weight = s[chosen] / s[chosen].sum() * c.routed_scaling_factor
        out = twin_expert(w, f"{p}.shared_experts", h, c.swiglu_limit)
        for e, share in zip(chosen.tolist(), weight):
            out = out + share * twin_expert(w, f"{p}.experts.{e}", h, c.swiglu_limit)
        outputs.append(out)
    return torch.stack(outputs)


def twin_connection(c, w, prefix, streams, layer):
    """X [T, N, D] -> X' by section 3, `layer` maps [T, D] to [T, D]."""
    n = c.hc_mult
    flat = streams.flatten(1)
    m = (flat @ w[f"{prefix}_fn"].T) / (flat.square().mean(1, keepdim=True) + c.rms_norm_eps).sqrt()
    scale, base = w[f"{prefix}_scale"], w[f"{prefix}_base"]
    pre = torch.sigmoid(scale[0] * m[:, :n] + base[:n]) + c.hc_eps
    post = 2 * torch.sigmoid(scale[1] * m[:, n : 2 * n] + base[n : 2 * n])
    comb = torch.softmax((scale[2] * m[:, 2 * n :] + base[2 * n :]).view(-1, n, n), -1) + c.hc_eps
    comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    for _ in range(c.hc_sinkhorn_iters - 1):
        comb = comb / (comb.sum(2, keepdim=True) + c.hc_eps)
        comb = comb / (comb.sum(1, keepdim=True) + c.hc_eps)
    out = layer(torch.einsum("tn,tnd->td", pre, streams))
    return post[:, :, None] * out[:, None] + torch.einsum("tjk,tjd->tkd", comb, streams)


def twin_logits(model, tokens):
    """Logits [T, V] fp64 of one sequence."""
    c = model.config
    w = {n: t.double() if t.is_floating_point() else t for n, t in to_official(model).items()}
    x = w["embed.weight"][tokens][:, None].expand(-1, c.hc_mult, -1)
    for i in range(c.num_hidden_layers):
        p = f"layers.{i}"
        attend = lambda y: twin_attention(c, w, i, normed(y, w[f"{p}.attn_norm.weight"]))  # noqa: B023
        x = twin_connection(c, w, f"{p}.hc_attn", x, attend)
        feed = lambda y: twin_moe(c, w, i, normed(y, w[f"{p}.ffn_norm.weight"]), tokens)  # noqa: B023
        x = twin_connection(c, w, f"{p}.hc_ffn", x, feed)
    flat = x.flatten(1)
    m = (flat @ w["hc_head_fn"].T) / (flat.square().mean(1, keepdim=True) + c.rms_norm_eps).sqrt()
    a = torch.sigmoid(w["hc_head_scale"] * m + w["hc_head_base"]) + c.hc_eps
    return normed(torch.einsum("tn,tnd->td", a, x), w["norm.weight"]) @ w["head.weight"].T


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


VARIATIONS = {
    "every kind": {},
    "no sliding-only layer, as in pro": {"compress_ratios": (12, 12, 4, 12), "num_hash_layers": 2},
    "released ratios": {"compress_ratios": (0, 128, 4, 128), "sliding_window": 16},
    "other widths": {
        "hidden_size": 36,
        "num_attention_heads": 6,
        "head_dim": 10,
        "qk_rope_head_dim": 10,
        "o_groups": 3,
        "index_head_dim": 10,
        "hc_mult": 3,
        "moe_intermediate_size": 18,
        "sliding_window": 1,
        "n_shared_experts": 2,
    },
    "experts clamped": {"swiglu_limit": 0.2, "num_experts_per_tok": 3, "rope_factor": 1.0},
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_equal_the_streaming_twin_in_fp64(name, smallest, rough_model):
    config = replace(smallest, **VARIATIONS[name])
    model = rough_model(config, seed=len(name), dtype=torch.float64)
    length = 265 if 128 in config.compress_ratios else 47
    tokens = random_ids(config, length)
    with torch.no_grad():
        found = model(tokens[None])[0]
        expected = twin_logits(model, tokens)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_variations_reach_every_mechanism(smallest, rough_model):
    trace = Trace()
    with torch.no_grad():
        rough_model(smallest)(random_ids(smallest, 1, 47), trace=trace)
    assert trace.hca_attended == sum((t + 1) // 12 for t in range(47))
    assert trace.csa_visible == 2 * sum((t + 1) // 4 for t in range(47))
    assert trace.csa_dropped == 2 * sum(max((t + 1) // 4 - 5, 0) for t in range(47))
    assert trace.stream_spread > 0.1 and trace.is_hash == {0: True, 1: False, 2: False, 3: False}
    assert all(int(load.sum()) == 47 * 2 for load in trace.expert_load.values())


# ---- transformers' deepseek_v4 ----

RENAMES = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight"),
    ("hc_head_", "model.hc_head.hc_"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attn.indexer.compressor.wkv", ".attn.compressor.indexer.kv_proj"),
    (".attn.indexer.compressor.wgate", ".attn.compressor.indexer.gate_proj"),
    (".attn.indexer.compressor.ape", ".attn.compressor.indexer.position_bias"),
    (".attn.indexer.compressor.norm", ".attn.compressor.indexer.kv_norm"),
    (".attn.indexer.wq_b", ".attn.compressor.indexer.q_b_proj"),
    (".attn.indexer.weights_proj", ".attn.compressor.indexer.scorer.weights_proj"),
    (".attn.compressor.wkv", ".attn.compressor.kv_proj"),
    (".attn.compressor.wgate", ".attn.compressor.gate_proj"),
    (".attn.compressor.ape", ".attn.compressor.position_bias"),
    (".attn.compressor.norm", ".attn.compressor.kv_norm"),
    (".attn.attn_sink", ".attn.sinks"),
    (".wq_a.", ".q_a_proj."),
    (".q_norm.", ".q_a_norm."),
    (".attn.wq_b.", ".attn.q_b_proj."),
    (".attn.wkv.", ".attn.kv_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".attn.", ".self_attn."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
    (".ffn.", ".mlp."),
]


def hf_name(name):
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def hf_twin(model):
    """transformers' DeepseekV4ForCausalLM with the same weights (its experts are stacked, w1 above w3)."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    c = model.config
    same = [
        "vocab_size",
        "hidden_size",
        "moe_intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "head_dim",
        "q_lora_rank",
        "num_experts_per_tok",
        "n_routed_experts",
        "n_shared_experts",
        "routed_scaling_factor",
        "rope_theta",
        "compress_rope_theta",
        "hc_mult",
        "hc_sinkhorn_iters",
        "hc_eps",
        "swiglu_limit",
        "sliding_window",
        "o_groups",
        "o_lora_rank",
        "index_n_heads",
        "index_head_dim",
        "index_topk",
        "rms_norm_eps",
        "qk_rope_head_dim",
        "num_hash_layers",
        "max_position_embeddings",
    ]
    kinds = {0: "sliding_attention", 4: "compressed_sparse_attention"}
    hca = max([r for r in c.compress_ratios if r not in kinds], default=128)
    yarn = {
        "rope_type": "yarn",
        "factor": c.rope_factor,
        "original_max_position_embeddings": c.rope_original_length,
        "beta_fast": c.rope_beta_fast,
        "beta_slow": c.rope_beta_slow,
    }
    config = DeepseekV4Config(
        **{name: getattr(c, name) for name in same},
        layer_types=[kinds.get(r, "heavily_compressed_attention") for r in c.compress_ratios],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": hca},
        rope_parameters=yarn,
        attn_implementation="eager",
    )
    twin = DeepseekV4ForCausalLM(config)
    state = {}
    for name, tensor in model.state_dict().items():
        if ".experts.w" not in name:
            state[hf_name(official_name(name))] = tensor
    for layer, block in enumerate(model.layers):
        e = block.ffn.experts
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat((e.w1, e.w3), 1).detach()
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = e.w2.detach()
    twin.load_state_dict(state, strict=True)
    return twin.eval()


@pytest.mark.parametrize("name", ["every kind", "released ratios", "no sliding-only layer, as in pro"])
def test_logits_and_gradients_equal_transformers(name, smallest, rough_model):
    config = replace(smallest, index_n_heads=24, **VARIATIONS[name])
    model = rough_model(config, seed=3)
    twin = hf_twin(model)
    length = 265 if 128 in config.compress_ratios else 47
    tokens = random_ids(config, 2, length)
    weight = torch.randn(2, length, config.vocab_size, generator=torch.Generator().manual_seed(1))
    ours, theirs = model(tokens), twin(tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    expected = {n: p.grad for n, p in twin.named_parameters()}
    compared = 0
    for n, p in model.named_parameters():
        if ".experts." in n:
            stem, leaf = f"model.{n.replace('.ffn.', '.mlp.')}".rsplit(".", 1)
            both = expected[f"{stem}.gate_up_proj"].chunk(2, dim=1)
            want = {"w1": both[0], "w3": both[1], "w2": expected[f"{stem}.down_proj"]}[leaf]
        else:
            want = expected.get(hf_name(official_name(n)))
        if want is None:
            assert p.grad is None, n
            continue
        assert (p.grad - want).norm() <= 1e-4 * want.norm() + 1e-7, n
        compared += 1
    assert compared > 80


# ---- packed rows, types, refusals ----


def samples_of(config, lengths, seed=5):
    return [random_ids(config, n, seed=seed + i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("rows", "row_tokens"),
    [
        ([[13, 24], [5, 1, 20], [36]], 41),  # one row longer than the window, not a multiple of it
        ([[2, 3], [4]], 5),  # shorter than the window
        ([[30, 6], [24, 12], []], 36),  # a multiple of the window; one row is padding only
    ],
)
def test_packed_rows_equal_samples_run_one_by_one_forward_and_gradients(
    rows, row_tokens, smallest, rough_model
):
    model = rough_model(smallest, dtype=torch.float64)
    ids = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    segments = torch.full((len(rows), row_tokens), -1, dtype=torch.int32)
    positions = torch.zeros(len(rows), row_tokens, dtype=torch.long)
    places, alone = [], samples_of(smallest, [n for row in rows for n in row])
    for b, row in enumerate(rows):
        start = 0
        for number, n in enumerate(row):
            span = slice(start, start + n)
            ids[b, span], segments[b, span] = alone[len(places)], number + 3
            positions[b, span] = torch.arange(n)
            places.append((b, span))
            start += n
    weights = [torch.randn(n, smallest.vocab_size, dtype=torch.float64) for row in rows for n in row]
    logits = model(ids, segments, position_ids=positions)
    assert torch.equal(logits[segments >= 0], model(ids, segments)[segments >= 0])  # positions follow
    packed = torch.stack([(logits[b, span] * w).sum() for (b, span), w in zip(places, weights)])
    found = torch.autograd.grad(
        packed.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    total = torch.zeros((), dtype=torch.float64)
    for (b, span), tokens, w in zip(places, alone, weights):
        single = model(tokens[None])[0]
        torch.testing.assert_close(logits[b, span], single, rtol=0, atol=1e-11)
        total = total + (single * w).sum()
    expected = torch.autograd.grad(
        total, [p for p in model.parameters() if p.requires_grad], allow_unused=True
    )
    for ours, theirs in zip(found, expected):
        zero = torch.zeros(())
        ours, theirs = zero if ours is None else ours, zero if theirs is None else theirs
        assert (ours - theirs).norm() <= 1e-10 * (1 + theirs.norm())
    assert not logits[segments < 0].isnan().any()


def test_auxiliary_losses_do_not_see_padding(smallest, rough_model):
    model = rough_model(smallest, dtype=torch.float64)
    tokens = random_ids(smallest, 1, 40)
    traces = [Trace(wants_losses=True), Trace(wants_losses=True)]
    model(tokens, trace=traces[0])
    padded = torch.nn.functional.pad(tokens, (0, 9))
    segments = torch.nn.functional.pad(torch.zeros_like(tokens), (0, 9), value=-1)
    model(padded, segments, trace=traces[1])
    assert len(traces[0].balance_loss) == 3 and len(traces[0].indexer_loss) == 2
    for name in ("balance_loss", "indexer_loss"):
        for a, b in zip(getattr(traces[0], name), getattr(traces[1], name)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert (traces[0].csa_visible, traces[0].csa_dropped, traces[0].hca_attended) == (
        traces[1].csa_visible,
        traces[1].csa_dropped,
        traces[1].hca_attended,
    )
    assert all(torch.equal(traces[0].expert_load[i], traces[1].expert_load[i]) for i in range(4))


def test_a_trace_with_losses_changes_no_logit(smallest, rough_model):
    model = rough_model(smallest)
    tokens = random_ids(smallest, 2, 40)
    assert torch.equal(model(tokens), model(tokens, trace=Trace(wants_losses=True)))


def test_bf16_weights_keep_the_fp32_parts_and_stay_near_fp32(smallest, rough_model):
    # Hash routing but for the last layer, every entry attended: little is chosen, so little can flip.
    config = replace(smallest, num_hash_layers=3, index_topk=100)
    exact = rough_model(config)
    narrow = Transformer(config, torch.bfloat16)
    narrow.load_state_dict(exact.state_dict())
    fp32 = {n.rsplit(".", 1)[-1] for n, p in narrow.named_parameters() if p.dtype == torch.float32}
    assert fp32 == {"fn", "base", "scale", "attn_sink", "ape", "bias"}
    tokens = random_ids(smallest, 2, 40)
    with torch.no_grad():
        a, b = exact(tokens), narrow(tokens)
    assert b.dtype == torch.bfloat16
    # bf16 rounds by 2^-9 and some 40 roundings follow each other, in streams that mHC amplifies.
    assert (a - b.float()).norm() < 0.1 * a.norm()
    narrow(tokens).float().square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in narrow.parameters())


def test_two_runs_are_bit_equal(smallest, rough_model):
    model = rough_model(smallest)
    tokens = random_ids(smallest, 2, 40)
    runs = []
    for _ in range(2):
        model.zero_grad()
        logits = model(tokens)
        logits.square().sum().backward()
        runs.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_a_state_that_is_too_short_is_refused_before_it_changes(smallest, rough_model):
    model = rough_model(smallest)
    state = DecodeState.allocate(smallest, 2, 10)
    with torch.no_grad():
        model(random_ids(smallest, 2, 8), state=state)
        before = [t.clone() for t in state.tensors()]
        with pytest.raises(EngineError, match="holds 12 tokens, a row would reach 13; raise"):
            model(random_ids(smallest, 2, 5), state=state)
        with pytest.raises(EngineError, match="would reach 14"):
            model(random_ids(smallest, 2, 9), state=state, lengths=torch.tensor([1, 6]))
    assert all(torch.equal(a, b) for a, b in zip(before, state.tensors()))
