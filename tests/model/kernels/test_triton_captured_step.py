"""A whole decoding step by the kernels a GPU takes: it asks the host nothing, no shape depends on data."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from consilience.model.state import DecodeState
from consilience.rollout import captured_decode
from consilience.rollout.captured_decode import Decoder

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

# What reads numbers on the host, or makes a tensor whose size is a number of another.
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
ASKS = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "argwhere", "masked_select"),
    *("bincount", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "lift_fresh"),
}


class Asks(AssertionError):
    """A step asked its host."""


class _Functions(TorchFunctionMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self.watch.is_on and name in READS:
            raise Asks(name)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        if self.watch.is_on:
            self.watch.see(op, args, kwargs or {}, found)
        return found


class Watch:
    """Raises `Asks` where a step asks its host; keeps every operation with the shapes that it made."""

    def __init__(self):
        self.is_on, self.seen = True, []

    def see(self, op, args, kwargs, found):
        name = op.overloadpacket.__name__
        if name in ASKS:
            raise Asks(name)
        indices = args[1] if name.strip("_") in ("index", "index_put", "index_put_impl") else ()
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            raise Asks(f"{name} by a mask")
        device = kwargs.get("device")
        if name in ("_to_copy", "copy_") and device is not None and device != args[0].device:
            raise Asks(f"{name} to {device}")
        tensors = [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]
        self.seen.append((str(op), [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]))

    @contextmanager
    def paused(self):
        before, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = before


@contextmanager
def watched(monkeypatch):
    """A `Watch` over everything but the inside of Triton's interpreter, whose kernels run on the device."""
    watch = Watch()
    with monkeypatch.context() as patches:
        if not torch.cuda.is_available():
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def quiet(executor, *args, **kwargs):
                shapes = [tuple(a.shape) if isinstance(a, torch.Tensor) else a for a in args]
                whole = [a for a in shapes if not isinstance(a, float)]
                watch.seen.append((executor.fn.__name__, whole, executor.grid))
                with watch.paused():
                    return launch(executor, *args, **kwargs)

            patches.setattr(GridExecutor, "__call__", quiet)
        with _Functions(watch), _Operations(watch):
            yield watch


@pytest.fixture
def policy(rough_model, smallest, triton_device, monkeypatch):
    """A bf16 model of all kinds of layers, whose steps take the GPU's way here too."""
    if triton_device == "cpu":
        from consilience.model import norm, rope
        from consilience.model.kernels import choice, gpu_decode, gpu_norm

        def gpu_norm_rotate(x, weight, turn, eps, *, is_inverse=False):
            return gpu_norm.norm_rotate(x, weight, turn, eps, -1.0 if is_inverse else 1.0)

        for module in (norm, rope):
            monkeypatch.setattr(module, "is_available", lambda x, rotation: True)
            monkeypatch.setattr(module, "norm_rotate", gpu_norm_rotate)
        monkeypatch.setattr(gpu_decode, "num_splits", lambda state: 2)  # 33 of 4 rows would take a minute
        monkeypatch.setattr(choice, "can_use_triton", lambda *tensors: True)
        monkeypatch.setattr(captured_decode, "runs_without_host", lambda model: True)
        monkeypatch.setattr(Decoder, "_capture", lambda decoder, work: work)
    monkeypatch.setattr(captured_decode, "SHORTEST", 24)  # entries of CSA then outnumber the picks
    config = replace(smallest, moe_intermediate_size=24, num_hidden_layers=3, compress_ratios=(0, 4, 12))
    model = rough_model(config).to(triton_device)
    coefficients = {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() == 1 or ".hc_" in n}
    model = model.to(torch.bfloat16)
    fp32 = ("fn", "base", "scale", "attn_sink", "ape", "bias")
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in fp32:
            parameter.data = coefficients.get(name, parameter.detach()).float()
    return model


