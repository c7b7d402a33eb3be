"""Attention's kernels with hand-placed copies against dense fp64: on Hopper as they are, else emulated.

The emulation (emulated_gluon.py) keeps the kernels' roundings. Tolerances: bf16 rounds probabilities, dS and
results to 8 bits: 2^-9 relative at most each, so RMS errors stay below twice that.
"""

import types
from dataclasses import replace

import pytest
import torch
from emulated_gluon import Descriptor, run

from consilience.model.kernels.attention_problem import GATHER, MASK, RANGE, Problem

pytestmark = pytest.mark.triton
torch.set_num_threads(1)
ROUNDING = 2.0**-8
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


class Emulated:
    """`kernel[grid](…)` on the CPU."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *given, num_warps, **constants: run(self.kernel, *grid, *given, **constants)


@pytest.fixture
def modules(monkeypatch):
    """Forward, weights, backward and their parts; three programs share the work where there is no GPU."""
    from consilience.model.kernels import triton_attention_backward_gluon as backward
    from consilience.model.kernels import triton_attention_gluon as forward
    from consilience.model.kernels import triton_attention_parts_gluon as parts
    from consilience.model.kernels import triton_attention_weights_gluon as weights

    if not HAS_HOPPER:
        monkeypatch.setattr(forward, "_forward", Emulated(forward._forward))
        monkeypatch.setattr(weights, "_weigh", Emulated(weights._weigh))
        monkeypatch.setattr(backward, "_backward", Emulated(backward._backward))
        chip = types.SimpleNamespace(major=9, multi_processor_count=3)
        for module in (forward, weights, backward, parts):
            monkeypatch.setattr(module, "chip_of", lambda x: chip)
            monkeypatch.setattr(module, "flat", lambda x, width=512: Descriptor(x.view(-1, 512), [64, width]))
    return forward, weights, backward, parts


def make(
    kind, heads=64, num_queries=5, offset=70, size=128, num_entries=150, num_picks=100, dtype=torch.bfloat16
):
    """Two rows; samples that begin inside the window, entries and picks of every number, none too."""
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    token = offset + torch.arange(num_queries).expand(2, -1)
    oldest = (token + 1 - size).clamp(min=0)
    oldest[1, 2:] = token[1, 2]
    first = torch.tensor([[0, 0, 3, 7, 0], [0, 40, 0, 0, 149]])[:, :num_queries].contiguous()
    stop = torch.tensor([[0, 150, 67, 8, 99], [150, 149, 64, 1, 150]])[:, :num_queries].contiguous()
    picks = torch.full((2, num_queries, num_picks), -1)
    for row in range(2):
        for query in range(num_queries):
            low, high = int(first[row, query]), int(stop[row, query])
            found = (low + torch.randperm(high - low, generator=g))[:num_picks].sort().values
            picks[row, query, : len(found)] = found
    # Fewer than are visible.
    picks[1, 0, 33:] = -1
    has_entries = kind != "window"
    problem = Problem(
        query=draw(2, num_queries, heads, 512),
        window=draw(2, offset + num_queries, 512),
        entries=draw(2, num_entries, 512) if has_entries else None,
        chosen=picks if kind == "picks" else None,
        oldest=oldest,
        first=first if has_entries else None,
        stop=stop if has_entries else None,
        sink=torch.randn(heads, generator=g),
        scale=512**-0.5,
        offset=offset,
        size=size,
    )
    if not HAS_HOPPER:
        return problem
    move = lambda x: x.cuda() if isinstance(x, torch.Tensor) else x
    return Problem(**{name: move(x) for name, x in vars(problem).items()})


def dense(problem):
    """Keys [B, S + M, C], logits [B, T, H, S + M] and which keys are seen [B, T, S + M], in fp64."""
    token = problem.offset + torch.arange(problem.query.shape[1], device=problem.query.device)[:, None]
    slot = torch.arange(problem.window.shape[1], device=token.device)
    seen = (slot >= problem.oldest[..., None]) & (slot <= token) & (slot > token - problem.size)
    keys = problem.window.double()
    if problem.entries is not None:
        keys = torch.cat((keys, problem.entries.double()), 1)
        column = torch.arange(problem.num_entries, device=token.device)
        far = (column >= problem.first[..., None]) & (column < problem.stop[..., None])
        if problem.mode == GATHER:
            far = (problem.chosen[..., None] == column).any(2)
        seen = torch.cat((seen, far), -1)
    logits = torch.einsum("bthc,bnc->bthn", problem.query.double(), keys) * problem.scale
    return keys, logits.masked_fill(~seen[:, :, None], float("-inf")), seen


def solve(problem):
    """Output, log2 of the denominator, P [B, T, H, N]."""
    keys, logits, _ = dense(problem)
    sink = problem.sink.double().expand(logits.shape[:3])[..., None]
    full = torch.logsumexp(torch.cat((logits, sink), -1), -1)
    p = (logits - full[..., None]).exp()
    return torch.einsum("bthn,bnc->bthc", p, keys), full / torch.log(torch.tensor(2.0)), p


def error(found, wanted):
    return ((found.double() - wanted).square().mean() / wanted.square().mean()).sqrt()


KINDS = ["window", "range", "picks"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "size", "offset"), [(64, 128, 0), (128, 100, 130)])
def test_forward_equals_dense_attention(kind, heads, size, offset, modules):
    problem = make(kind, heads=heads, size=size, offset=offset)
    assert modules[3].is_available(problem)
    out, denominator = modules[0].forward(problem)
    wanted, full, _ = solve(problem)
    assert out.dtype == torch.bfloat16 and error(out, wanted) < ROUNDING
    # Sums of exact products in fp32: what is left of 8 decimal digits after a few hundred additions.
    assert (denominator.double() - full).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["window", "range"])
@pytest.mark.parametrize(("heads", "size", "offset"), [(64, 128, 0), (128, 100, 130)])
def test_weights_of_a_range_of_queries_equal_dense_attention(kind, heads, size, offset, modules):
    problem = make(kind, heads=heads, size=size, offset=offset)
    out, full, p = solve(problem)
    keys, _, _ = dense(problem)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(problem.query)
    begin, end = 1, 5
    # What the kernel must not write keeps its 7.
    near = problem.query.new_full((2, end - begin, size, 2, heads), 7.0)
    far = problem.query.new_full((2, end - begin, problem.num_entries, 2, heads), 7.0)
    d_sink = torch.full(full.shape, 7.0, device=near.device)
    given = (out.to(problem.query), full.float()), grad, (near, far), d_sink
    modules[1].weigh(problem, *given, begin, end)

    rounded = out.to(problem.query).double()
    delta = (grad.double() * rounded).sum(-1, keepdim=True)
    d_s = p * (torch.einsum("bthc,bnc->bthn", grad.double(), keys) - delta) * problem.scale
    both = torch.stack((p, d_s), 3)[:, begin:end].permute(0, 1, 4, 3, 2)
    wanted_near, wanted_far = torch.zeros_like(near).double(), torch.full_like(far, 7.0).double()
    for row in range(2):
        for query in range(begin, end):
            for slot in range(size):
                key = problem.offset + query + 1 - size + slot
                if key >= 0:
                    wanted_near[row, query - begin, slot] = both[row, query - begin, key]
            count = 0 if kind == "window" else int(problem.stop[row, query] - problem.first[row, query])
            for slot in range(count):
                column = problem.first[row, query] + slot
                wanted_far[row, query - begin, column] = both[
                    row, query - begin, problem.window.shape[1] + column
                ]
    assert error(near[..., 0, :], wanted_near[..., 0, :]) < ROUNDING
    assert error(near[..., 1, :], wanted_near[..., 1, :]) < ROUNDING
    assert torch.equal(far == 7.0, wanted_far == 7.0)
    if kind != "window":
        kept = wanted_far[..., 0, :] != 7.0
        for which in (0, 1):
            assert error(far[..., which, :][kept], wanted_far[..., which, :][kept]) < ROUNDING
    wanted = -delta[..., 0] * (problem.sink.double() - full * torch.log(torch.tensor(2.0))).exp()
    assert error(d_sink[:, begin:end], wanted[:, begin:end]) < ROUNDING
    assert (d_sink[:, :begin] == 7.0).all()


def gradients(problem, grad):
    """Of query, window, entries and sink, in fp64, from the output as it is stored."""
    keys, _, _ = dense(problem)
    out, full, p = solve(problem)
    grad, query = grad.double(), problem.query.double()
    delta = (grad * out.to(problem.query).double()).sum(-1, keepdim=True)
    d_s = p * (torch.einsum("bthc,bnc->bthn", grad, keys) - delta) * problem.scale
    d_keys = torch.einsum("bthn,bthc->bnc", p, grad) + torch.einsum("bthn,bthc->bnc", d_s, query)
    num = problem.window.shape[1]
    d_sink = -delta[..., 0] * (problem.sink.double() - full * torch.log(torch.tensor(2.0))).exp()
    d_entries = None if problem.entries is None else d_keys[:, num:]
    return torch.einsum("bthn,bnc->bthc", d_s, keys), d_keys[:, :num], d_entries, d_sink.sum((0, 1))


def backward_of(modules, problem):
    out, lse, _ = solve(problem)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(problem.query)
    return modules[2].backward(problem, out.to(problem.query), lse.float(), grad), gradients(problem, grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("heads", "size", "offset"), [(64, 128, 0), (128, 100, 130)])
def test_gradients_equal_those_of_dense_attention(kind, heads, size, offset, modules):
    found, wanted = backward_of(modules, make(kind, heads=heads, size=size, offset=offset))
    for x, y in zip(found, wanted):
        assert (x is None) == (y is None)
        assert x is None or error(x, y) < ROUNDING


def test_gradients_of_queries_in_several_ranges_are_those_of_one(modules, monkeypatch):
    problem = make("picks")
    whole, _ = backward_of(modules, problem)
    monkeypatch.setattr(modules[2], "RANGE", 3)
    parts, wanted = backward_of(modules, problem)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[3], parts[3])
    for x, y in zip(parts[1:3], wanted[1:3]):
        assert error(x, y) < ROUNDING


def test_sums_that_a_sampled_scale_would_overflow_are_made_again(modules, monkeypatch):
    problem = make("picks")
    once, wanted = backward_of(modules, problem)
    monkeypatch.setattr(
        modules[2], "ROOM", (2.0**-9, 2.0**-9)
    )  # as if the largest had not been among those measured
    again, _ = backward_of(modules, problem)
    for x, y, right in zip(once, again, wanted):
        assert error(y, right) < ROUNDING and error(x, y.double()) < ROUNDING


def test_sums_of_parts_that_were_not_finite_are_not_a_number(modules):
    device = "cuda" if HAS_HOPPER else "cpu"
    sums = torch.tensor([[5 + (7 << 32), -3 + (-2 << 32)]], device=device)
    scales, found = torch.tensor([4.0, 2.0], device=device), torch.full((1, 4), 9.0, device=device)
    for top, wanted in ((1.5, [1.25, 1.75, -0.75, -0.5]), (float("inf"), [float("nan")] * 4)):
        largest = torch.tensor([top, 0.0], device=device).view(torch.int32)
        modules[2].unpack[(1,)](sums, scales, largest, found, 2, INDEX=0, ADDS=False, BLOCK=16)
        torch.testing.assert_close(found[0].cpu(), torch.tensor(wanted), rtol=0, atol=0, equal_nan=True)


def test_other_shapes_stay_with_the_plain_kernels(modules):
    is_available = modules[3].is_available
    problem = make("range")
    assert problem.mode == RANGE and is_available(problem)
    mask = torch.zeros(2, 5, 150, dtype=torch.uint8)
    assert replace(problem, chosen=mask).mode == MASK and not is_available(replace(problem, chosen=mask))
    for query in (problem.query[..., :256], problem.query[:, :, :32], problem.query.float()):
        assert not is_available(replace(problem, query=query))
    assert not is_available(replace(problem, size=96))
