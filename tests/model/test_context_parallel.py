"""Rows cut for several ranks against one process: forward, auxiliary losses and every gradient."""

from dataclasses import replace

import pytest
import torch

from consilience.model.context_parallel import context_parallel
from consilience.model.exact import exact_mode
from consilience.model.forward_trace import Trace
from consilience.model.ranks import ALONE
from consilience.model.routing import Routing
from tests.rank_processes import on_ranks

torch.set_num_threads(1)

# Samples of each row, odd lengths; one spans every border, one starts and ends inside of a piece.
LENGTHS = ((41, 3, 30, 1, 12), (95,))
TOKENS = 97
CUTS = {
    2: (0, 45, 97),
    3: (0, 50, 53, 97),  # the middle piece is shorter than the window and than most compression windows
    4: (0, 3, 5, 9, 97),  # the last one looks back at all the others; nothing closes in the first
}


def rows_of(lengths, num_tokens=TOKENS, vocabulary=53):
    """ids, segments, positions [B, T] of packed samples."""
    ids = torch.randint(vocabulary, (len(lengths), num_tokens), generator=torch.Generator().manual_seed(3))
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    for row, samples in enumerate(lengths):
        start = 0
        for number, length in enumerate(samples):
            span = slice(start, start + length)
            segments[row, span], positions[row, span] = number, torch.arange(length)
            start += length
    return ids, segments, positions


@pytest.fixture
def config(smallest):
    return replace(smallest, num_nextn_predict_layers=2, mtp_compress_ratios=(0, 4))


def probe(*shape, dtype):
    """Fixed weights that make a number of a result."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def run(ranks, model, rows, borders, how="plain"):
    """Results of this rank's piece; losses and gradients of what it has to add."""
    ids, segments, positions = rows
    model.zero_grad()
    trace, routing = Trace(wants_losses=True), Routing()
    with context_parallel(ranks, borders), exact_mode(how == "exact"):
        streams, layout = model.streams(ids, segments, positions, trace=trace, routing=routing)
        hidden = model.norm(model.hc_head(streams)).view(*layout.position.shape, -1)
        ahead = model.mtp_hidden(streams, ids.roll(-1, 1), layout)
        logits = model.head(hidden)
    dtype = hidden.dtype
    is_token = layout.cut(segments >= 0)[..., None]
    found = [logits, *ahead]
    terms = [(layout.cut(probe(*ids.shape, x.shape[2], dtype=dtype)) * x * is_token).sum() for x in found]
    losses = torch.stack(
        [*terms, 3 * trace.summed_indexer_loss(), 50 * torch.stack(trace.balance_loss).sum()]
    )
    losses.sum().backward()
    return {
        "results": [x.detach() for x in found],
        "losses": losses.detach(),
        "grads": {name: p.grad for name, p in model.named_parameters()},
        "routing": routing.experts,
        "counts": [trace.csa_visible, trace.csa_dropped, trace.hca_attended],
        "load": trace.expert_load,
    }


def check(one, pieces, rtol):
    """`pieces` of all ranks put together are `one`, to rtol of each tensor's norm."""

    def equal(found, expected, name):
        error = (found - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= rtol, f"{name}: {error:.2e}"

    for i, expected in enumerate(one["results"]):
        equal(torch.cat([piece["results"][i] for piece in pieces], dim=1), expected, f"result {i}")
    equal(sum(piece["losses"] for piece in pieces), one["losses"], "losses")
    assert set(one["grads"]) == set(pieces[0]["grads"])
    for name, expected in one["grads"].items():
        parts = [piece["grads"][name] for piece in pieces if piece["grads"][name] is not None]
        assert (expected is None) == (not parts), name
        if expected is not None:
            assert expected.any(), name
            equal(sum(parts), expected, name)
    assert one["counts"] == [sum(n) for n in zip(*(piece["counts"] for piece in pieces))]
    for layer, load in one["load"].items():
        assert torch.equal(load, sum(piece["load"][layer] for piece in pieces))
    for piece in pieces:  # every rank knows the choices for all rows
        assert all(torch.equal(piece["routing"][layer], x) for layer, x in one["routing"].items())


def test_two_ranks_give_the_forward_and_the_gradients_of_one(config, rough_model, tmp_path):
    model, rows = rough_model(config), rows_of(LENGTHS)
    one = run(ALONE, model, rows, None)
    assert one["counts"][1] > 0  # the indexer chooses
    pieces = on_ranks(2, run, model, rows, CUTS[2], folder=tmp_path)
    check(one, pieces, rtol=1e-5)
