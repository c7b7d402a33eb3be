"""Muon against an fp64 SVD, and the claim that a batch of matrices equals the matrices one by one."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.kernels.newton_schulz import COEFFICIENTS
from consilience.training.muon import Muon, MuonParameter

torch.set_num_threads(1)


def parameter(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    p = torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype))
    p.grad = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return p


def iterate_singular_values(x):
    """What the ten steps do to a singular value: the matrix iteration is this scalar one on each."""
    for a, b, c in COEFFICIENTS:
        x = a * x + b * x**3 + c * x**5
    return x


def reference_step(w, m, g, lr, momentum=0.95, decay=0.1, rms=0.18):
    """Algorithm 1 for one matrix in fp64, the orthogonal factor from the mapped SVD."""
    m = momentum * m + g
    nesterov = g + momentum * m
    u, s, vh = torch.linalg.svd(nesterov, full_matrices=False)
    mapped = iterate_singular_values(s / torch.linalg.vector_norm(nesterov))
    o = (u * mapped) @ vh * max(w.shape) ** 0.5 * rms
    return w * (1 - lr * decay) - lr * o, m


def test_three_steps_follow_algorithm_one_in_fp64():
    p = parameter(12, 20, dtype=torch.float64)
    muon = Muon([MuonParameter("w", p, (12,))])
    w, m = p.detach().clone(), torch.zeros(12, 20, dtype=torch.float64)
    for step in range(3):
        p.grad = parameter(12, 20, seed=step + 1, dtype=torch.float64).grad
        w, m = reference_step(w, m, p.grad, lr=0.02)
        muon.step(0.02)
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-9)
    torch.testing.assert_close(muon.state_tensors()["w"], m, rtol=0, atol=1e-12)


def test_the_first_update_has_the_rms_that_makes_adamws_learning_rate_fit():
    for shape in ((32, 96), (96, 32)):
        p = parameter(*shape)
        before = p.detach().clone()
        Muon([MuonParameter("w", p, (shape[0],))], weight_decay=0.0).step(1.0)
        assert (p.detach() - before).square().mean().sqrt().item() == pytest.approx(0.18, rel=0.05)


LAYOUTS = {
    "experts": ((5, 8, 12), (8,)),
    "experts_down": ((5, 12, 8), (12,)),
    "wo_a": ((24, 10), (8, 8, 8)),
    "halves": ((16, 12), (8, 8)),
    "mhc": ((24, 32), (4, 4, 16)),
    "stack_of_blocks": ((3, 10, 12), (4, 6)),
    "plain": ((8, 12), (8,)),
    "row": ((1, 7), (1,)),
}


def split_by_hand(tensor, blocks):
    matrices = tensor if tensor.ndim == 3 else tensor[None]
    return [block for matrix in matrices for block in matrix.split(list(blocks))]


def test_batched_and_split_matrices_move_as_if_each_were_alone():
    together = {
        name: parameter(*shape, seed=i) for i, (name, (shape, _)) in enumerate(sorted(LAYOUTS.items()))
    }
    alone = {
        name: [
            (torch.nn.Parameter(w.detach().clone()), g)
            for w, g in zip(split_by_hand(p, LAYOUTS[name][1]), split_by_hand(p.grad, LAYOUTS[name][1]))
        ]
        for name, p in together.items()
    }
    muon = Muon([MuonParameter(name, p, LAYOUTS[name][1]) for name, p in together.items()])
    for _ in range(3):
        muon.step(0.05)
    for name, p in together.items():
        for (w, g), moved in zip(alone[name], split_by_hand(p.detach(), LAYOUTS[name][1])):
            w.grad = g.clone()
            single = Muon([MuonParameter("w", w, (w.shape[0],))])
            for _ in range(3):
                single.step(0.05)
            torch.testing.assert_close(
                moved, w.detach(), rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_one_block_as_a_whole_is_not_the_same_as_its_halves():
    whole, halves = parameter(16, 12), parameter(16, 12)
    Muon([MuonParameter("w", whole, (16,))]).step(0.1)
    Muon([MuonParameter("w", halves, (8, 8))]).step(0.1)
    assert (whole - halves).abs().max() > 1e-2


def test_a_parameter_without_a_gradient_is_left_alone_and_keeps_its_momentum():
    p, q = parameter(4, 6), parameter(4, 6, seed=1)
    muon = Muon([MuonParameter("p", p, (4,)), MuonParameter("q", q, (4,))])
    muon.step(0.1)
    kept, momentum = q.detach().clone(), muon.state_tensors()["q"].clone()
    q.grad = None
    muon.step(0.1)
    assert torch.equal(q.detach(), kept) and torch.equal(muon.state_tensors()["q"], momentum)


def test_gradients_are_not_changed_by_a_step():
    p = parameter(4, 6)
    g = p.grad.clone()
    Muon([MuonParameter("p", p, (4,))]).step(0.1)
    assert torch.equal(p.grad, g)


def test_bf16_parameters_keep_fp32_momentum():
    p = parameter(4, 6, dtype=torch.bfloat16)
    before = p.detach().clone()
    muon = Muon([MuonParameter("p", p, (4,))])
    muon.step(0.1)
    assert muon.state_tensors()["p"].dtype == torch.float32
    assert p.dtype == torch.bfloat16 and not torch.equal(p.detach(), before)


def test_a_vector_or_blocks_that_do_not_sum_are_refused():
    with pytest.raises(EngineError, match=r"norm: Muon updates .* found shape \[4\]"):
        Muon([MuonParameter("norm", torch.nn.Parameter(torch.ones(4)), (4,))])
    with pytest.raises(EngineError, match="row blocks sum to n"):
        Muon([MuonParameter("w", parameter(4, 6), (2, 3))])
