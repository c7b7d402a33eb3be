"""mHC by hand, Sinkhorn's properties and gradients, and how initialisation keeps streams apart."""

from dataclasses import replace

import pytest
import torch

from consilience.model.config import TINY
from consilience.model.forward_trace import Trace
from consilience.model.hyper_connections import BLOCK, HeadCollapse, HyperConnection, sinkhorn
from consilience.model.initialize import initialize
from consilience.model.kernels import hyper_connections as fused
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


def composed(logits, rounds, eps):
    """Section 3, step 4, on [N, N, R]."""
    x = torch.softmax(logits, 1) + eps
    x = x / (x.sum(0, keepdim=True) + eps)
    for _ in range(rounds - 1):
        x = x / (x.sum(1, keepdim=True) + eps)
        x = x / (x.sum(0, keepdim=True) + eps)
    return x


@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_sinkhorn_gradcheck(rounds):
    logits = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z, rounds, 0.01), (logits,))


@pytest.mark.parametrize("tokens", [1, BLOCK, BLOCK + 3])
def test_sinkhorn_equals_the_plain_twin_forward_and_backward_across_blocks(tokens):
    logits = torch.randn(4, 4, tokens, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(4, 4, tokens, dtype=torch.float64)
    ours, twin = sinkhorn(logits, 20, 1e-6), composed(logits, 20, 1e-6)
    torch.testing.assert_close(ours, twin, rtol=0, atol=1e-14)
    found, expected = (torch.autograd.grad(y, logits, upstream)[0] for y in (ours, twin))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


def test_twenty_rounds_are_doubly_stochastic_and_end_on_columns():
    x = sinkhorn(3 * torch.randn(4, 4, 50, dtype=torch.float64), 20, 1e-6)
    # The last step was a column one: exact up to its eps. Rows have converged as far as 20 rounds go.
    torch.testing.assert_close(x.sum(0), torch.ones(4, 50).double(), rtol=0, atol=2e-6)
    assert (x.sum(1) - 1).abs().max() < 0.05
    one = sinkhorn(3 * torch.randn(4, 4, 50, dtype=torch.float64), 1, 1e-6)
    assert (one.sum(0) - 1).abs().max() < 1e-2 and (one.sum(1) - 1).abs().max() > 0.1


NUM_LAYERS = 61  # Pro's; two connections each
EPS = TINY.hc_eps
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}  # unit roundoff
# The paper's small gates leave the start's uniform mixing nearly as it is; the others are far from it.
GATES = {"small": (0.01, 0.0), "start": (1.0, 0.0), "wild": (4.0, 2.0)}  # scale, std of base


def random_connections(gates, dtype, num_streams=4, width=32, num=2 * NUM_LAYERS):
    """Connections whose dynamic logits have the size of `scale`, as `fn` times a normalised stream is."""
    scale, base_std = GATES[gates]
    g = torch.Generator().manual_seed(num_streams)
    for _ in range(num):
        module = HyperConnection(replace(TINY, hc_mult=num_streams, hidden_size=width))
        with torch.no_grad():
            module.fn.copy_(torch.randn(module.fn.shape, generator=g) / (num_streams * width) ** 0.5)
            module.base.copy_(base_std * torch.randn(module.base.shape, generator=g))
            module.scale.fill_(scale)
        assert fused.is_available(module.fn) and not fused.is_available(module.fn.double())
        yield module.to(dtype)


