"""mHC's Triton kernels against the definition in fp64: values, gradients, odd sizes, whatever the batch.

Under the interpreter bfloat16 is rounded towards zero, by less than 2^-7; a GPU rounds to nearest, by 2^-8.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from consilience.model.config import TINY
from consilience.model.hyper_connections import HeadCollapse, HyperConnection, settle
from consilience.model.kernels import gpu_hyper_connections as gpu

pytestmark = pytest.mark.triton

NAMES = (
    "streams",
    "layer_input",
    "post",
    "comb",
    "d_streams",
    "d_output",
    "d_post",
    "d_comb",
    "fn",
    "base",
    "scale",
)
# One block of tokens or several with a rest, one split of the width or several, a width no tile divides,
# groups of tokens with several blocks each and with none.
SIZES = [(1, 64, 4), (19, 40, 4), (200, 16, 2), (3, 264, 4)]


def _module(width: int, num_streams: int = 4, kind: type = HyperConnection):
    torch.manual_seed(width)
    module = kind(replace(TINY, hc_mult=num_streams, hidden_size=width))
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return module


def _reader(module: HyperConnection | HeadCollapse) -> gpu.Reader:
    rounds = getattr(module, "rounds", 0)
    return gpu.Reader(module.fn, module.base, module.scale, rounds, module.eps, module.norm_eps)


def _written(num_tokens: int, width: int, n: int, dtype: torch.dtype, device: str = "cpu") -> gpu.Written:
    torch.manual_seed(num_tokens)
    streams = torch.randn(num_tokens, n, width).to(dtype)
    output = torch.randn(num_tokens, width).to(dtype)
    post = 2 * torch.rand(num_tokens, n)
    comb = torch.softmax(torch.randn(num_tokens, n, n), -1)
    return gpu.Written(*(t.to(device) for t in (streams, output, post, comb)))


def _upstream(values: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(v.shape, generator=generator).to(v.device, v.dtype) for v in values]


def _ours(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Values of a write and read, then the gradients of what was written and of the parameters."""
    num_tokens, width, n = size
    module = _module(width, n).to(device)
    leaves = [t.requires_grad_() for t in _written(num_tokens, width, n, dtype, device)]
    values = gpu.write_read(gpu.Written(*leaves), _reader(module))
    gradients = torch.autograd.grad(values, [*leaves, *module.parameters()], _upstream(values))
    return [t.detach().cpu() for t in (*values, *gradients)]


