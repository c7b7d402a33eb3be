"""dQ and the rows of picks from one kernel against the two kernels that make them apart.

Those are tested against the twin. Tolerances: fp32 sums in another order; fp16 results are rounded from such
sums, so may differ by a bit.
"""

from dataclasses import replace

import pytest
import torch
from attention_cases import case, packed

from consilience.model.kernels import attention_problem
from consilience.model.kernels.attention_problem import problem_of

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


def moved(problem, device, dtype):
    """The problem on a device, in a dtype."""
    kept = {name: x for name, x in vars(problem).items() if isinstance(x, torch.Tensor)}
    place = lambda x: x.detach().to(device, dtype if x.is_floating_point() else None)
    return replace(problem, **{name: place(x) for name, x in kept.items()})


@pytest.mark.parametrize(
    ("heads", "width", "dtype", "tolerance"),
    [(20, 32, torch.float32, 1e-6), (2, 256, torch.float16, 2.0**-10)],
)
def test_one_pass_makes_what_two_make(heads, width, dtype, tolerance, smallest, triton_device, monkeypatch):
    from consilience.model.kernels import triton_attention, triton_attention_backward, triton_attention_rows

    monkeypatch.setattr(attention_problem, "MASK_BELOW", 0.0)
    config = replace(smallest, sliding_window=20)
    query, keys, sink = case(packed(config, 14), config, 4, 3, heads=heads, width=width)
    problem = moved(problem_of(query, keys, sink, width**-0.5), triton_device, dtype)
    assert triton_attention_rows.is_available(problem)
    out, denominator = triton_attention.forward(problem)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    found = []
    for budget, flag in ((1 << 30, False), (1 << 30, True), (1, True)):
        monkeypatch.setattr(attention_problem, "ROWS_BESIDE_QUERY", flag)
        found.append(triton_attention_backward.backward(problem, out, denominator, grad, budget))
    for apart, beside, in_parts in zip(*found):
        assert apart is not None and apart.double().norm() > 0
        assert (beside.double() - apart.double()).norm() <= tolerance * apart.double().norm()
        assert (in_parts.double() - apart.double()).norm() <= tolerance * apart.double().norm()


def test_ranges_and_many_heads_stay_with_two_kernels(smallest):
    from consilience.model.kernels import triton_attention_rows

    for ratio, picks, heads in ((4, None, 3), (0, None, 3), (4, 1, 65)):
        call = case(packed(smallest, 40), smallest, ratio, picks, heads=heads, width=16)
        assert not triton_attention_rows.is_available(problem_of(*call, 0.25))
