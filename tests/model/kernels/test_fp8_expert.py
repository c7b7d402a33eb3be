"""The shared expert in FP8 against its projections and its SwiGLU one by one."""

import pytest
import torch

from consilience.model.kernels import fp8_expert, fp8_linear, gpu_moe

torch.set_num_threads(1)
pytestmark = pytest.mark.triton

LIMIT = 2.0


def given(rows, device, needs=(True,) * 4):
    g = torch.Generator().manual_seed(rows)
    shapes = ((rows, 256), (128, 256), (256, 128), (128, 256))
    made = [torch.randn(*shape, generator=g) * (0.1 if i else 1) for i, shape in enumerate(shapes)]
    return [m.bfloat16().to(device).requires_grad_(n) for m, n in zip(made, needs)]


def apart(x, w1, w2, w3):
    gate, up = fp8_linear.by_kernels(x, w1, w3)
    return fp8_linear.by_kernels(gpu_moe._SwiGLU.apply(gate, up, LIMIT), w2)[0]


ALL = (True,) * 4


@pytest.mark.parametrize(
    "rows,needs",
    [(200, ALL), (3, ALL), (3, (True, False, False, False)), (3, (False, True, True, True)),
     (3, (False, False, True, False))],
)  # fmt: skip
def test_outputs_and_gradients_are_those_of_the_parts(rows, needs, triton_device):
    upstream = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).bfloat16().to(triton_device)
    results = []
    for work in (lambda *leaves: fp8_expert.by_kernels(*leaves, LIMIT), apart):
        leaves = given(rows, triton_device, needs)
        out = work(*leaves)
        out.backward(upstream)
        results.append([out, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)


def test_without_gradients_the_output_is_the_same(triton_device):
    leaves = given(5, triton_device)
    expected = fp8_expert.by_kernels(*leaves, LIMIT)
    with torch.no_grad():
        assert torch.equal(fp8_expert.by_kernels(*leaves, LIMIT), expected)
        leaves[2].neg_()
        assert torch.equal(fp8_expert.by_kernels(*leaves, LIMIT), -expected)