def _exact(size: tuple[int, int, int], dtype: torch.dtype, rounded: Tensor) -> list[Tensor]:
    """The same by the definition in fp64; what is read are the new streams as `rounded` to their type."""
    num_tokens, width, n = size
    module = _module(width, n).double()
    leaves = [t.double().requires_grad_() for t in _written(num_tokens, width, n, dtype)]
    unrounded = module.write(*leaves)
    new = unrounded + (rounded.double() - unrounded).detach()
    values = new, *module.read_plainly(new)
    upstream = [
        g.to(v.dtype).double() for g, v in zip(_upstream(values), [rounded] * 2 + [leaves[2].float()] * 2)
    ]
    gradients = torch.autograd.grad(values, [*leaves, *module.parameters()], upstream)
    return [t.detach() for t in (unrounded, *values[1:], *gradients)]


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients_in_fp32_are_those_of_the_definition_in_fp64(size, triton_device):
    ours = _ours(size, torch.float32, triton_device)
    for name, found, exact in zip(NAMES, ours, _exact(size, torch.float32, ours[0])):
        assert found.dtype == torch.float32, name
        # As the compiled twin's: fp32 sums of up to N·D products, and forty divisions in a row.
        assert_close(found.double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16_streams_cost_one_rounding_and_their_coefficients_none(size, triton_device):
    ours = _ours(size, torch.bfloat16, triton_device)
    for name, found, exact in zip(NAMES, ours, _exact(size, torch.bfloat16, ours[0])):
        error = float((found.double() - exact).norm() / exact.norm().clamp(min=1e-9))
        if name in ("streams", "layer_input", "d_streams", "d_output"):
            assert found.dtype == torch.bfloat16
            assert error < 2**-7, (name, error)
        elif name in ("post", "comb"):
            assert found.dtype == torch.float32
            assert error < 2**-15, (name, error)  # `fn` in two pieces is short by 2^-17 a product
        else:
            assert found.dtype == torch.float32
            assert error < 2**-10, (name, error)  # through a product in tf32, which keeps 11 bits


def test_a_token_by_hand(triton_device):
    """N 2, D 2, `fn` 0: pre = 1/2, post = 1, comb = 1/2 everywhere, whatever is read."""
    config = replace(TINY, hc_mult=2, hidden_size=2, hc_eps=0.0)
    module = HyperConnection(config).to(triton_device)
    torch.nn.init.zeros_(module.fn)
    one = {"device": triton_device}
    streams = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], **one)
    output = torch.tensor([[10.0, 20.0]], **one)
    post, comb = torch.tensor([[1.0, 2.0]], **one), torch.tensor([[[1.0, 0.25], [0.0, 0.75]]], **one)
    new, read, next_post, next_comb = gpu.write_read(
        gpu.Written(streams, output, post, comb), _reader(module)
    )
    # Destination k gets sum_j comb[j, k] X_j: the first X_0 alone, the second X_0 / 4 + X_1 3 / 4.
    assert new.tolist() == [[[11.0, 22.0], [22.5, 43.5]]]
    assert read.tolist() == [[16.75, 32.75]]
    assert next_post.tolist() == [[1.0, 1.0]]
    assert_close(next_comb.cpu(), torch.full((1, 2, 2), 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_or_one_after_the_other_the_values_are_the_same_bits(dtype, triton_device):
    module = _module(40).to(triton_device)
    written = _written(19, 40, 4, dtype, triton_device)
    together = gpu.write_read(written, _reader(module))
    new = gpu.write(*written)
    apart = (new, *gpu.read(new, _reader(module)))
    assert all(torch.equal(a, b) for a, b in zip(together, apart))


def test_gradients_of_a_read_a_write_and_a_collapse_in_a_row_are_those_in_fp64(triton_device):
    def run(dtype: torch.dtype, device: str) -> list[Tensor]:
        connection, collapse = _module(40).to(device, dtype), _module(40, kind=HeadCollapse).to(device, dtype)
        x = _written(19, 40, 4, torch.float32, device).streams.to(dtype).requires_grad_()
        if dtype == torch.float32:
            read, post, comb = gpu.read(x, _reader(connection))
            new = gpu.write(x, torch.tanh(read), post, comb)
            out = gpu.read(new, _reader(collapse))[0]
        else:
            read, post, comb = connection.read_plainly(x)
            out = collapse(connection.write(x, torch.tanh(read), post, comb))
        parameters = [*connection.parameters(), *collapse.parameters()]
        gradients = torch.autograd.grad(out, [x, *parameters], _upstream((out.float(),))[0].to(dtype))
        return [t.detach().cpu() for t in (out, *gradients)]

    for found, exact in zip(run(torch.float32, triton_device), run(torch.float64, "cpu")):
        assert_close(found.double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()) + 1e-9)


def test_a_tokens_values_and_gradients_do_not_depend_on_the_tokens_beside_it(triton_device):
    module = _module(264).to(triton_device)
    whole = _written(19, 264, 4, torch.bfloat16, triton_device)

    def run(first: int, last: int) -> list[Tensor]:
        leaves = [t[first:last].clone().requires_grad_() for t in whole]
        values = gpu.write_read(gpu.Written(*leaves), _reader(module))
        upstream = [torch.linspace(-1, 1, v[0].numel(), device=v.device, dtype=v.dtype) for v in values]
        upstream = [u.view_as(v[0]).expand_as(v) for u, v in zip(upstream, values)]
        return [*values, *torch.autograd.grad(values, leaves, upstream)]

    together = run(0, 19)
    for first, last in ((0, 1), (15, 18)):
        assert all(torch.equal(a, b[first:last]) for a, b in zip(run(first, last), together))


def test_two_runs_give_the_same_bits(triton_device):
    first, second = (_ours((19, 40, 4), torch.bfloat16, triton_device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_streams_passed_on_unwritten_are_received_as_the_streams_written(triton_device):
    module = _module(40).to(triton_device)
    written = _written(19, 40, 4, torch.float32, triton_device)
    unwritten, now = module.receive(written), module.receive(module.write(*written))
    for a, b in zip(unwritten, now):
        assert_close(a, b, rtol=1e-4, atol=2e-6)
    assert torch.equal(settle(written), unwritten[0])
    assert settle(now[0]) is now[0]


def test_gradients_of_an_expanded_embedding_arrive(triton_device):
    """The first block reads one embedding N times, without a copy."""
    module = _module(64).to(triton_device)
    embedding = torch.randn(3, 64, device=triton_device).requires_grad_()
    read, *_ = gpu.read(embedding[:, None].expand(-1, 4, -1), _reader(module))
    (gradient,) = torch.autograd.grad(read.sum(), embedding)
    assert gradient.shape == (3, 64) and bool(gradient.abs().sum() > 0)


def test_what_the_kernels_do_not_take_goes_to_the_twin():
    streams, coefficient = torch.zeros(3, 4, 8), torch.zeros(3)
    assert gpu._fits(streams, None, coefficient)
    assert gpu._fits(streams.bfloat16(), torch.zeros(3, 8).bfloat16(), coefficient)
    assert not gpu._fits(streams.bfloat16(), torch.zeros(3, 8), coefficient)
    assert not gpu._fits(streams.half(), None, coefficient)
    assert not gpu._fits(torch.zeros(3, 3, 8), None, coefficient)
    assert not gpu._fits(streams[:0], None, coefficient)
    assert not gpu._fits(streams, None, coefficient.bfloat16())
    assert not gpu.is_available(streams, None, coefficient)  # on a CPU