def random_streams(dtype, num_tokens=40, num_streams=4, width=32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(num_tokens, num_streams, width, generator=g).to(dtype)


# float32 goes through the compiled kernel, float64 through its twin.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_streams", [2, 4, 8])
@pytest.mark.parametrize("gates", GATES)
def test_mixing_matrices_are_positive_and_their_columns_sum_to_one_up_to_eps(gates, num_streams, dtype):
    """The last step divides column k, which holds c, by c + eps: its sum falls short of 1 by eps / (c + eps).

    Before that step rows were normalised; none had summed to more than N, so c is at least the column
    sum of the round before over N + eps, and eps / (c + eps) <= (N + 1) eps. Rounding adds at most
    N + 2 units: N in the divisor, one each for its inverse and the product.
    """
    streams = random_streams(dtype, num_streams=num_streams)
    rounding = (num_streams + 2) * UNIT[dtype]
    for module in random_connections(gates, dtype, num_streams, num=8):
        _, post, comb = module.read(streams)
        assert (comb > 0).all() and (post >= 0).all() and (post <= 2).all()
        short = 1 - comb.double().sum(1)
        assert (short >= -rounding).all() and (short <= (num_streams + 1) * EPS + rounding).all()
        # What the columns hold in all the rows hold too: their sums lie around 1.
        rows = comb.double().sum(2)
        assert ((rows.mean(1) - 1).abs() <= (num_streams + 1) * EPS + rounding).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gates", GATES)
def test_over_61_layers_norm_and_mean_stay_within_the_measured_row_defects(gates, dtype):
    """With d = max |row sum of comb - 1|, for each token and channel over its N streams:

    max |X'| <= max |X|           every new stream is a convex combination of the old ones
    sum |X'| <= (1 + d) sum |X|   a row of comb is how one old stream is dealt out
    |X'|_2 <= sqrt(1 + d) |X|_2   the geometric mean of the two
    |mean X' - mean X| <= d mean |X|, so over layers at most (prod (1 + d) - 1) mean |X_0|
    and what flows back grows by 1 + d at most. A write rounds N + 1 times, at most by a unit each.
    """
    streams = first = random_streams(dtype)
    n = streams.shape[1]
    rounding = (n + 1) * UNIT[dtype]
    growth = torch.ones(len(streams), 1, dtype=torch.float64)  # prod (1 + d), a token
    combs, steps = [], 1.0
    for module in random_connections(gates, dtype):
        with torch.no_grad():
            layer_input, post, comb = module.read(streams)
            streams = module.write(streams, torch.zeros_like(layer_input), post, comb)
        combs.append(comb.double())
        growth *= 1 + (combs[-1].sum(2) - 1).abs().amax(1, keepdim=True)
        steps *= 1 + rounding
    assert len(combs) == 122
    before, after = first.double(), streams.double()
    assert (after.abs().amax(1) <= steps * before.abs().amax(1)).all()
    assert (after.abs().sum(1) <= steps * growth * before.abs().sum(1)).all()
    assert (after.norm(dim=1) <= steps * growth.sqrt() * before.norm(dim=1)).all()
    drift = (after.mean(1) - before.mean(1)).abs()
    assert (drift <= (steps * growth - 1) * before.abs().mean(1)).all()
    back = torch.ones_like(after)
    for comb in reversed(combs):
        back = comb @ back
    assert (back.abs().amax((1, 2)) <= growth[:, 0] * (1 + 1e-12)).all()
    # Seen: 122 eps at the paper's gates, where a defect is eps; 9e-4; and 4.2, at defects up to 0.07 a layer.
    assert float(growth.max()) - 1 < {"small": 1.3e-4, "start": 2e-3, "wild": 10.0}[gates]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 30.0, 1e4, 1e30])
