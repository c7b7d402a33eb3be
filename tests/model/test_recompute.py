"""Activation checkpointing by tensor: what is made again, that nothing changes by it, and what it saves."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from consilience.conf.errors import ConfigError
from consilience.conf.schema_training import RECOMPUTE
from consilience.model.exact import exact_mode
from consilience.model.forward_trace import Trace
from consilience.model.quantization import Quantization
from consilience.model.recompute import (
    NAMES,
    POLICIES,
    Recompute,
    name_of,
    named,
    recomputable,
    recompute_policy,
    set_recompute,
)
from consilience.model.routing import Routing
from consilience.model.state import DecodeState

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EVERY = [*POLICIES, *NAMES]
TOKENS = torch.randint(53, (2, 37), generator=torch.Generator().manual_seed(3))
SEGMENTS = torch.tensor([[0] * 20 + [1] * 17, [0] * 30 + [-1] * 7])


@dataclass(frozen=True)
class Nowhere:
    """A layout with nothing but its trace."""

    trace: Trace | None = None


class Double(torch.autograd.Function):
    """2 x, saved as a stream; `made` counts how often it is made, `kept` what the backward sees."""

    made = 0
    kept: ClassVar[list[float]] = []

    @staticmethod
    def forward(ctx, x):  # type: ignore[override]
        def work():
            Double.made += 1
            return 2 * x

        y = named("streams", work)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (y,) = ctx.saved_tensors
        Double.kept.append(y.item())
        return 2 * grad


class Toy:
    """A block: (2 x) w + 1 with w a product of two [1, 1] matrices by name."""

    recompute: Recompute | None = None

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @recomputable
    def forward(self, streams: Any, token_ids: Any, layout: Any, state: Any) -> Any:
        return named("router", torch.mm, Double.apply(streams), self.weight) + 1


@pytest.mark.parametrize(
    ("setting", "runs"), [("none", 1), ("cheap", 1), (["router"], 1), (["streams"], 2), ("block", 2)]
)
def test_a_recomputed_tensor_is_made_twice_and_a_saved_one_once(setting, runs):
    Double.made, Double.kept = 0, []
    x, weight = (torch.tensor([[v]], requires_grad=True) for v in (3.0, 5.0))
    toy = Toy(weight)
    toy.recompute = recompute_policy(setting)
    out = toy.forward(x, torch.zeros(1), Nowhere(), None)
    out.sum().backward()
    # y = 2 · 3 · 5 + 1; dy/dx = 2 · 5, dy/dw = 2 · 3
    assert (out.item(), x.grad.item(), weight.grad.item()) == (31, 10, 6)
    assert Double.made == runs and Double.kept == [6]


def test_without_a_policy_a_named_call_is_the_call_itself():
    found = object()
    assert named("streams", lambda a, b: found if (a, b) == (1, 2) else None, 1, 2) is found


# ---- nothing changes ----


def gradients(model, run, *, losses=True):
    """Loss, gradients by name and the trace of one forward and backward."""
    model.zero_grad()
    trace = Trace(wants_losses=losses)
    loss = run(model, trace).square().sum()
    if losses:
        loss = loss + 3 * sum(trace.balance_loss) + 5 * sum(trace.indexer_loss)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, trace


def hidden(model, trace):
    device = model.embed.weight.device
    return model.hidden(TOKENS.to(device), SEGMENTS.to(device), trace=trace)


def same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    unequal = [name for name, grad in ours[1].items() if not torch.equal(grad, theirs[1][name])]
    assert not unequal
    return True


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_are_equal_to_the_bit_under_every_policy(rough_model, dtype, device):
    # On a CPU fp32 runs the compiled kernels, the others their plain twins.
    model = rough_model(dtype=dtype).to(device)
    expected = gradients(model, hidden)
    for setting in EVERY:
        set_recompute(model, recompute_policy(setting))
        assert same(gradients(model, hidden), expected), setting


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", ["cheap", "block", "picks"])
def test_counters_and_losses_of_a_trace_count_a_forward_once(rough_model, setting, device):
    model = rough_model().to(device)
    for losses in (False, True):
        set_recompute(model, None)
        plain = gradients(model, hidden, losses=losses)[2]
        set_recompute(model, recompute_policy(setting))
        again = gradients(model, hidden, losses=losses)[2]
        assert again.expert_load.keys() == plain.expert_load.keys()
        assert all(torch.equal(load, plain.expert_load[layer]) for layer, load in again.expert_load.items())
        counted = ("hca_attended", "csa_visible", "csa_dropped", "stream_spread")
        assert [getattr(again, name) for name in counted] == [getattr(plain, name) for name in counted]
        assert len(again.balance_loss) == len(plain.balance_loss) == 3 * losses
        assert len(again.indexer_loss) == len(plain.indexer_loss) == 2 * losses


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("setting", ["cheap", "experts", "block"])
def test_the_backward_recomputes_as_the_forward_ran_exact_mode_included(rough_model, setting, device):
    model = rough_model().to(device)

    def run(model, trace):
        with exact_mode():  # the backward is outside
            return hidden(model, trace)

    expected = gradients(model, run)
    set_recompute(model, recompute_policy(setting))
    assert same(gradients(model, run), expected)


@pytest.mark.parametrize("setting", ["cheap", "mhc", "block"])
def test_frozen_parts_prescribed_routing_and_quantised_values_stay_as_they_are(
    rough_model, smallest, setting
):
    model = rough_model(replace(smallest, index_head_dim=16))
    model.quantize(Quantization(experts=True, kv=True, indexer=True))
    model.embed.requires_grad_(False)
    model.layers[0].requires_grad_(False)
    routing = Routing()
    with torch.no_grad():
        model.hidden(TOKENS.flip(1), SEGMENTS, routing=routing)
    fixed = Routing.fixed(routing.experts)

    def run(model, trace):
        return model.hidden(TOKENS, SEGMENTS, trace=trace, routing=fixed)

    expected = gradients(model, run)
    set_recompute(model, recompute_policy(setting))
    assert same(gradients(model, run), expected)


def test_prediction_blocks_follow_the_policy_too(rough_model, smallest):
    config = replace(smallest, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))
    model = rough_model(config)

    def run(model, trace):
        streams, layout = model.streams(TOKENS, SEGMENTS, trace=trace)
        return model.mtp_hidden(streams, TOKENS.roll(-1, 1), layout)[0]

    expected = gradients(model, run)
    set_recompute(model, recompute_policy("experts"))
    assert model.mtp[0].recompute == recompute_policy("experts")
    with Names() as seen:
        assert same(gradients(model, run), expected)
    assert seen.count["streams"] == 2 * (config.num_hidden_layers + 1)


def test_a_policy_may_change_between_steps(rough_model):
    model = rough_model()
    expected = gradients(model, hidden)
    for setting in ("block", "none", "cheap", "none"):
        set_recompute(model, recompute_policy(setting))
        assert same(gradients(model, hidden), expected)


# ---- what is named, and what is kept ----


class Names(TorchDispatchMode):
    """Counts the operations that make a tensor of each name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name := name_of(func, args):
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_every_name_names_something_and_the_backward_makes_the_recomputed_alone(rough_model):
    model = rough_model()
    for setting in ("cheap", "mhc", "attention", "experts"):
        set_recompute(model, recompute_policy(setting))
        with Names() as forward:
            out = hidden(model, None)
        with Names() as backward:
            out.sum().backward()
        assert forward.count.keys() == NAMES.keys()
        assert backward.count.keys() == set(POLICIES[setting])


