"""Choices taken down in one forward are followed in another; what does not fit is refused."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.forward_trace import Trace
from consilience.model.routing import Routing
from consilience.model.state import DecodeState

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


def chosen_while_decoding(model, dtype):
    """layer -> [2, K] of one token a row behind three, recorded into a buffer and by the gates of PyTorch."""
    found = []
    for is_recorded in (True, False):
        state = DecodeState.allocate(model.config, 2, 32)
        into = torch.full((4, 3, 2), 77, dtype=dtype)
        routing = Routing.recorded(into, (1, 2, 3)) if is_recorded else Routing()
        with torch.no_grad():
            model.hidden(IDS[:, :3], state=state)
            hidden = model.hidden(IDS[:, 3:4], state=state, routing=routing)
        found.append(
            ({n: into[:2, n - 1].long() for n in (1, 2, 3)} if is_recorded else routing.experts, hidden)
        )
    assert torch.equal(into[2:], torch.full((2, 3, 2), 77, dtype=dtype))
    return found


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_choices_recorded_into_a_buffer_are_those_of_the_gates(rough_model, dtype):
    """A decoding step goes through the compiled block, which the gates in PyTorch never see."""
    (recorded, hidden), (seen, other) = chosen_while_decoding(rough_model(), dtype)
    assert sorted(seen) == [1, 2, 3]
    assert all(torch.equal(recorded[n], seen[n].long()) for n in (1, 2, 3))
    torch.testing.assert_close(hidden, other, rtol=1e-4, atol=1e-5)  # fp32, other orders of summation


def test_recording_changes_no_bit_of_a_step(rough_model):
    model = rough_model()
    hidden = []
    for routing in (None, Routing.recorded(torch.zeros(2, 3, 2, dtype=torch.uint8), (1, 2, 3))):
        state = DecodeState.allocate(model.config, 2, 32)
        with torch.no_grad():
            hidden.append(model.hidden(IDS[:, :1], state=state, routing=routing))
    assert torch.equal(*hidden)


def test_free_choices_that_differ_are_counted_over_what_is_prescribed(rough_model):
    model, other = rough_model(seed=0), rough_model(seed=7)
    own, theirs = Routing(), Routing()
    model.hidden(IDS, SEGMENTS, routing=own)
    other.hidden(IDS, SEGMENTS, routing=theirs)
    same = Routing.fixed(own.experts, compares=True)
    model.hidden(IDS, SEGMENTS, routing=same)
    assert same.num_differing() == (0, 3 * 30)
    swapped = Routing.fixed({n: e.flip(1) for n, e in own.experts.items()}, compares=True)
    model.hidden(IDS, SEGMENTS, routing=swapped)
    assert swapped.num_differing() == (0, 90)  # the order of a set is no difference
    partly = {n: e.clone() for n, e in own.experts.items()}
    partly[3][4:] = -1
    partly[3][:4] = (own.experts[3][:4] + 1) % 6  # other sets: neighbours wrap around, and stay distinct
    fixed = Routing.fixed(partly, compares=True)
    model.hidden(IDS, SEGMENTS, routing=fixed)
    is_other = (partly[3][:4].sort(1).values != own.experts[3][:4].sort(1).values).any(1)
    assert fixed.num_differing() == (int(is_other.sum()), 60 + 4) and is_other.any()
    assert Routing.fixed(theirs.experts).num_differing() == (0, 0)
