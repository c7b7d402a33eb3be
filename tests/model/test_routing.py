"""Choices taken down in one forward are followed in another; what does not fit is refused."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.forward_trace import Trace
from consilience.model.routing import Routing

torch.set_num_threads(1)

IDS = torch.randint(53, (2, 15), generator=torch.Generator().manual_seed(0))
SEGMENTS = torch.tensor([[0] * 6 + [1] * 9, [0] * 11 + [-1] * 4])


def experts_of(model, routing=None):
    """layer -> [R, K] that the gates gave in one forward, and the hidden states."""
    seen = {}
    hooks = [
        block.ffn.gate.register_forward_hook(lambda _g, _i, out, layer=layer: seen.update({layer: out[1]}))
        for layer, block in enumerate(model.layers)
    ]
    hidden = model.hidden(IDS, SEGMENTS, routing=routing)
    for hook in hooks:
        hook.remove()
    return seen, hidden


def test_learned_layers_are_taken_down_hash_layers_are_not(rough_model):
    model = rough_model()
    routing = Routing()
    seen, hidden = experts_of(model, routing)
    assert sorted(routing.experts) == [1, 2, 3]  # layer 0 is a hash layer
    for layer, experts in routing.experts.items():
        assert experts.dtype == torch.int16 and torch.equal(experts.long(), seen[layer])
    assert torch.equal(hidden, experts_of(model)[1])


def test_following_ones_own_choices_changes_no_bit_of_output_or_gradient(rough_model):
    model = rough_model()
    own = Routing()
    with torch.no_grad():
        model.hidden(IDS, SEGMENTS, routing=own)
    gradients = []
    for routing in (None, Routing.fixed(own.experts)):
        hidden = model.hidden(IDS, SEGMENTS, routing=routing)
        (hidden * torch.sin(torch.arange(hidden.numel()).view_as(hidden))).sum().backward()
        gradients.append([hidden] + [p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert len(gradients[0]) > 30 and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_another_models_choices_are_followed_by_every_learned_layer_and_counted_as_load(rough_model):
    model, other = rough_model(seed=0), rough_model(seed=7)
    theirs = Routing()
    other.hidden(IDS, SEGMENTS, routing=theirs)
    plain, plain_hidden = experts_of(model)
    seen, hidden = experts_of(model, Routing.fixed(theirs.experts))
    assert torch.equal(seen[0], plain[0])
    for layer in (1, 2, 3):
        assert torch.equal(seen[layer], theirs.experts[layer].long())
        assert not torch.equal(seen[layer], plain[layer])
    assert not torch.allclose(hidden, plain_hidden, atol=1e-3)
    trace = Trace()
    model.hidden(IDS, SEGMENTS, routing=Routing.fixed(theirs.experts), trace=trace)
    chosen = seen[2][SEGMENTS.flatten() >= 0]
    assert torch.equal(trace.expert_load[2], torch.bincount(chosen.flatten(), minlength=6))


def test_a_token_without_a_prescription_chooses_for_itself(rough_model):
    model, other = rough_model(seed=0), rough_model(seed=7)
    theirs = Routing()
    other.hidden(IDS, SEGMENTS, routing=theirs)
    plain, _ = experts_of(model)
    only_first = {1: theirs.experts[1].clone(), 2: theirs.experts[2], 3: theirs.experts[3]}
    only_first[1][5:] = -1
    seen, _ = experts_of(model, Routing.fixed(only_first))
    assert torch.equal(seen[1][:5], theirs.experts[1][:5].long())
    assert torch.equal(seen[1][5:], plain[1][5:])


def test_choices_of_another_batch_or_another_model_are_refused(rough_model):
    model = rough_model()
    own = Routing()
    model.hidden(IDS, SEGMENTS, routing=own)
    with pytest.raises(EngineError, match=r"choices \[30, 2\].*layer 1, this forward needs \[15, 2\]"):
        model.hidden(IDS[:1], SEGMENTS[:1], routing=Routing.fixed(own.experts))
    del own.experts[2]
    with pytest.raises(EngineError, match=r"no choices for the learned router of layer 2"):
        model.hidden(IDS, SEGMENTS, routing=Routing.fixed(own.experts))
