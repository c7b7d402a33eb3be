"""Weights and denominators of the distillation loss; the KL itself is tested beside its kernel."""

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.distill.loss import denominators, distill_loss, token_weights
from consilience.model.kernels.reverse_kl import reverse_kl_dense

torch.set_num_threads(1)


def inputs(n=12, V=19, D=4, Dt=6):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(n, D).requires_grad_(), draw(V, D).requires_grad_(), draw(n, Dt), draw(V, Dt)


def test_a_weight_is_the_teachers_over_the_loss_tokens_of_the_minibatch_and_0_off_the_mask():
    weights = token_weights(torch.tensor([1, 0, 1]), 2.0, 8)
    assert weights.tolist() == [0.25, 0, 0.25] and weights.dtype == torch.float32


def test_three_tokens_by_hand():
    hidden = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    teacher = torch.log(torch.tensor([[1.0], [3.0], [9.0]], dtype=torch.float64))
    # The student is (1/2, 1/2) everywhere, the teacher (1, 3)/4 and (1, 9)/10 on tokens 1 and 2.
    kl = 0.5 * torch.log(torch.tensor([1.0, 0.25 / (0.25 * 0.75), 0.25 / (0.1 * 0.9)], dtype=torch.float64))
    out = distill_loss(
        hidden, head, teacher, head, teacher_weight=3.0, num_loss_tokens=6, loss_mask=torch.tensor([1, 1, 0])
    )
    torch.testing.assert_close(out.tokens.kl, kl, rtol=0, atol=1e-6)
    assert out.loss.item() == pytest.approx(3 / 6 * (kl[0] + kl[1]).item(), abs=1e-6)
    assert out.sums["tokens"] == 2 and out.sums["kl"] == pytest.approx((kl[0] + kl[1]).item())
    assert "sampled_logprob" not in out.sums


def test_gradient_equals_dense_fp64_autograd():
    given = inputs()
    mask = torch.tensor([1, 0, 1, 1] * 3)
    out = distill_loss(*given, teacher_weight=0.5, num_loss_tokens=32, loss_mask=mask, chunk_tokens=5)
    dense = reverse_kl_dense(*given, mask.double() * (0.5 / 32)).loss
    for x, y in zip(torch.autograd.grad(out.loss, given[:2]), torch.autograd.grad(dense, given[:2])):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_splitting_a_segment_into_microbatches_leaves_the_gradient():
    given = inputs()
    settings = {"teacher_weight": 1.5, "num_loss_tokens": 40}
    whole = torch.autograd.grad(distill_loss(*given, **settings).loss, given[:2])
    hidden, head, teacher, teacher_head = given
    parts = [(hidden[a], head, teacher[a], teacher_head) for a in (slice(0, 5), slice(5, 12))]
    split = torch.autograd.grad(sum(distill_loss(*part, **settings).loss for part in parts), given[:2])
    for x, y in zip(split, whole):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-15)


def test_sums_count_only_the_mask():
    given = inputs()
    mask = torch.zeros(12)
    mask[3] = 1
    out = distill_loss(
        *given, teacher_weight=1, num_loss_tokens=1, loss_mask=mask, target_ids=torch.full((12,), 7)
    )
    assert out.sums["max_kl"] == out.sums["kl"] == out.tokens.kl[3].item()
    assert out.sums["sampled_logprob"] == out.tokens.sampled_logprob[3].item()
    nothing = distill_loss(*given, teacher_weight=1, num_loss_tokens=1, loss_mask=torch.zeros(12))
    assert nothing.loss.item() == 0 and set(nothing.sums.values()) == {0.0}


def test_denominators_are_shared_by_all_teachers_or_each_teachers_own():
    counts = {"math": 30, "code": 10, "agent": 0}
    assert denominators(counts) == {"math": 40, "code": 40}
    assert denominators(counts, "teacher") == {"math": 30, "code": 10}
    with pytest.raises(ConfigError, match="'sequence'; it must be 'tokens' or 'teacher'"):
        denominators(counts, "sequence")


@pytest.mark.parametrize(("weight", "count"), [(-1.0, 4), (float("nan"), 4), (float("inf"), 4), (1.0, 0)])
def test_weights_and_counts_out_of_range_are_refused(weight, count):
    with pytest.raises(ValueError, match=r"at least 0|without loss tokens"):
        token_weights(torch.ones(2), weight, count)
