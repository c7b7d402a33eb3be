"""Scores, the top-k rule with its ties, and a loss that reaches the indexer alone."""

from dataclasses import replace

import pytest
import torch

from consilience.model.forward_trace import Trace
from consilience.model.indexer import Indexer, index_loss
from consilience.model.layout import packed_layout
from consilience.model.rope import inverse_frequencies, rotate, rotations

torch.set_num_threads(1)

NONE = float("-inf")


def indexer(config, topk):
    return Indexer(replace(config, index_topk=topk), None)


@pytest.mark.parametrize(
    ("scores", "topk", "chosen"),
    [
        ([3.0, 1.0, 2.0, 0.0], 2, [0, 2]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0, 1]),  # ReLU makes exact ties: the lowest index wins
        ([1.0, 0.0, 5.0, 0.0, 0.0], 3, [0, 1, 2]),
        ([0.0, 2.0, 2.0, 2.0, 1.0], 2, [1, 2]),
        ([-1.0, -3.0, -2.0], 2, [0, 2]),  # weights may be negative, so scores may be
        ([5.0, NONE, NONE, NONE], 2, [0]),  # picks that are not visible are dropped
        ([NONE, NONE, NONE], 2, []),
        ([NONE, -7.0, 4.0], 3, [1, 2]),  # no more entries than k: all visible ones
    ],
)
def test_top_k_takes_the_highest_visible_scores_and_the_lowest_index_of_equals(
    scores, topk, chosen, smallest
):
    picked = indexer(smallest, topk).select(torch.tensor(scores)[None, None])
    assert picked[0, 0].nonzero()[:, 0].tolist() == chosen


def test_top_k_equals_a_stable_sort_on_many_ties(smallest):
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (50, 7, 20), generator=g).float()
    scores[torch.rand(50, 7, 20, generator=g) < 0.3] = NONE
    picked = indexer(smallest, 6).select(scores)
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :6]
    expected = torch.zeros_like(picked).scatter(-1, order, True) & (scores > NONE)
    assert torch.equal(picked, expected)


def test_scores_are_the_weighted_sum_of_rectified_matches(smallest):
    module = Indexer(smallest, torch.float64).double()
    frequencies = {c: inverse_frequencies(smallest, is_compressed=c) for c in (False, True)}
    segments = torch.zeros(1, 12, dtype=torch.long)
    layout = packed_layout(smallest, frequencies, segments, torch.arange(12)[None], None)
    g = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g)
    hidden, latent, keys = draw(1, 12, 24), draw(1, 12, 20), draw(1, 3, 12)
    with torch.no_grad():
        scores = module.scores(hidden, latent, keys, layout)[0]
        for t in range(12):
            q = (module.wq_b.weight @ latent[0, t]).view(6, 12)
            q = rotate(q, rotations(torch.tensor(t), frequencies[True]))
            w = module.weights_proj.weight @ hidden[0, t]
            for i in range(3):
                expected = (
                    sum(w[h] * max(float(q[h] @ keys[0, i]), 0.0) for h in range(6)) * 6**-0.5 * 12**-0.5
                )
                if i < (t + 1) // 4:
                    torch.testing.assert_close(scores[t, i], expected, rtol=0, atol=1e-12)
                else:
                    assert scores[t, i] == NONE


def parts(model):
    """Gradient of each parameter, by whether it belongs to an indexer."""
    named = list(model.named_parameters())
    return (
        {n: p.grad for n, p in named if ".indexer." in n},
        {n: p.grad for n, p in named if ".indexer." not in n},
    )


@pytest.mark.parametrize("topk", [3, 100])
def test_the_language_model_loss_reaches_everything_but_the_indexer(topk, smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=topk))
    tokens = torch.randint(smallest.vocab_size, (2, 40))
    model(tokens, trace=Trace(wants_losses=True)).square().sum().backward()
    inside, outside = parts(model)
    assert len(inside) == 2 * 6 and all(g is None for g in inside.values())
    assert [n for n, g in outside.items() if g is None] == [f"layers.{i}.ffn.gate.bias" for i in (1, 2, 3)]


@pytest.mark.parametrize("topk", [3, 100])
def test_the_index_loss_reaches_the_indexer_alone(topk, smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=topk))
    trace = Trace(wants_losses=True)
    model(torch.randint(smallest.vocab_size, (2, 40)), trace=trace)
    assert len(trace.indexer_loss) == 2
    torch.stack(trace.indexer_loss).sum().backward()
    inside, outside = parts(model)
    assert all(g is not None and g.any() for g in inside.values())
    assert all(g is None for g in outside.values())


def test_following_the_index_loss_lowers_it(smallest, rough_model):
    model = rough_model(replace(smallest, index_topk=100))
    tokens = torch.randint(smallest.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".indexer." in n], lr=0.03)
    values = []
    for _ in range(12):
        trace = Trace(wants_losses=True)
        model(tokens, trace=trace)
        loss = torch.stack(trace.indexer_loss).sum()
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.6 * values[0]


def dense_loss(probabilities, scores, is_selected, is_valid):
    """Section 5.3, one query at a time: KL(p ‖ softmax(I)) over the selected entries."""
    terms = []
    for b, t in is_valid.nonzero().tolist():
        chosen = is_selected[b, t].nonzero()[:, 0]
        if not len(chosen):
            continue
        p = probabilities[b, t][:, chosen].sum(0)
        p = p / p.sum()
        q = torch.softmax(scores[b, t, chosen], 0)
        terms.append((p * (p / q).log()).sum())
    return torch.stack(terms).mean()


def test_index_loss_and_its_gradient_equal_the_dense_twin_in_fp64():
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=g)
    probabilities = 0.1 * draw(2, 9, 3, 5)  # what the window and the sink hold is not here: no row sums to 1
    is_visible = torch.arange(5) < ((torch.arange(9) + 1) // 2)[:, None]
    is_selected = is_visible & (draw(2, 9, 5) < 0.7)
    is_valid = torch.ones(2, 9, dtype=torch.bool)
    is_valid[1, 6:] = False
    scores = (4 * draw(2, 9, 5) - 2).masked_fill(~is_visible, NONE).requires_grad_()
    ours = index_loss(probabilities, scores, is_selected, is_valid)
    twin = dense_loss(probabilities, scores, is_selected, is_valid)
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-12)
    found, expected = (torch.autograd.grad(y, scores)[0] for y in (ours, twin))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_index_loss_by_hand_is_zero_at_the_target_and_for_no_query():
    probabilities = torch.tensor([0.1, 0.3]).view(1, 1, 1, 2)
    everything, valid = torch.ones(1, 1, 2, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    target = torch.tensor([0.25, 0.75]).log().view(1, 1, 2)
    assert index_loss(probabilities, target, everything, valid).item() == pytest.approx(0, abs=1e-7)
    even = index_loss(probabilities, torch.zeros(1, 1, 2), everything, valid).item()
    expected = 0.25 * torch.tensor(0.5).log() + 0.75 * torch.tensor(1.5).log()
    assert even == pytest.approx(expected.item(), abs=1e-7)
    assert index_loss(probabilities, target, everything, ~valid).item() == 0
    assert index_loss(probabilities, target, ~everything, valid).item() == 0
