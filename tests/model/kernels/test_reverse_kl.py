"""The exact reverse KL against its plain twin, fp64 autograd, finite differences and a memory bound."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consilience.model.kernels.reverse_kl import reverse_kl, reverse_kl_dense

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[3]


def inputs(n=11, V=23, D=5, Dt=8, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.rand(n, generator=g, dtype=torch.float64).to(dtype)
    weight[1::3] = 0
    return draw(n, D).requires_grad_(), draw(V, D).requires_grad_(), draw(n, Dt), draw(V, Dt), weight


def test_one_token_worked_by_hand():
    # Student p = (1/4, 3/4), teacher q = (1/2, 1/2).
    student = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0], [math.log(3.0)]], dtype=torch.float64)
    teacher_head = torch.zeros(2, 1, dtype=torch.float64)
    out = reverse_kl(
        student, head, torch.ones(1, 1), teacher_head, torch.tensor([2.0]), target_ids=torch.tensor([1])
    )
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert out.kl.item() == pytest.approx(kl)
    assert out.loss.item() == pytest.approx(2 * kl)
    assert out.sampled_logprob.item() == pytest.approx(math.log(0.75))
    assert out.student_entropy.item() == pytest.approx(math.log(2) - kl)
    assert out.top1_agreement.item() == 1  # the teacher's two tokens tie
    out.loss.backward()
    assert student.grad.item() == pytest.approx(2 * 0.75 * (math.log(1.5) - kl) * math.log(3.0))


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("Dt", [5, 8, 2])
def test_values_and_gradients_equal_fp64_autograd_of_the_plain_twin(chunk, Dt):
    given = inputs(Dt=Dt)
    target = torch.arange(11)
    ours = reverse_kl(*given, chunk, target_ids=target)
    twin = reverse_kl_dense(*given, target_ids=target)
    for x, y in zip(ours, twin):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
    found = torch.autograd.grad(1.7 * ours.loss, given[:2])
    expected = torch.autograd.grad(1.7 * twin.loss, given[:2])
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, head, *rest = inputs(n=5, V=7, D=3)
    assert torch.autograd.gradcheck(lambda h, w: reverse_kl(h, w, *rest, 2).loss, (hidden, head))


def test_gradient_of_one_row_of_logits_is_the_papers_equation():
    """∂K/∂z = p (log p − log q − K), read off through an identity head."""
    z, y = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden, eye = z[None].clone().requires_grad_(), torch.eye(6, dtype=torch.float64)
    out = reverse_kl(hidden, eye, y[None], eye, torch.ones(1))
    out.loss.backward()
    logp, logq = z.log_softmax(0), y.log_softmax(0)
    torch.testing.assert_close(hidden.grad[0], logp.exp() * (logp - logq - out.kl), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_a_teacher_that_is_the_student_has_no_kl_and_no_gradient(dtype, bound):
    hidden, head, _, _, weight = inputs(n=40, V=300, D=16, dtype=dtype)
    out = reverse_kl(hidden, head, hidden, head, weight, 16)
    out.loss.backward()
    assert out.kl.abs().max() <= bound
    assert hidden.grad.abs().max() <= bound and head.grad.abs().max() <= bound
    assert out.top1_agreement.all()


def test_chunk_size_changes_fp32_results_only_by_rounding():
    hidden, head, *rest = inputs(n=200, V=150, D=32, Dt=16, dtype=torch.float32)
    runs = []
    for chunk in (1, 7, 64, 200):
        out = reverse_kl(hidden, head, *rest, chunk)
        runs.append((out.kl, *torch.autograd.grad(out.loss, (hidden, head))))
    scale = [x.abs().max() for x in runs[0]]
    for run in runs[1:]:  # 1e-5 of the largest entry: some 100 roundings of 6e-8 each
        assert all((x - y).abs().max() <= 1e-5 * s for x, y, s in zip(run, runs[0], scale))


def test_results_repeat_bit_for_bit():
    hidden, head, *rest = inputs(n=200, V=150, D=32, Dt=16, dtype=torch.float32)
    runs = [torch.autograd.grad(reverse_kl(hidden, head, *rest, 64).loss, (hidden, head)) for _ in "ab"]
    assert all(torch.equal(x, y) for x, y in zip(*runs))


def test_a_token_of_weight_zero_keeps_its_kl_and_gives_no_gradient():
    given = inputs()
    out = reverse_kl(*given)
    out.loss.backward()
    is_out = given[4] == 0
    assert is_out.any() and (out.kl[is_out] > 0).all()
    assert not given[0].grad[is_out].any() and given[0].grad[~is_out].abs().sum(1).gt(0).all()


def test_the_teachers_side_and_the_weight_get_no_gradient_even_if_they_ask():
    hidden, head, *constants = inputs()
    constants = [x.requires_grad_() for x in constants]
    reverse_kl(hidden, head, *constants).loss.backward()
    assert hidden.grad is not None and all(x.grad is None for x in constants)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_side_of_the_student_changes_nothing_for_the_other(frozen):
    given = inputs()
    expected = torch.autograd.grad(reverse_kl(*given).loss, given[:2])
    given[frozen].requires_grad_(False)
    reverse_kl(*given).loss.backward()
    assert given[frozen].grad is None
    assert torch.equal(given[1 - frozen].grad, expected[1 - frozen])


def test_no_tokens_give_loss_zero_and_zero_gradients():
    hidden, head, *rest = inputs(n=0)
    out = reverse_kl(hidden, head, *rest, target_ids=torch.zeros(0, dtype=torch.long))
    out.loss.backward()
    assert out.loss == 0 and out.kl.shape == out.sampled_logprob.shape == (0,)
    assert hidden.grad.shape == (0, 5) and not head.grad.any()


@pytest.mark.parametrize("scale", [1e4, 1e15])
def test_extreme_logits_stay_finite(scale):
    hidden, head, teacher, teacher_head, weight = inputs(dtype=torch.float32)
    sharp = (hidden.detach() * scale).requires_grad_()
    for out in (
        reverse_kl(sharp, head, teacher, teacher_head, weight),
        reverse_kl(sharp, head, teacher * scale, teacher_head, weight),
        reverse_kl(hidden, head, teacher * scale, teacher_head, weight),
    ):
        grads = torch.autograd.grad(out.loss, (head,))
        assert all(torch.isfinite(x).all() for x in (out.loss, out.kl, out.student_entropy, *grads))


def test_half_types_compute_in_fp32_and_return_gradients_in_their_own_type():
    given = [x.detach().bfloat16() for x in inputs(dtype=torch.float32)]
    for x in given[:2]:
        x.requires_grad_()
    weight = inputs(dtype=torch.float32)[4]
    out = reverse_kl(*given[:4], weight)
    expected = reverse_kl(*(x.detach().float() for x in given[:4]), weight)
    assert out.kl.dtype == torch.float32 and torch.equal(out.kl, expected.kl)
    out.loss.backward()
    assert given[0].grad.dtype == given[1].grad.dtype == torch.bfloat16


def test_v4s_vocabulary_agrees_with_fp64():
    hidden, head, teacher, teacher_head, weight = inputs(n=3, V=129_280, D=8, Dt=4, dtype=torch.float32)
    out = reverse_kl(hidden, head, teacher, teacher_head, weight, 2)
    exact = reverse_kl_dense(*(x.detach().double() for x in (hidden, head, teacher, teacher_head, weight)))
    # fp32: logits near 10 round at 1e-6, and the KL is a mean of such differences.
    torch.testing.assert_close(out.kl.double(), exact.kl, rtol=1e-5, atol=1e-6)


MEMORY = """
import resource, sys, torch
from consilience.model.kernels.{module} import {run}
torch.set_num_threads(1)
for n in (64, 8192):
    h, W = torch.randn(n, 16, requires_grad=True), torch.randn(4096, 16, requires_grad=True)
    ones = torch.ones(n)
    {call}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