def test_gradients_stay_finite_through_extreme_logits(size, dtype):
    (module,) = random_connections("start", dtype, num=1)
    with torch.no_grad():
        g = torch.Generator().manual_seed(0)
        module.base.copy_(size * torch.randn(24, generator=g))
        module.base[8:12] = torch.tensor([size, -size, size, -size])  # one row of comb: a tie of extremes
    streams = random_streams(dtype).requires_grad_()
    layer_input, post, comb = module.read(streams)
    written = module.write(streams, torch.tanh(layer_input), post, comb)
    assert written.isfinite().all() and (comb > 0).all()
    (written.square().sum() + comb.log().sum()).backward()
    for name, tensor in (("streams", streams), *module.named_parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
    assert streams.grad.any()


def connection(n, d, dtype=torch.float64):
    config = replace(TINY, hc_mult=n, hidden_size=d, hc_eps=0.0)
    module = HyperConnection(config).to(dtype)
    with torch.no_grad():
        module.fn.normal_()
        module.base.normal_()
    return module


def test_two_streams_worked_by_hand():
    """fn = 0 leaves the static parts: pre and post from base, comb by Sinkhorn of log 3."""
    module = connection(2, 1)
    with torch.no_grad():
        module.fn.zero_()
        log3 = float(torch.tensor(3.0, dtype=torch.float64).log())
        module.base.copy_(torch.tensor([0.0, log3, 0.0, log3, log3, 0.0, 0.0, log3]))
    streams = torch.tensor([[[10.0], [20.0]]], dtype=torch.float64)
    y, post, comb = module.read(streams)
    # pre = sigmoid(0), sigmoid(log 3) = 1/2, 3/4; post = twice that; softmax rows (3/4, 1/4), (1/4, 3/4).
    torch.testing.assert_close(
        y, torch.tensor([[10 / 2 + 20 * 3 / 4]], dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(post, torch.tensor([[1.0, 1.5]], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(comb, torch.tensor([[[0.75, 0.25], [0.25, 0.75]]], dtype=torch.float64))
    uneven = torch.tensor([[[0.9, 0.1], [0.2, 0.8]]], dtype=torch.float64)
    written = module.write(streams, torch.tensor([[100.0]], dtype=torch.float64), post, uneven)
    # Destination 0 takes 0.9 of stream 0 and 0.2 of stream 1: the sum runs over the first index.
    expected = torch.tensor([[[100 + 9 + 4.0], [150 + 1 + 16.0]]], dtype=torch.float64)
    torch.testing.assert_close(written, expected)


def test_the_mix_normalises_over_all_streams_and_channels_without_a_weight():
    module = connection(2, 3)
    streams = torch.randn(5, 2, 3, dtype=torch.float64)
    scaled = [module.read(streams * factor)[1] for factor in (100.0, 10000.0)]
    torch.testing.assert_close(scaled[0], scaled[1], rtol=0, atol=1e-7)
    flat = streams.flatten(1)
    mix = (flat / (flat.square().mean(1, keepdim=True) + module.norm_eps).sqrt()) @ module.fn.T
    expected = 2 * torch.sigmoid(module.scale[1] * mix[:, 2:4] + module.base[2:4])
    torch.testing.assert_close(module.read(streams)[1], expected)
    assert expected.max() <= 2 and (expected > 1).any()


def test_gradcheck_through_read_and_write():
    module = connection(3, 2)

    def both(streams, fn, base, scale):
        with_weights = {"fn": fn, "base": base, "scale": scale}
        x, post, comb = torch.func.functional_call(
            Reading(module), {f"m.{k}": v for k, v in with_weights.items()}, (streams,)
        )
        return module.write(streams, x.square(), post, comb)

    class Reading(torch.nn.Module):
        def __init__(self, m):
            super().__init__()
            self.m = m

        def forward(self, streams):
            return self.m.read(streams)

    streams = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    leaves = [p.detach().clone().requires_grad_() for p in (module.fn, module.base, module.scale)]
    assert torch.autograd.gradcheck(both, (streams, *leaves))


def test_head_collapse_is_a_sigmoid_weighted_sum_with_eps():
    module = HeadCollapse(replace(TINY, hc_mult=2, hidden_size=1, hc_eps=0.5)).double()
    with torch.no_grad():
        module.fn.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        module.scale.fill_(2.0)
        module.base.copy_(torch.tensor([0.0, 1.0]))
    streams = torch.tensor([[[3.0], [4.0]]], dtype=torch.float64)
    mix = 3 / (12.5 + 1e-6) ** 0.5
    sigmoid = lambda z: 1 / (1 + torch.exp(torch.tensor(-z, dtype=torch.float64)))
    expected = (sigmoid(2 * mix) + 0.5) * 3 + (sigmoid(1.0) + 0.5) * 4
    torch.testing.assert_close(module(streams)[0, 0], expected)
    streams.requires_grad_()
    assert torch.autograd.gradcheck(module, (streams,))


def test_bf16_streams_are_mixed_in_fp32_and_cast_once():
    module = connection(4, 8, torch.float32)
    streams, output = torch.randn(6, 4, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    x, post, comb = module.read(streams)
    assert x.dtype == torch.bfloat16 and post.dtype == comb.dtype == torch.float32
    written = module.write(streams, output, post, comb)
    exact = module.write(streams.float(), output.float(), post, comb)
    assert torch.equal(written, exact.bfloat16())


def test_after_initialisation_streams_differ_and_so_do_their_gradients():
    """Four copies of the embedding enter; what leaves, and what flows back, differs stream by stream."""
    model = initialize(Transformer(TINY), seed=0)
    tokens = torch.randint(TINY.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))
    seen = []

    def keep(_module, inputs):
        inputs[0].retain_grad()
        seen.append(inputs[0])

    for block in model.layers:
        block.register_forward_pre_hook(keep)
    trace = Trace()
    model(tokens, trace=trace).log_softmax(-1).gather(2, tokens[..., None]).sum().backward()
    pairs = [(i, j) for i in range(TINY.hc_mult) for j in range(i)]
    apart = lambda t, i, j: ((t[:, i] - t[:, j]).norm() / t.norm()).item()
    assert all(apart(seen[0], i, j) == 0 for i, j in pairs)
    # Copies would differ by rounding at most, about 1e-6; the closest random pair is some 1e-3 apart.
    for streams in seen[1:]:
        assert all(apart(streams, i, j) > 1e-4 for i, j in pairs)
    for streams in seen:
        assert all(apart(streams.grad, i, j) > 1e-4 for i, j in pairs)
    assert trace.stream_spread > 0.05


def test_after_initialisation_the_rows_of_every_mixing_matrix_get_different_gradients():
    """Equal rows would stay equal under every update: this is the symmetry that must be broken."""
    model = initialize(Transformer(TINY), seed=1)
    tokens = torch.randint(TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    n = TINY.hc_mult
    for block in model.layers:
        for module in (block.hc_attn, block.hc_ffn):
            pre, post = module.fn.grad[:n], module.fn.grad[n : 2 * n]
            for rows in (pre, post):
                gaps = torch.cdist(rows, rows) + torch.eye(n) * 1e9
                assert gaps.min() > 1e-3 * rows.norm(dim=1).max() > 0
