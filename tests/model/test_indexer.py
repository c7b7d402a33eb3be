"""Scores, the picks with their ties, and a loss that reaches the indexer alone."""

from dataclasses import replace

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.forward_trace import Trace
from consilience.model.indexer import Indexer, IndexQueries, divergence, index_loss
from consilience.model.kernels.attention_keys import Keys
from consilience.model.layout import chunk_layout, packed_layout
from consilience.model.quantization import fake_fp4, index_values
from consilience.model.rope import inverse_frequencies, rotate, rotations
from consilience.model.state import DecodeState

torch.set_num_threads(1)


def packed(config, length=50):
    """A row of one sample, a row of two with padding behind: 50 tokens each, 12 and 6 + 5 entries."""
    second = length - 27
    position = torch.stack((torch.arange(length), torch.tensor([*range(24), *range(second), 0, 0, 0])))
    segment = torch.tensor([[0] * length, [0] * 24 + [1] * second + [-1] * 3])
    return packed_layout(config, segment, position, None)


def continued(config, length=50):
    state = DecodeState.allocate(config, 3, length)
    state.position[:] = torch.tensor([length - 9, 17, length - 3])  # the last row's padding reaches too far
    return chunk_layout(config, state, 9, torch.tensor([9, 7, 0]), None)


def draw_index(layout, heads=3, width=4, seed=0, dtype=torch.float64):
    """Index queries of small integers: many scores are equal to the last bit, and all sums are exact."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(-1, 2, shape, generator=g).to(dtype)
    rows, length = layout.position.shape
    keys = draw(rows, layout.windows[4].num_columns, width)
    return IndexQueries(draw(rows, length, heads, width), draw(rows, length, heads), keys)


def brute_force_picks(index, windows, topk):
    """One query at a time: the visible columns by falling score, then rising index; the first `topk`."""
    rows, length = windows.stop.shape
    picks = torch.full((rows, length, topk), -1)
    for b in range(rows):
        match = torch.einsum("thc,mc->thm", index.query[b], index.keys[b]).relu()
        scores = torch.einsum("thm,th->tm", match, index.weight[b])
        for t in range(length):
            columns = range(int(windows.first[b, t]), min(int(windows.stop[b, t]), windows.num_columns))
            best = sorted(sorted(columns, key=lambda i: (-scores[t, i].item(), i))[:topk])
            picks[b, t, : len(best)] = torch.tensor(best, dtype=torch.long)
    return picks


@pytest.mark.parametrize("where", [packed, continued])
@pytest.mark.parametrize("topk", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_picks_equal_those_by_brute_force_whatever_the_buffer(where, topk, dtype, smallest):
    config = replace(smallest, index_topk=topk)
    module, layout = Indexer(config, None), where(config)
    index = draw_index(layout, dtype=dtype)
    expected = brute_force_picks(index, layout.windows[4], topk)
    assert torch.equal(module.pick(index, layout), expected)
    for buffer in (1, 500):
        assert torch.equal(module.pick(index, layout, buffer), expected)
    with exact_mode():
        assert torch.equal(module.pick(index, layout), expected)
    assert (expected >= 0).any() and ((expected < 0).any() or topk < 9)


def test_nothing_is_picked_where_every_visible_entry_is_attended_to(smallest):
    layout = packed(smallest)
    index = draw_index(layout)
    assert Indexer(replace(smallest, index_topk=12), None).pick(index, layout) is None
    module = Indexer(replace(smallest, index_topk=11), None)
    assert module.pick(index, layout) is not None
    module.sees_all = True
    assert module.pick(index, layout) is None


def test_scores_are_the_weighted_sum_of_rectified_matches(smallest):
    module = Indexer(smallest, torch.float64).double()
    frequencies = inverse_frequencies(smallest, is_compressed=True)
    layout = packed_layout(smallest, torch.zeros(1, 12, dtype=torch.long), torch.arange(12)[None], None)
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    hidden, latent, keys = draw(1, 12, 24), draw(1, 12, 20), draw(1, 3, 12)
    with torch.no_grad():
        index = module.queries(hidden, latent, keys, layout)
        expected = torch.empty(12, 3, dtype=torch.float64)
        for t in range(12):
            q = (module.wq_b.weight @ latent[0, t]).view(6, 12)
            q = rotate(q, rotations(torch.tensor(t), frequencies))
            w = module.weights_proj.weight @ hidden[0, t]
            for i in range(3):
                matches = (w[h] * max(float(q[h] @ keys[0, i]), 0.0) for h in range(6))
                expected[t, i] = sum(matches) * 6**-0.5 * 12**-0.5
        torch.testing.assert_close(index.scores(0, 12, 3)[0], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(index.scores(5, 9, 2)[0], expected[5:9, :2], rtol=0, atol=1e-12)
        picks = torch.tensor([2, 0, -1]).expand(1, 4, 3)
        found = index.scores_of(5, 9, picks)[0, :, :2]
        torch.testing.assert_close(found, expected[5:9, [2, 0]], rtol=0, atol=1e-12)


def test_in_bf16_the_head_weights_are_scaled_and_summed_in_fp32(smallest):
    g = torch.Generator().manual_seed(2)
    module = Indexer(smallest, torch.bfloat16)
    layout = packed_layout(smallest, torch.zeros(1, 12, dtype=torch.long), torch.arange(12)[None], None)
    draw = lambda *shape: torch.randn(*shape, generator=g).bfloat16()
    hidden, latent, keys = draw(1, 12, 24), draw(1, 12, 20), draw(1, 3, 12)
    with torch.no_grad():
        index = module.queries(hidden, latent, keys, layout)
        projected = module.weights_proj(hidden)
        assert index.query.dtype == projected.dtype == torch.bfloat16 and index.weight.dtype == torch.float32
        assert torch.equal(index.weight, projected.float() * (6**-0.5 * 12**-0.5))
        match = torch.einsum("thc,mc->thm", index.query[0].double(), keys[0].double()).relu()
        expected = torch.einsum("thm,th->tm", match, index.weight[0].double())
        # Sums of 12, then of 6 products: 20 roundings of 2^-24 of what is summed, here below 10.
        torch.testing.assert_close(
            index.scores(0, 12, 3)[0].double(), expected, rtol=0, atol=20 * 2**-24 * 10
        )


def test_cut_scores_lose_few_picks_and_hadamard_saves_those_that_fp4_loses_to_outlier_channels(smallest):
    """Width 128 and blocks of 32 as released, the 64 best of up to 256 random entries."""
    config = replace(smallest, index_n_heads=16, index_head_dim=128, index_topk=64)
    module, num_tokens = Indexer(config, None), 1024
    position = torch.arange(num_tokens)[None]
    layout = packed_layout(config, torch.zeros_like(position), position, None)
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(1, *shape, generator=g)
    plain = IndexQueries(draw(num_tokens, 16, 128), draw(num_tokens, 16), draw(num_tokens // 4, 128))
    picks = module.pick(plain, layout)
    has_choice = (position[0] + 1) // 4 > 64

    def recall(index):
        again = module.pick(index, layout)
        same = [torch.isin(a, b).sum() for a, b in zip(picks[0][has_choice], again[0][has_choice])]
        return float(torch.stack(same).sum()) / (len(same) * 64)

    both = lambda change, index=plain: replace(index, query=change(index.query), keys=change(index.keys))
    assert 0.99 <= recall(replace(plain, is_cut=True)) < 1
    # Chance: 64 of 65 to 256 entries, about a half of them.
    fp4, turned = recall(both(fake_fp4)), recall(both(index_values))
    assert min(fp4, turned) > 0.85 and abs(fp4 - turned) < 0.01  # nothing sticks out, nothing to spread
    factor = torch.ones(128)
    factor[[3, 40, 77, 120]] = 16.0
    spread = replace(plain, query=plain.query / factor, keys=plain.keys * factor)
    assert recall(spread) > 0.9999  # the same scores: factors are powers of two
    fp4, turned = recall(both(fake_fp4, spread)), recall(both(index_values, spread))
    assert turned > fp4 + 0.03, (fp4, turned)


def parts(model):
    """Gradient of each parameter, by whether it belongs to an indexer."""
    named = list(model.named_parameters())
    return (
        {n: p.grad for n, p in named if ".indexer." in n},
        {n: p.grad for n, p in named if ".indexer." not in n},
    )


@pytest.mark.parametrize("topk", [2, 3, 100])  # gathered, masked, all visible
def test_the_language_model_loss_reaches_everything_but_the_indexer(topk, smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=topk))
    tokens = torch.randint(smallest.vocab_size, (1, 70))
    model(tokens, trace=Trace(wants_losses=True)).square().sum().backward()
    inside, outside = parts(model)
    assert len(inside) == 2 * 6 and all(g is None for g in inside.values())
    assert [n for n, g in outside.items() if g is None] == [f"layers.{i}.ffn.gate.bias" for i in (1, 2, 3)]


@pytest.mark.parametrize("topk", [2, 3, 100])  # gathered, masked, all visible
def test_the_index_loss_reaches_the_indexer_alone(topk, smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=topk))
    trace = Trace(wants_losses=True)
    model(torch.randint(smallest.vocab_size, (1, 70)), trace=trace)
    assert len(trace.indexer_loss) == 2
    torch.stack(trace.indexer_loss).sum().backward()
    inside, outside = parts(model)
    assert all(g is not None and g.any() for g in inside.values())
    assert all(g is None for g in outside.values())


def test_following_the_index_loss_lowers_it(smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=100))
    tokens = torch.randint(smallest.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." in n], lr=0.05)
    values = []
    for _ in range(8):
        trace = Trace(wants_losses=True)
        model(tokens, trace=trace)
        loss = torch.stack(trace.indexer_loss).sum()
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]


def test_the_rest_of_the_model_does_not_notice_the_index_loss(smallest, rough_model):
    """Logits and every gradient outside the indexer, bit for bit, with the loss added and without."""
    tokens = torch.randint(smallest.vocab_size, (2, 70))
    runs = []
    for is_on in (False, True):
        model = rough_model(replace(smallest, index_topk=2))
        trace = Trace(wants_losses=is_on)
        logits = model(tokens, trace=trace)
        loss = logits.square().mean()
        (loss + torch.stack(trace.indexer_loss).sum() if is_on else loss).backward()
        runs.append((logits, parts(model)))
    (logits, (_, without)), (same_logits, (inside, outside)) = runs
    assert torch.equal(logits, same_logits) and all(g.any() for g in inside.values())
    for name, grad in without.items():
        assert grad is None or torch.equal(grad, outside[name]), name


@pytest.mark.parametrize("topk", [2, 3, 100])
def test_packed_samples_have_the_loss_they_have_alone(topk, smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=topk), dtype=torch.float64)
    tokens = torch.randint(smallest.vocab_size, (1, 96), generator=torch.Generator().manual_seed(1))

    def losses(ids, segments=None):
        trace = Trace(wants_losses=True)
        model(ids, segments, trace=trace)
        return torch.stack(trace.indexer_loss)

    segments = torch.tensor([[0] * 71 + [1] * 21 + [-1] * 4])
    together, first, second = losses(tokens, segments), losses(tokens[:, :71]), losses(tokens[:, 71:92])
    # Mean over the queries that see an entry: all but the first three of a sample.
    expected = (68 * first + 18 * second) / (68 + 18)
    torch.testing.assert_close(together, expected, rtol=0, atol=1e-12)


def test_in_the_warm_up_all_visible_entries_are_candidates(smallest, rough_model):
    tokens = torch.randint(smallest.vocab_size, (1, 40))

    def run(topk, sees_all):
        model, trace = rough_model(replace(smallest, index_topk=topk)), Trace(wants_losses=True)
        for layer in model.layers:
            if layer.attn.indexer is not None:
                layer.attn.indexer.sees_all = sees_all
        return model(tokens, trace=trace), torch.stack(trace.indexer_loss), trace.csa_dropped

    warm, everything, sparse = run(2, True), run(100, False), run(2, False)
    assert torch.equal(warm[0], everything[0]) and torch.equal(warm[1], everything[1])
    assert warm[2] == 0 < sparse[2] and not torch.equal(sparse[1], warm[1])


def test_a_bf16_model_has_its_index_loss_in_fp32(smallest, rough_model):
    tokens = torch.randint(smallest.vocab_size, (1, 40))
    trace = Trace(wants_losses=True)
    rough_model(replace(smallest, index_topk=2), dtype=torch.bfloat16)(tokens, trace=trace)
    assert all(x.dtype == torch.float32 and x.isfinite() for x in trace.indexer_loss)


# ---- the loss against section 5.3, one query at a time ----------------------------------------


def dense_loss(index, query, keys, sink, scale, is_valid):
    """Mean of KL(p ‖ softmax(I)) over queries with candidates; window and sink are in p's denominator."""
    layout, windows, terms = keys.layout, keys.windows, []
    for b, t in is_valid.nonzero().tolist():
        candidates = range(int(windows.first[b, t]), int(windows.stop[b, t]))
        if keys.picks is not None:
            candidates = [i for i in keys.picks[b, t].tolist() if i >= 0]
        if not len(candidates):
            continue
        near = keys.window[b, int(layout.oldest[b, t]) : layout.offset + t + 1]
        chosen = torch.tensor(list(candidates))
        p = torch.zeros(len(candidates), dtype=torch.float64)
        for h in range(query.shape[2]):
            window, entries = (x @ query[b, t, h] * scale for x in (near, keys.entries[b, chosen]))
            p += torch.softmax(torch.cat((entries, window, sink[h : h + 1])), 0)[: len(candidates)]
        p = p / p.sum()
        scores = (index.keys[b, chosen] @ index.query[b, t].T).relu() @ index.weight[b, t]
        terms.append((p * (p / torch.softmax(scores, 0)).log()).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("window", [1, 6])
@pytest.mark.parametrize(("topk", "length"), [(None, 50), (3, 50), (2, 76)])
@pytest.mark.parametrize("where", [packed, continued])
def test_index_loss_and_its_gradient_equal_the_dense_twin_in_fp64(where, topk, length, window, smallest):
    config = replace(smallest, index_topk=topk or 100, sliding_window=window)
    layout = where(config, length)
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    rows, length = layout.position.shape
    windows = layout.windows[4]
    index = IndexQueries(draw(rows, length, 2, 3), draw(rows, length, 2), draw(rows, windows.num_columns, 3))
    picks = Indexer(config, None).pick(index, layout)
    entries, near = draw(rows, windows.num_columns, 5), draw(rows, layout.offset + length, 5)
    keys = Keys(layout, window, near, entries, windows, picks)
    assert keys.gathers == (topk == 2) and (picks is None) == (topk is None)
    leaves = [index.query, index.weight, index.keys]
    for leaf in leaves:
        leaf.requires_grad_()
    attention = (draw(rows, length, 4, 5), keys, draw(4), 0.5)
    twin = dense_loss(index, *attention, layout.is_valid)
    for buffer in (1 << 22, 1):
        ours, _ = index_loss(index, attention, layout.is_valid, buffer)
        torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)
        grads = [torch.autograd.grad(y, leaves, retain_graph=True) for y in (ours, twin)]
        for found, expected in zip(*grads):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_divergence_by_hand_is_zero_at_the_target_and_without_candidates():
    mass = torch.tensor([0.1, 0.3, 7.0]).view(1, 1, 3)
    candidates = torch.tensor([True, True, False]).view(1, 1, 3)
    target = torch.tensor([0.25, 0.75, 5.0]).log().view(1, 1, 3)
    kl, count = divergence(mass, target, candidates)
    assert (kl.item(), count.item()) == (pytest.approx(0, abs=1e-7), 1)
    kl, _ = divergence(mass, torch.zeros(1, 1, 3), candidates)
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert kl.item() == pytest.approx(expected.item(), abs=1e-7)
    assert [x.item() for x in divergence(mass, target, candidates & False)] == [0, 0]
