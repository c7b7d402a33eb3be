"""Objectives of distillation against cases worked by hand, dense fp64 definitions and finite differences."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from consilience.conf.errors import ConfigError
from consilience.conf.schema_training import DistillConfig
from consilience.distill.objectives import OBJECTIVES, Objective, objective_loss
from consilience.model.kernels.reverse_kl import reverse_kl_dense

torch.set_num_threads(1)
COMPARED = [name for name in OBJECTIVES if name != "reverse_kl"]


def inputs(n=7, V=11, D=4, Dt=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    hidden, head, teacher, teacher_head = draw(n, D), draw(V, D), draw(n, Dt), draw(V, Dt)
    weight = torch.rand(n, generator=g, dtype=torch.float64)
    target = torch.randint(V, (n,), generator=g)
    return (hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head), weight, target


def by_hand(p, q, objective, **settings):
    """Value of one token with student p and teacher q, through a head that is the identity."""
    states = [torch.tensor([x], dtype=torch.float64).log() for x in (p, q)]
    eye = torch.eye(len(p), dtype=torch.float64)
    chosen, target = Objective(objective, **settings), torch.tensor([0])
    return float(
        objective_loss(chosen, states[0], eye, states[1], eye, torch.ones(1), target_ids=target).value
    )


def test_one_token_by_hand():
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    ln2 = math.log(2)
    assert by_hand(p, q, "reverse_kl") == pytest.approx(0.25 * ln2, abs=1e-6)
    assert by_hand(p, q, "forward_kl") == pytest.approx(0.25 * ln2, abs=1e-12)
    m = [0.375, 0.25, 0.375]
    half = 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)  # each of the two, by symmetry
    assert sum(m) == 1 and by_hand(p, q, "jsd") == pytest.approx(half, abs=1e-12)
    # S = {0}: 1/2 log 2, and a tail of 1/2 against 3/4.
    tail = 0.5 * ln2 + 0.5 * math.log(0.5 / 0.75)
    assert by_hand(p, q, "top_k_tail", top_k=1) == pytest.approx(tail, abs=1e-12)
    # The teacher's likeliest is token 2: 1/4 log 1/2, and a tail of 3/4 against 1/2.
    other = -0.25 * ln2 + 0.75 * math.log(0.75 / 0.5)
    assert by_hand(p, q, "top_k_tail", top_k=1, support="teacher") == pytest.approx(other, abs=1e-12)
    assert by_hand(p, q, "generalised_kl", top_k=1) == pytest.approx(0.5 * ln2 - 0.5 + 0.25, abs=1e-12)
    assert by_hand(p, q, "sampled_token") == pytest.approx(ln2, abs=1e-12)


def dense(name, z, y, target, k, beta):
    """The definitions again, by other means: torch's distributions and losses, masks in place of indices."""
    p, q = Categorical(logits=z), Categorical(logits=y)
    logp, logq = z.log_softmax(-1), y.log_softmax(-1)
    inside = logp >= logp.topk(k, dim=-1).values[:, -1:]
    on = lambda x: torch.where(inside, x, 0.0).sum(-1)
    if name == "forward_kl":
        return F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)
    if name == "jsd":
        m = Categorical(probs=beta * q.probs + (1 - beta) * p.probs)
        return beta * kl_divergence(q, m) + (1 - beta) * kl_divergence(p, m)
    if name == "top_k_tail":
        out_p, out_q = 1 - on(p.probs), 1 - on(q.probs)
        return on(p.probs * (logp - logq)) + out_p * (out_p / out_q).log()
    if name == "generalised_kl":
        return on(p.probs * (logp - logq) - p.probs + q.probs)
    chosen = -F.cross_entropy(z, target, reduction="none"), -F.cross_entropy(y, target, reduction="none")
    return (chosen[0] - chosen[1]).detach() * chosen[0]


@pytest.mark.parametrize("name", COMPARED)
def test_values_and_gradients_equal_the_dense_fp64_definition(name):
    given, weight, target = inputs()
    hidden, head, teacher, teacher_head = given
    objective = Objective(name, top_k=3, beta=0.3)
    out = objective_loss(objective, *given, weight, chunk_tokens=3, target_ids=target)
    expected = weight * dense(name, hidden @ head.t(), teacher @ teacher_head.t(), target, 3, 0.3)
    torch.testing.assert_close(out.loss, expected.sum(), rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(x, given[:2]) for x in (out.loss, expected.sum()))
    for x, y in zip(found, wanted):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in COMPARED if name != "sampled_token"])
def test_the_gradient_is_that_of_the_value_by_finite_differences(name):
    given, weight, _ = inputs(n=3, V=6)
    objective = Objective(name, top_k=2)
    both = lambda hidden, head: objective_loss(objective, hidden, head, *given[2:], weight).loss
    assert torch.autograd.gradcheck(both, given[:2])


