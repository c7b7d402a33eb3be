"""Counters add up over forwards."""

import torch

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
