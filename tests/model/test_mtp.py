"""The prediction block against a token-by-token fp64 twin: training, decoding, packing, names."""

from dataclasses import replace

import pytest
import torch
from streaming_twin import normed, twin_block, twin_collapse, twin_streams, twin_weights

from consilience.model.checkpoint import to_official
from consilience.model.forward_trace import Trace
from consilience.model.layout import chunk_layout
from consilience.model.mtp import MTPBlock
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

LENGTH = 41  # several windows of 6, CSA and HCA blocks of 4 and 12


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def with_blocks(smallest):
    """with_blocks(ratio, …): the smallest config with one prediction block for each ratio."""

    def build(*ratios, **changes):
        return replace(smallest, num_nextn_predict_layers=len(ratios), mtp_compress_ratios=ratios, **changes)

    return build


@pytest.fixture
def model(with_blocks, rough_model):
    """fp64, one block with a sliding window, as released."""
    return rough_model(with_blocks(0), dtype=torch.float64)


def twin_mtp(model, tokens, w):
    """Hidden states [T - 1 - i, D] of each block i over one sequence, from section 10's equations.

    The last i + 1 tokens of the sequence have no token i + 1 places on, and no hidden state.
    """
    c = model.config
    # The twin's blocks are called layers.N: the prediction blocks follow the trunk's.
    own = replace(
        c,
        num_hidden_layers=c.num_hidden_layers + c.num_nextn_predict_layers,
        compress_ratios=(*c.compress_ratios, *c.mtp_compress_ratios),
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
    )
    x, hidden = twin_streams(model, tokens, w), []
    for depth in range(c.num_nextn_predict_layers):
        p, layer = f"mtp.{depth}", c.num_hidden_layers + depth
        ids = tokens[depth + 1 :]
        streams = normed(x[: len(ids)], w[f"{p}.hnorm.weight"]) @ w[f"{p}.h_proj.weight"].T
        embedding = normed(w["embed.weight"][ids], w[f"{p}.enorm.weight"]) @ w[f"{p}.e_proj.weight"].T
        renamed = {n.replace(p, f"layers.{layer}", 1): t for n, t in w.items() if n.startswith(f"{p}.")}
        x = twin_block(own, w | renamed, layer, streams + embedding[:, None], ids)
        hidden.append(twin_collapse(c, w, x, f"{p}."))
    return hidden