@pytest.mark.parametrize(
    ("module", "run", "call"),
    [
        (
            "reverse_kl",
            "reverse_kl",
            "reverse_kl(h, W, h.detach() + 1, W.detach(), ones, 64).loss.backward()",
        ),
        (
            "linear_logprob",
            "linear_logprob",
            "linear_logprob(h, W, ones.long(), 64, keep_bytes=0).logprob.sum().backward()",
        ),
    ],
)
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(module, run, call):
    script = MEMORY.format(module=module, run=run, call=call)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    few, many = (int(line) for line in done.stdout.split())
    one_logits_tensor = (8192 - 64) * 4096 * 4  # 133 MB in fp32
    # Inputs and gradients of the extra tokens are 2 MB; a quarter of one [n, V] tensor is far above that.
    assert many - few < one_logits_tensor / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_head": torch.zeros(24, 8)}, "student head has 23 rows, teacher head 24"),
        ({"teacher_hidden": torch.zeros(3, 8)}, "3 teacher rows"),
        ({"teacher_hidden": torch.zeros(2, 7)}, "teacher hidden .2, 7."),
        ({"weight": torch.zeros(2, 1)}, "one entry a token"),
        ({"student_hidden": torch.zeros(2, 4)}, "student hidden .2, 4."),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"target_ids": torch.tensor([0, 23])}, "run from 0 to 23"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(change, message):
    given = {
        "student_hidden": torch.zeros(2, 5),
        "student_head": torch.zeros(23, 5),
        "teacher_hidden": torch.zeros(2, 8),
        "teacher_head": torch.zeros(23, 8),
        "weight": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        reverse_kl(**(given | change))