def test_the_sampled_tokens_gradient_is_the_exact_one_on_average_over_the_students_samples():
    given, weight, _ = inputs(n=4, V=5)
    hidden, head = given[:2]
    p = (hidden @ head.t()).softmax(-1).detach()
    total = torch.zeros_like(hidden)
    for token in range(5):  # the expectation, term by term
        target = torch.full((4,), token)
        out = objective_loss(Objective("sampled_token"), *given, weight * p[:, token], target_ids=target)
        total += torch.autograd.grad(out.loss, hidden)[0]
    exact = torch.autograd.grad(reverse_kl_dense(*given, weight).loss, hidden)[0]
    torch.testing.assert_close(total, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_model_distilled_from_itself_has_value_0_and_does_not_move(name):
    (hidden, head, *_), weight, target = inputs()
    same = (hidden, head, hidden.detach(), head.detach())
    out = objective_loss(Objective(name, top_k=3), *same, weight, target_ids=target)
    assert out.value.abs().max() < 1e-12 and (out.top1_agreement == 1).all()
    for grad in torch.autograd.grad(out.loss, (hidden, head)):
        assert grad.abs().max() < 1e-12


@pytest.mark.parametrize("name", COMPARED)
def test_the_exact_reverse_kl_is_reported_beside_every_objective(name):
    given, weight, target = inputs()
    out = objective_loss(Objective(name), *given, weight, chunk_tokens=2, target_ids=target)
    dense_kl = reverse_kl_dense(*given, weight)
    torch.testing.assert_close(out.kl, dense_kl.kl, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.student_entropy, dense_kl.student_entropy, rtol=0, atol=1e-12)
    assert torch.equal(out.top1_agreement, dense_kl.top1_agreement)


def test_a_tail_bounds_the_exact_kl_from_below_and_is_exact_over_the_whole_vocabulary():
    given, weight, _ = inputs(n=50)
    values = [
        objective_loss(Objective("top_k_tail", top_k=k), *given, weight).value for k in (1, 4, 8, 11, 64)
    ]
    exact = reverse_kl_dense(*given, weight).kl
    for value in values:
        assert (value <= exact + 1e-12).all() and (value > -1e-12).all()
    for whole in values[3:]:
        torch.testing.assert_close(whole, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", COMPARED)
def test_chunks_change_nothing_and_half_precision_is_computed_in_fp32(name):
    given, weight, target = inputs(n=9)
    objective = Objective(name, top_k=4)
    run = lambda chunk: objective_loss(objective, *given, weight, chunk, target_ids=target)
    for x, y in zip(run(2), run(256)):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    half = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in given]
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in half]
    low, high = (objective_loss(objective, *x, weight, target_ids=target) for x in (half, wide))
    assert low.value.dtype == torch.float32
    torch.testing.assert_close(low.value.double(), high.value, rtol=1e-4, atol=1e-5)
    for x, y in zip(torch.autograd.grad(low.loss, half[:2]), torch.autograd.grad(high.loss, wide[:2])):
        assert x.dtype == torch.bfloat16
        torch.testing.assert_close(x.double(), y, rtol=2**-8, atol=1e-5)  # one rounding to bf16


@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_tokens_give_loss_0_and_zero_gradients(name):
    given, _, _ = inputs(n=0)
    out = objective_loss(Objective(name), *given, torch.zeros(0), target_ids=torch.zeros(0, dtype=torch.long))
    out.loss.backward()
    assert out.loss.item() == 0 and not given[1].grad.any()


def test_extreme_logits_stay_finite():
    eye = torch.eye(4)
    student = torch.tensor([[200.0, 0, 0, 0], [0, 0, 0, 0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 0, 0, 200], [200, 0, 0, 0]])
    for name in OBJECTIVES:
        target = torch.zeros(2, dtype=torch.long)
        objective = Objective(name, top_k=1)
        out = objective_loss(objective, student, eye, teacher, eye, torch.ones(2), target_ids=target)
        assert (
            torch.isfinite(out.value).all()
            and torch.isfinite(torch.autograd.grad(out.loss, student)[0]).all()
        )


def test_bad_settings_and_shapes_are_refused():
    for settings, words in [
        ({"name": "reverse-kl"}, "'reverse-kl'; it must be one of reverse_kl, forward_kl"),
        ({"top_k": 0}, "top_k is 0"),
        ({"support": "both"}, "'student' or 'teacher'"),
        ({"beta": 1.0}, "forward_kl or reverse_kl"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Objective(**settings)
    given, weight, _ = inputs()
    with pytest.raises(ValueError, match="needs target_ids"):
        objective_loss(Objective("sampled_token"), *given, weight)
    with pytest.raises(ValueError, match="both heads one row"):
        objective_loss(Objective("jsd"), *given[:3], given[3][:-1], weight)


def test_the_configuration_offers_every_objective():
    field = next(f for f in dataclasses.fields(DistillConfig) if f.name == "objective")
    assert field.metadata["choices"] == tuple(OBJECTIVES)
