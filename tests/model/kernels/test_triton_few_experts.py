"""The experts' kernels for few tokens against the twin in fp64 and the kernels for many."""

import pytest
import torch

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

LIMIT = 1.5


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton")
    from consilience.model.kernels import triton_few_experts

    for table in (triton_few_experts.INNER, triton_few_experts.DOWN):  # several tiles each way
        monkeypatch.setitem(table, "outputs", 16)
        monkeypatch.setitem(table, "inputs", 16)
    monkeypatch.setattr(triton_few_experts, "MOST_PAIRS", 16)
    monkeypatch.setattr(triton_few_experts, "PAIRS", 16)
    return triton_few_experts


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(tokens, topk, num_experts, width=40, inner=24):
    """Tokens, weights and experts (nobody chooses odd ones), masters, what the shared expert gave."""
    g = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, num_experts, generator=g)
    scores[:, 1::2] = -1.0
    experts = scores.argsort(1, descending=True)[:, :topk].contiguous()
    shapes = ((num_experts, inner, width), (num_experts, width, inner), (num_experts, inner, width))
    masters = [normal(*s, seed=n, scale=0.3).bfloat16() for n, s in enumerate(shapes)]
    hidden, shared = (normal(tokens, width, seed=s).bfloat16() for s in (7, 8))
    weights = torch.rand(tokens, topk, generator=g)
    return hidden, weights, experts, masters, shared


def run(kernels, given, device):
    hidden, weights, experts, masters, shared = given
    on = lambda t: t.to(device)
    masters = tuple(map(on, masters))
    return kernels.few_experts(on(hidden), on(weights), on(experts), masters, LIMIT, on(shared)).cpu()


def twin(hidden, weights, experts, masters, shared, dtype=torch.float64):
    """Σ_k weight_k · w2 (silu(min(w1 h, limit)) · clamp(w3 h)) + shared, token by token."""
    w1, w2, w3 = (w.to(dtype) for w in masters)
    out = shared.to(dtype).clone()
    for row, h in enumerate(hidden.to(dtype)):
        for weight, e in zip(weights[row].to(dtype), experts[row]):
            gate, up = (w1[e] @ h).clamp(max=LIMIT), (w3[e] @ h).clamp(-LIMIT, LIMIT)
            out[row] += weight * (w2[e] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_a_token_and_two_experts_worked_by_hand(kernels, triton_device):
    """Gates of 1 and 2 beside ups of 1: silu(1) to channel 0, silu(1.5) to 5, the limit, each weighted."""
    one = torch.zeros(1, 8).bfloat16()
    one[0, 0] = 1.0
    w1, w2, w3 = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    w1[0, 0, 0], w1[1, 0, 0] = 1.0, 2.0
    w3[:, 0, 0] = 1.0
    w2[0, 0, 0], w2[1, 5, 0] = 1.0, 1.0
    given = (one, torch.tensor([[0.5, 0.25]]), torch.tensor([[1, 0]]), [w.bfloat16() for w in (w1, w2, w3)])
    found = run(kernels, (*given, torch.zeros(1, 8).bfloat16()), triton_device)[0].float()
    expected = torch.zeros(8)
    expected[5] = 0.5 * 1.5 / (1 + torch.tensor(-1.5).exp())
    expected[0] = 0.25 / (1 + torch.tensor(-1.0).exp())
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)  # two roundings to bf16


@pytest.mark.parametrize(("tokens", "topk", "num_experts"), [(1, 1, 1), (1, 2, 6), (9, 3, 8), (40, 2, 4)])
def test_outputs_equal_the_twin_in_fp64_to_the_roundings(tokens, topk, num_experts, kernels, triton_device):
    given = problem(tokens, topk, num_experts)
    found, expected = run(kernels, given, triton_device).double(), twin(*given)
    # Gate, up, their product, each expert's output and the sum are rounded to bf16, 2**-9 each.
    assert (found - expected).norm() < 5 * 2**-9 * expected.norm()


@pytest.mark.parametrize(("tokens", "topk", "num_experts"), [(1, 1, 1), (7, 2, 5), (64, 6, 40), (50, 3, 3)])
def test_pairs_are_sorted_as_for_many_tokens(tokens, topk, num_experts, kernels, triton_device):
    from consilience.model.kernels.triton_route import sort_pairs

    g = torch.Generator().manual_seed(tokens)
    experts = (torch.randint(num_experts, (tokens, topk), generator=g) // 2 * 2 % num_experts).to(
        triton_device
    )
    pairs = zip(kernels.sort_few(experts, num_experts), sort_pairs(experts, num_experts))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def test_weights_of_experts_that_no_token_chose_are_not_touched(kernels, triton_device):
    given = problem(5, 2, 6)
    for master in given[3]:
        master[1::2] = float("nan")
    assert run(kernels, given, triton_device).isfinite().all()


def test_a_row_has_the_same_bits_in_any_company(kernels, triton_device):
    """Also of another tile: one token goes through 16 rows at once, forty through as many, in three turns."""
    hidden, weights, experts, masters, shared = problem(40, 2, 4)
    together = run(kernels, (hidden, weights, experts, masters, shared), triton_device)
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        alone = (hidden[one], weights[one], experts[one], masters, shared[one])
        assert torch.equal(run(kernels, alone, triton_device)[0], together[row])


@torch.no_grad()
def test_the_mixture_takes_them_for_few_tokens_without_a_gradient(kernels, triton_device, monkeypatch):
    from consilience.model.kernels import gpu_moe

    hidden, weights, experts, masters, shared = (
        [w.to(triton_device) for w in t] if isinstance(t, list) else t.to(triton_device)
        for t in problem(6, 2, 4)
    )
    given = (hidden, weights, experts, tuple(masters), LIMIT, shared)
    few = gpu_moe.routed_experts(*given)
    assert torch.equal(few, kernels.few_experts(*given))
    monkeypatch.setattr(gpu_moe, "FEW_TOKENS", 5)
    many = gpu_moe.routed_experts(*given)
    torch.testing.assert_close(few.float(), many.float(), rtol=2**-6, atol=2**-6)