def decoder(model, device, max_rows=4, captures=True):
    options = {"device": device, "dtype": torch.bfloat16}
    state = DecodeState.allocate(model.config, max_rows, 72, num_blocks=4 * 6, **options)
    return Decoder(model, state, max_rows, 72, captures)


def admit(made, row, tokens):
    """Row `row` takes 72 tokens' blocks and stands behind a random number of `tokens`, fed one by one."""
    made._state.reserve(row, 72)
    made._state.position[row] = tokens
    generator = torch.Generator().manual_seed(row)
    for layer in made._state.layers:
        for ring in layer.rings():
            ring[row] = torch.randn(ring[row].shape, generator=generator).to(ring)
        for pages in layer.pages():
            own = made._state.owned[row]
            pages[own] = torch.randn(len(own), *pages.shape[1:], generator=generator).to(pages)


def test_a_step_asks_nothing_and_has_one_shape_whatever_its_rows_hold(policy, triton_device, monkeypatch):
    """Two running rows of a bucket of four, then three, at the borders of windows, entries and blocks."""
    made, traces = decoder(policy, triton_device), []
    for row, tokens in enumerate((3, 11)):
        admit(made, row, tokens)
    made._rows_of = lambda num_rows: 4
    made.step([1.0] * 2, [0.5] * 2, 12)  # tables of frequencies are made once
    for rows in (2, 3):
        if rows == 3:
            admit(made, 2, 20)
        made._give([1.0] * rows, [0.5] * rows, None)
        with torch.no_grad(), watched(monkeypatch) as watch:
            made._run(4, made._length_of(21), False, is_bucket=True)
        traces.append(watch.seen)
    assert len(traces[0]) > 100
    assert traces[0] == traces[1]
    assert made._state.position.tolist() == [6, 14, 21, 0]


@torch.no_grad()
def test_a_forward_that_reads_lengths_is_found_out(policy, triton_device, monkeypatch):
    made = decoder(policy, triton_device)
    admit(made, 0, 5)
    tokens, view = made.tokens[:1, None], made._state.view(0, 1)
    with pytest.raises(Asks, match="tolist"), watched(monkeypatch):
        policy.hidden(tokens, state=view)
    with pytest.raises(Asks, match=r"_local_scalar_dense|__int__|item"), watched(monkeypatch):
        monkeypatch.setattr(DecodeState, "check_room", lambda *_: None)
        policy.hidden(tokens, state=view)
    with pytest.raises(Asks, match=r"nonzero|mask"), watched(monkeypatch):
        policy.hidden(
            tokens, state=view, longest=6, lengths=torch.ones(1, dtype=torch.long, device=triton_device)
        )


def test_buckets_draw_what_rows_draw_without_them(policy, triton_device):
    """Splits, picks and tables of a bucket change nothing; products of other row numbers round otherwise."""
    plain, bucketed = decoder(policy, triton_device, captures=False), decoder(policy, triton_device)
    for made in (plain, bucketed):
        for row, tokens in enumerate((3, 30, 11)):
            admit(made, row, tokens)
    for step in range(2):
        given = ([0.0, 1.0, 0.5], [0.1, 0.5, 0.9], 31 + step)
        expected, found = plain.step(*given), bucketed.step(*given)
        assert torch.equal(found[0], expected[0])
        torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0.1)  # bf16 of logits of size ten
    assert bucketed._state.position.tolist() == [5, 32, 13, 0]


def test_the_length_of_a_bucket_changes_no_bit(policy, triton_device):
    drawn = []
    for longest in (24, 72):
        made = decoder(policy, triton_device, max_rows=2)
        for row, tokens in enumerate((3, 19)):
            admit(made, row, tokens)
        made._length_of = lambda _, longest=longest: longest
        drawn += [[made.step([1.0, 0.7], [0.3, 0.6], 20 + step) for step in range(2)]]
    for (tokens, logprobs), (others, other_logprobs) in zip(*drawn):
        assert torch.equal(tokens, others) and torch.equal(logprobs, other_logprobs)
