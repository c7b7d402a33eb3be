"""Weights and sums of the distillation loss; the KL itself is tested beside its kernel."""

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.distill.loss import distill_loss, sample_weights
from consilience.model.kernels.reverse_kl import reverse_kl_dense

torch.set_num_threads(1)


def inputs(n=12, V=19, D=4, Dt=6):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return draw(n, D).requires_grad_(), draw(V, D).requires_grad_(), draw(n, Dt), draw(V, Dt)


NUM_TOKENS, TEACHERS, WEIGHTS = [6, 2, 0, 8], ["math", "code", "code", "math"], {"math": 1.0, "code": 3.0}


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("tokens", [1 / 16, 3 / 16, 0, 1 / 16]),  # sixteen loss tokens in all
        ("teacher", [1 / 14, 3 / 2, 0, 1 / 14]),  # fourteen of mathematics, two of code
        ("sequences", [1 / 18, 3 / 6, 0, 1 / 24]),  # three samples have loss tokens
    ],
)
def test_the_weight_of_a_token_by_hand(normalisation, expected):
    assert sample_weights(NUM_TOKENS, TEACHERS, WEIGHTS, normalisation) == pytest.approx(expected, rel=1e-15)


def test_a_teachers_tokens_add_up_to_its_weight_however_long_its_samples_are():
    weights = sample_weights([900, 3, 40, 7], ["a", "b", "a", "b"], {"a": 0.25, "b": 2.0}, "teacher")
    assert 900 * weights[0] + 40 * weights[2] == pytest.approx(0.25, rel=1e-15)
    assert 3 * weights[1] + 7 * weights[3] == pytest.approx(2.0, rel=1e-15)


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("tokens", [1 / 10, 3 / 10, 1 / 10]),  # ten tokens in all, of which six have two teachers
        ("teacher", [1 / 10, 3 / 6, 1 / 10]),
        ("sequences", [1 / 12, 3 / 12, 1 / 8]),  # two trajectories
    ],
)
def test_a_trajectory_with_two_teachers_is_counted_once(normalisation, expected):
    found = sample_weights([6, 6, 4], ["math", "code", "math"], WEIGHTS, normalisation, [2, 2, 1])
    assert found == pytest.approx(expected, rel=1e-15)


def test_words_and_weights_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="is 'sequence'; it must be one of tokens, teacher, sequences"):
        sample_weights(NUM_TOKENS, TEACHERS, WEIGHTS, "sequence")
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"'code' is .* at least 0"):
            sample_weights(NUM_TOKENS, TEACHERS, {"math": 1.0, "code": weight})


def test_three_tokens_by_hand():
    hidden = torch.zeros(3, 1, dtype=torch.float64, requires_grad=True)
    head = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    teacher = torch.log(torch.tensor([[1.0], [3.0], [9.0]], dtype=torch.float64))
    # The student is (1/2, 1/2) everywhere, the teacher (1, 3)/4 and (1, 9)/10 on tokens 1 and 2.
    kl = 0.5 * torch.log(torch.tensor([1.0, 0.25 / (0.25 * 0.75), 0.25 / (0.1 * 0.9)], dtype=torch.float64))
    out = distill_loss(hidden, head, teacher, head, torch.tensor([0.5, 0.5, 0.0]))
    torch.testing.assert_close(out.tokens.kl, kl, rtol=0, atol=1e-6)
    assert out.loss.item() == pytest.approx(0.5 * (kl[0] + kl[1]).item(), abs=1e-6)
    assert out.sums["tokens"] == 2 and out.sums["kl"] == pytest.approx((kl[0] + kl[1]).item())
    assert out.sums["objective"] == out.sums["kl"]


def test_gradient_equals_dense_fp64_autograd():
    given = inputs()
    weight = torch.tensor([1, 0, 1, 1] * 3, dtype=torch.float64) * (0.5 / 32)
    out = distill_loss(*given, weight, chunk_tokens=5)
    dense = reverse_kl_dense(*given, weight).loss
    for x, y in zip(torch.autograd.grad(out.loss, given[:2]), torch.autograd.grad(dense, given[:2])):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_splitting_a_segment_into_microbatches_leaves_the_gradient():
    given, weight = inputs(), torch.full((12,), 1.5 / 40, dtype=torch.float64)
    whole = torch.autograd.grad(distill_loss(*given, weight).loss, given[:2])
    hidden, head, teacher, teacher_head = given
    parts = [(hidden[a], head, teacher[a], teacher_head, weight[a]) for a in (slice(0, 5), slice(5, 12))]
    split = torch.autograd.grad(sum(distill_loss(*part).loss for part in parts), given[:2])
    for x, y in zip(split, whole):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-15)


def test_sums_count_only_tokens_with_a_weight():
    given, weight = inputs(), torch.zeros(12)
    weight[3] = 1
    out = distill_loss(*given, weight)
    assert out.sums["max_kl"] == out.sums["kl"] == out.tokens.kl[3].item()
    nothing = distill_loss(*given, torch.zeros(12))
    assert nothing.loss.item() == 0 and set(nothing.sums.values()) == {0.0}