def next_ids_of(tokens):
    """[B, T] the token after each; the last has none, and whatever stands there must not matter."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=3)


def test_the_join_by_hand_and_a_block_that_does_nothing(model):
    """A block whose layers put out 0 mixes streams by doubly stochastic matrices: their sum stays."""
    w, block = to_official(model), model.mtp[0]
    for name in ("attn.wo_b.weight", "ffn.experts.w2", "ffn.shared_experts.w2.weight"):
        torch.nn.init.zeros_(block.get_parameter(name))
    tokens = torch.tensor([[5, 9]])
    streams, layout = model.streams(tokens)
    x, e = streams[0], w["embed.weight"][9]
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * w["mtp.0.hnorm.weight"]
    e = e / (e.square().mean() + 1e-6).sqrt() * w["mtp.0.enorm.weight"]
    joined = x @ w["mtp.0.h_proj.weight"].T + w["mtp.0.e_proj.weight"] @ e
    found, after = block.predict(streams, model.embed(tokens[0].roll(-1)), tokens[0].roll(-1), layout, None)
    # Row sums of comb are 1 up to hc_eps and what 20 Sinkhorn rounds leave; two such steps a block.
    torch.testing.assert_close(after[0].sum(0), joined.sum(0), rtol=0, atol=1e-4)
    assert torch.equal(found, block.norm(block.hc_head(after)))


@pytest.mark.parametrize("ratios", [(0,), (4,), (12, 0)])
def test_hidden_states_equal_the_streaming_twin_in_fp64(ratios, with_blocks, rough_model):
    model = rough_model(with_blocks(*ratios), dtype=torch.float64)
    tokens = random_ids(model.config, LENGTH)
    with torch.no_grad():
        streams, layout = model.streams(tokens[None])
        found = model.mtp_hidden(streams, next_ids_of(tokens[None]), layout)
        expected = twin_mtp(model, tokens, twin_weights(model))
    assert len(found) == len(expected) == len(ratios)
    for depth, (ours, theirs) in enumerate(zip(found, expected)):
        assert ours.dtype == torch.float64 and len(theirs) == LENGTH - 1 - depth
        torch.testing.assert_close(ours[0, : len(theirs)], theirs, rtol=0, atol=1e-10)


def losses(hidden, head, seed=3):
    """A sum of logits with random weights: every parameter gets a gradient of its own."""
    g = torch.Generator().manual_seed(seed)
    return sum((torch.randn(h.shape[0], head.shape[0], generator=g) * (h @ head.T)).sum() for h in hidden)


def test_gradients_of_block_trunk_embedding_and_head_equal_the_twin_s(with_blocks, rough_model):
    model = rough_model(with_blocks(0, 0), dtype=torch.float64)
    tokens = random_ids(model.config, LENGTH)
    streams, layout = model.streams(tokens[None])
    hidden = model.mtp_hidden(streams, next_ids_of(tokens[None]), layout)
    losses([h[0, : LENGTH - 1 - i] for i, h in enumerate(hidden)], model.head.weight).backward()
    w = twin_weights(model)
    losses(twin_mtp(model, tokens, w), w["head.weight"]).backward()
    with torch.no_grad():
        for parameter in model.parameters():  # each parameter becomes its gradient, under its official name
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    expected = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in w.items()}
    ours = {n: t for n, t in to_official(model).items() if t.is_floating_point()}
    for name, gradient in ours.items():
        assert (gradient - expected[name]).norm() <= 1e-9 * expected[name].norm(), name
    # The trunk's own collapse and norm lie behind the streams, the indexer learns from its own loss only,
    # router biases by rule, and some experts were visited by nobody.
    idle = {n for n, gradient in ours.items() if not gradient.any()}
    excused = (".indexer.", "gate.bias", ".experts.")
    assert {n for n in idle if not any(part in n for part in excused)} == {
        "norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale"
    }  # fmt: skip
    assert len([n for n in idle if ".experts." in n]) < 0.2 * len([n for n in ours if ".experts." in n])


def test_detached_only_the_blocks_learn(model):
    tokens = random_ids(model.config, 1, LENGTH)
    streams, layout = model.streams(tokens)
    (hidden,) = model.mtp_hidden(streams, next_ids_of(tokens), layout, is_detached=True)
    assert torch.equal(hidden, model.mtp_hidden(streams, next_ids_of(tokens), layout)[0])
    losses([hidden[0]], model.head.weight.detach()).backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None}
    assert moved == {n for n, p in model.named_parameters() if n.startswith("mtp.") and p.requires_grad}


# ---- decoding on a state of its own ----


def chunks(model, streams, next_ids, state, pieces):
    """Feed each row its pieces [(lengths …), …], right-padded with junk; hidden states [B, T, D]."""
    block, config = model.mtp[0], model.config.mtp_config()
    found = torch.full((*next_ids.shape, config.hidden_size), float("nan"), dtype=streams.dtype)
    x = streams.view(*next_ids.shape, config.hc_mult, -1)
    for lengths in pieces:
        lengths = torch.tensor(lengths)
        widest = max(int(lengths.max()), 1)
        place = state.position[:, None] + torch.arange(widest)
        rows = torch.arange(len(place))[:, None]
        place = place.clamp(max=next_ids.shape[1] - 1)
        ids = next_ids[rows, place].flatten()
        is_uniform = bool((lengths == widest).all())
        layout = chunk_layout(config, state, widest, None if is_uniform else lengths, None)
        hidden, _ = block.predict(
            x[rows, place].flatten(0, 1), model.embed(ids), ids, layout, state.layers[0]
        )
        for b, n in enumerate(lengths.tolist()):
            found[b, place[b, :n]] = hidden.view(len(place), widest, -1)[b, :n]
        state.position += lengths
    return found


@pytest.mark.parametrize("ratio", [0, 4, 12])
@pytest.mark.parametrize(
    "pieces",
    [
        [(1,) * 3] * 40,
        [(40,) * 3],
        [(13,) * 3, (1,) * 3, (2,) * 3, (24,) * 3],
        [(5, 17, 0), (1, 2, 1), (2, 1, 2), (1, 1, 1), (31, 19, 36)],
    ],
)
def test_chunks_on_its_own_state_equal_the_full_forward(ratio, pieces, with_blocks, rough_model):
    model = rough_model(with_blocks(ratio, hc_sinkhorn_iters=3), dtype=torch.float64).requires_grad_(False)
    tokens = random_ids(model.config, 3, LENGTH)
    streams, layout = model.streams(tokens)
    full = model.mtp_hidden(streams, next_ids_of(tokens), layout)[0]
    state = DecodeState.allocate(model.config.mtp_config(), 3, LENGTH, dtype=torch.float64)
    assert len(state.layers) == 1
    found = chunks(model, streams, next_ids_of(tokens), state, pieces)
    torch.testing.assert_close(found[:, :40], full[:, :40], rtol=0, atol=1e-11)


# ---- packed rows ----


def test_packed_rows_equal_samples_alone(with_blocks, rough_model):
    model = rough_model(with_blocks(4, 0), dtype=torch.float64).requires_grad_(False)
    lengths = [[13, 24, 2], [5, 1, 20]]
    ids = torch.zeros(2, 41, dtype=torch.long)
    segments = torch.full((2, 41), -1)
    spans = []
    for b, row in enumerate(lengths):
        start = 0
        for n in row:
            segments[b, start : start + n] = len(spans)
            ids[b, start : start + n] = random_ids(model.config, n, seed=len(spans))
            spans.append((b, start, n))
            start += n
    next_ids = torch.where((segments[:, 1:] == segments[:, :-1]), ids[:, 1:], 0)
    next_ids = torch.nn.functional.pad(next_ids, (0, 1))
    traces = [Trace(), Trace()]
    streams, layout = model.streams(ids, segments, trace=traces[0])
    packed = model.mtp_hidden(streams, next_ids, layout)
    for b, start, n in spans:
        alone, own = model.streams(ids[b : b + 1, start : start + n], trace=traces[1])
        singles = model.mtp_hidden(alone, next_ids_of(ids[b : b + 1, start : start + n]), own)
        for depth, (row, single) in enumerate(zip(packed, singles)):
            # The last tokens of a sample have no successor: what stands there is nobody's.
            count = max(n - 1 - depth, 0)
            found = row[b, start : start + count]
            torch.testing.assert_close(found, single[0, :count], rtol=0, atol=1e-11)
    loads = [{layer: load.tolist() for layer, load in t.expert_load.items()} for t in traces]
    assert loads[0] == loads[1]
    # Routers of the blocks are numbered on after the trunk's, and count the tokens that have successors.
    topk = model.config.num_experts_per_tok
    assert [sum(loads[0][i]) for i in range(6)] == [65 * topk] * 4 + [(65 - 6) * topk, (65 - 11) * topk]


# ---- names ----


def test_official_names_and_types_are_those_of_the_released_checkpoint(with_blocks):
    c = with_blocks(0)
    model = Transformer(c, torch.bfloat16)
    own = {n.removeprefix("mtp.0."): t for n, t in to_official(model).items() if n.startswith("mtp.0.")}
    block = {
        n.removeprefix("layers.0."): t
        for n, t in to_official(model).items()
        if n.startswith("layers.0.") and not n.endswith("tid2eid")
    }
    extra = {
        "e_proj.weight": (c.hidden_size, c.hidden_size),
        "h_proj.weight": (c.hidden_size, c.hidden_size),
        "enorm.weight": (c.hidden_size,),
        "hnorm.weight": (c.hidden_size,),
        "norm.weight": (c.hidden_size,),
        "hc_head_fn": (c.hc_mult, c.hc_mult * c.hidden_size),
        "hc_head_base": (c.hc_mult,),
        "hc_head_scale": (1,),
        "ffn.gate.bias": (c.n_routed_experts,),  # its router is learned, whatever the first layers' are
    }
    assert own.keys() == block.keys() | extra.keys()
    assert {n: tuple(own[n].shape) for n in extra} == extra
    assert isinstance(model.mtp[0], MTPBlock) and not model.mtp[0].ffn.gate.is_hash
    assert {n for n in extra if own[n].dtype == torch.float32} == {
        "hc_head_fn", "hc_head_base", "hc_head_scale", "ffn.gate.bias"
    }  # fmt: skip
