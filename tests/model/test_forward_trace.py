"""Counters add up over forwards."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from consilience.model.forward_trace import Trace

torch.set_num_threads(1)


def test_loads_of_one_layer_accumulate_and_layers_stay_apart():
    trace = Trace()
    trace.add_load(1, torch.tensor([1, 2]), is_hash=False)
    trace.add_load(1, torch.tensor([3, 0]), is_hash=False)
    trace.add_load(0, torch.tensor([5, 5]), is_hash=True)
    assert {layer: load.tolist() for layer, load in trace.expert_load.items()} == {1: [4, 2], 0: [5, 5]}
    assert trace.is_hash == {1: False, 0: True}


def test_adding_leaves_the_given_tensor_alone():
    trace, load = Trace(), torch.tensor([1, 2])
    trace.add_load(0, load, is_hash=False)
    trace.add_load(0, load, is_hash=False)
    assert load.tolist() == [1, 2] and trace.expert_load[0].tolist() == [2, 4]


def test_two_forwards_of_one_trace_count_like_one_of_both_rows(smallest, rough_model):
    model = rough_model(smallest)
    tokens = torch.randint(smallest.vocab_size, (2, 40))
    once, twice = Trace(), Trace()
    with torch.no_grad():
        model(tokens, trace=once)
        model(tokens[:1], trace=twice)
        model(tokens[1:], trace=twice)
    for name in ("csa_visible", "csa_dropped", "hca_attended"):
        assert getattr(once, name) == getattr(twice, name) > 0
    assert all(torch.equal(once.expert_load[i], twice.expert_load[i]) for i in range(4))


def test_decoding_counts_what_the_full_forward_counts(smallest, rough_model):
    from consilience.model.state import DecodeState

    model, full, decoded = rough_model(smallest), Trace(), Trace()
    tokens = torch.randint(smallest.vocab_size, (1, 40))
    state = DecodeState.allocate(smallest, 1, 40)
    with torch.no_grad():
        model(tokens, trace=full)
        for part in (tokens[:, :23], tokens[:, 23:24], tokens[:, 24:]):
            model(part, state=state, trace=decoded)
    for name in ("csa_visible", "csa_dropped", "hca_attended"):
        assert getattr(full, name) == getattr(decoded, name) > 0
    assert all(torch.equal(full.expert_load[i], decoded.expert_load[i]) for i in range(4))


def counted(trace):
    counts = [trace.hca_attended, trace.csa_visible, trace.csa_dropped, len(trace.balance_loss)]
    counts += [len(trace.indexer_loss), len(trace.indexer_queries)]
    return counts, [load.tolist() for _, load in sorted(trace.expert_load.items())]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_run_again_in_the_backward_counts_once(smallest, rough_model, use_reentrant):
    """torch.utils.checkpoint around the whole model, which knows nothing of it."""
    model = rough_model(smallest)
    tokens = torch.randint(smallest.vocab_size, (2, 40))
    runs = []
    plain, again = Trace(wants_losses=True), Trace(wants_losses=True)

    def forward(tokens, _makes_reentrant_work):
        runs.append(1)
        return model(tokens, trace=again)

    with torch.no_grad():
        model(tokens, trace=plain)
    gate = torch.ones((), requires_grad=True)
    checkpoint(forward, tokens, gate, use_reentrant=use_reentrant).sum().backward()
    assert len(runs) == 2 and counted(again) == counted(plain)
    assert again.indexer_loss and again.hca_attended > 0


def test_losses_of_checkpointed_blocks_have_the_gradients_of_plain_ones(smallest, rough_model):
    """Each block through torch.utils.checkpoint; the losses are summed before the backward runs it again."""
    tokens = torch.randint(smallest.vocab_size, (2, 40))
    gradients, losses = [], []
    for is_checkpointed in (False, True):
        model = rough_model(smallest)
        if is_checkpointed:
            for block in model.layers:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        trace = Trace(wants_losses=True)
        total = model(tokens, trace=trace).square().sum()
        total = total + 2 * sum(trace.balance_loss) + 3 * trace.summed_indexer_loss()
        total.backward()
        losses.append((len(trace.balance_loss), float(trace.summed_indexer_loss().detach()), counted(trace)))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1] and losses[0][1] > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