@pytest.mark.parametrize("setting", ["cheap", "block"])
def test_decoding_and_forwards_without_gradients_do_not_know_the_policy(rough_model, smallest, setting):
    model, plain = rough_model(), rough_model()
    set_recompute(model, recompute_policy(setting))
    with Names() as seen, torch.no_grad():
        assert torch.equal(model(TOKENS), plain(TOKENS))
    with seen:  # with gradients on: a state must not be advanced twice
        states = [DecodeState.allocate(smallest, 2, 48) for _ in range(2)]
        for start, stop in ((0, 20), (20, 36), (36, 37)):
            ours, theirs = (m.hidden(TOKENS[:, start:stop], state=s) for m, s in zip((model, plain), states))
            assert torch.equal(ours, theirs)
        assert torch.equal(states[0].position, states[1].position)
    assert not seen.count


class Made(TorchDispatchMode):
    """The memory that operations made, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.bytes[StorageWeakRef(storage)] = storage.nbytes()
        return made


def bytes_kept(model, tokens):
    """Bytes that a forward leaves allocated, its result included."""
    with Made() as made:
        out = model.hidden(tokens)
    assert out.requires_grad
    return sum(size for storage, size in made.bytes.items() if not storage.expired())


def test_what_a_policy_recomputes_is_not_kept(rough_model):
    model = rough_model()
    tokens = TOKENS.repeat(4, 4)
    rows, config = tokens.numel(), model.config
    kept = {}
    for setting in ("none", "cheap", *NAMES, "block"):
        set_recompute(model, recompute_policy(setting))
        kept[setting] = bytes_kept(model, tokens)
    saved = {name: (kept["cheap"] - kept[name]) / (4 * rows) for name in NAMES}
    layers = config.num_hidden_layers
    # floats a token, by the shapes in NAMES
    assert saved["streams"] == layers * config.hc_mult * config.hidden_size
    assert saved["router"] == layers * config.n_routed_experts
    assert saved["expert_activations"] == layers * 2 * config.hidden_size  # no gate, no up
    heads = config.num_attention_heads * config.head_dim
    assert saved["attention_output"] == layers * (heads + config.hidden_size)
    assert saved["picks"] == 2 * 2 * config.index_topk  # two CSA layers, 8 bytes a pick
    assert kept["block"] < min(kept[name] for name in NAMES) and max(kept.values()) == kept["none"]


# ---- settings ----


def test_a_setting_names_policies_and_tensors_in_any_mixture():
    assert recompute_policy("none") is None and recompute_policy(["none"]) is None
    assert recompute_policy("cheap") == Recompute(frozenset())
    assert recompute_policy(["experts", "streams"]) == Recompute(
        frozenset({"router", "expert_activations", "streams"})
    )
    assert recompute_policy("block") == recompute_policy(list(NAMES))
    for wrong in ("blocks", ["none", "experts"]):
        with pytest.raises(ConfigError, match="write none alone, or some of cheap, mhc, attention"):
            recompute_policy(wrong)


def test_the_configuration_offers_what_there_is():
    assert ("none", *POLICIES, *NAMES) == RECOMPUTE
