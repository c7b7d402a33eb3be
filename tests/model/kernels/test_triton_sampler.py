"""The sampler's kernel against `tempered` and `draw`."""

import pytest
import torch

from consilience.rollout.sampling import draw, tempered

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture
def sampler(monkeypatch):
    pytest.importorskip("triton")
    from consilience.model.kernels import triton_sampler

    monkeypatch.setitem(triton_sampler.CHUNK, "size", 16)
    return triton_sampler


def test_three_tokens_worked_by_hand(sampler, triton_device):
    """Probabilities 1/2, 1/3, 1/6: borders at 1/2 and 5/6."""
    logits = torch.tensor([3.0, 2.0, 1.0]).log().expand(6, 3).to(triton_device)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.83, 0.84, 0.999], dtype=torch.float64).to(triton_device)
    tokens, logprobs = sampler.sample(logits, torch.ones(6, device=triton_device), uniform)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.tensor([1 / 2, 1 / 3, 1 / 6]).log()[tokens.cpu()]
    torch.testing.assert_close(logprobs.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 5, 16, 17, 100])
def test_tokens_and_log_probabilities_equal_the_twin_s(vocabulary, dtype, sampler, triton_device):
    g = torch.Generator().manual_seed(vocabulary)
    logits = (4 * torch.randn(60, vocabulary, generator=g)).to(dtype)
    logits[::7, 1::2] = float("-inf")
    temperature = torch.tensor([0.0, 0.3, 1.0, 2.5]).repeat(15)
    uniform = torch.rand(60, generator=g, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 1e-16])
    given = [t.to(triton_device) for t in (logits, temperature, uniform)]
    tokens, logprobs = sampler.sample(*given)
    expected, probabilities = tempered(given[0], temperature)
    twin = draw(probabilities, given[2])
    assert torch.equal(tokens, twin)
    torch.testing.assert_close(logprobs, expected.gather(1, twin[:, None])[:, 0], rtol=1e-5, atol=1e-5)


def test_greedy_takes_the_first_of_equals_and_a_row_of_a_wider_buffer(sampler, triton_device):
    logits = torch.zeros(2, 64, device=triton_device)
    logits[0, [20, 40]], logits[1, 63] = 1.0, 2.0
    zero = torch.zeros(2, device=triton_device)
    tokens, _ = sampler.sample(logits[:, :50], zero, zero.double())
    assert tokens.tolist() == [20, 0]


def test_a_row_has_the_same_bits_in_any_company(sampler, triton_device):
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)).to(triton_device)
    heat, uniform = torch.full((5,), 0.7, device=triton_device), torch.linspace(0.1, 0.9, 5).double()
    uniform = uniform.to(triton_device)
    together = sampler.sample(logits, heat, uniform)
    for row in range(5):
        one = slice(row, row + 1)
        alone = sampler.sample(logits[one], heat[one], uniform[one])
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together))
