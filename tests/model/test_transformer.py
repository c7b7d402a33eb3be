"""The whole model against a token-by-token fp64 twin, packed against alone, types and refusals.

Against transformers: test_parity.py.
"""

from dataclasses import replace

import pytest
import torch
from streaming_twin import Record, twin_index_loss, twin_logits, twin_weights

from consilience.conf.errors import EngineError
from consilience.model.forward_trace import Trace
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


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


@pytest.mark.parametrize("topk", [2, 5, 100])
def test_index_picks_losses_and_their_gradients_equal_the_twin_in_fp64(topk, smallest, rough_model):
    """Section 5.3 with the joint softmax; 100: no more entries than k, the loss is over all of them."""
    config = replace(smallest, index_topk=topk)
    model = rough_model(config, seed=topk, dtype=torch.float64)
    tokens = random_ids(config, 47)
    trace, record, w = Trace(wants_losses=True), Record(), twin_weights(model)
    found = model(tokens[None], trace=trace)[0]
    expected = twin_logits(model, tokens, w, record)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    dropped = [t // 4 - len(picks) for layer in (1, 3) for t, picks in enumerate(record.chosen[layer], 1)]
    assert trace.csa_dropped == sum(dropped) and (sum(dropped) > 0) == (topk < 11)
    losses = [twin_index_loss(record, layer) for layer in (1, 3)]
    for ours, theirs in zip(trace.indexer_loss, losses, strict=True):
        assert theirs > 0.01
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)
    (trace.indexer_loss[0] + 2 * trace.indexer_loss[1]).backward()
    (losses[0] + 2 * losses[1]).backward()
    inside = {n: p.grad for n, p in model.named_parameters() if ".indexer." in n}
    assert len(inside) == 2 * 6
    for name, grad in inside.items():
        assert (grad - w[name].grad).norm() <= 1e-9 * w[name].grad.norm() and grad.any(), name
    assert all(t.grad is None for n, t in w.items() if n not in inside and t.is_floating_point())


def test_the_variations_reach_every_mechanism(smallest, rough_model):
    trace = Trace()
    with torch.no_grad():
        rough_model(smallest)(random_ids(smallest, 1, 47), trace=trace)
    assert trace.hca_attended == sum((t + 1) // 12 for t in range(47))
    assert trace.csa_visible == 2 * sum((t + 1) // 4 for t in range(47))
    assert trace.csa_dropped == 2 * sum(max((t + 1) // 4 - 5, 0) for t in range(47))
    assert trace.stream_spread > 0.1 and trace.is_hash == {0: True, 1: False, 2: False, 3: False}
    assert all(int(load.sum()) == 47 * 2 for load in trace.expert_load.values())


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
    assert b.dtype == torch.float32
    # bf16 rounds by 2^-9 and some 40 roundings follow each other, in streams that mHC amplifies.
    assert (a - b).norm() < 0.1 * a.norm()
    narrow(tokens).square().mean().backward()
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
