"""KL by place, and the end of text seen by student and teacher, on numbers worked by hand."""

import math

import pytest
import torch

from consilience.distill.samples import Span
from consilience.distill.token_watch import TokenWatch

EYE = torch.eye(3)


def states(*probabilities):
    """Hidden states whose softmax under the identity head are these rows."""
    return torch.tensor(probabilities).log()


def test_kl_is_averaged_by_tenths_of_each_sample():
    watch = TokenWatch()
    kl = torch.cat([torch.arange(10.0) + 1, torch.full((20,), 3.0)])
    hidden = torch.zeros(30, 3)
    watch.observe(
        kl,
        [Span(0, 10, 10), Span(0, 20, 20)],
        torch.zeros(30, dtype=torch.long),
        (hidden, EYE),
        (hidden, EYE),
    )
    numbers = watch.numbers()
    assert numbers["kl_tenth_1"] == pytest.approx((1 + 3 + 3) / 3)
    assert numbers["kl_tenth_10"] == pytest.approx((10 + 3 + 3) / 3)
    assert numbers["late_ratio"] == pytest.approx((8 + 9 + 10 + 18) / (1 + 2 + 3 + 18))
    assert not any("eos" in name for name in numbers)


def test_who_would_end_where_is_compared_at_ends_and_elsewhere():
    watch = TokenWatch(eos=1)
    student = states([0.1, 0.8, 0.1], [0.9, 0.05, 0.05], [0.9, 0.05, 0.05])
    teacher = states([0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.4, 0.5, 0.1])
    watch.observe(torch.ones(3), [Span(0, 3, 3)], torch.tensor([1, 0, 0]), (student, EYE), (teacher, EYE))
    numbers = watch.numbers()
    assert numbers["student_eos_at_end"] == pytest.approx(0.8) and numbers[
        "teacher_eos_at_end"
    ] == pytest.approx(0.1)
    assert numbers["eos_gap_at_end"] == pytest.approx(0.7)
    assert numbers["teacher_eos_elsewhere"] == pytest.approx(0.6)
    assert numbers["eos_gap_elsewhere"] == pytest.approx(0.55)


def test_many_places_are_sampled_evenly_and_sums_go_on_over_micro_batches():
    watch = TokenWatch(eos=1)
    for value in (0.2, 0.4):
        rows = states(*[[0.5, value, 0.5 - value]] * 500)
        watch.observe(
            torch.ones(500), [Span(0, 500, 500)], torch.zeros(500, dtype=torch.long), (rows, EYE), (rows, EYE)
        )
    numbers = watch.numbers()
    assert numbers["student_eos_elsewhere"] == pytest.approx(0.3) and numbers["eos_gap_elsewhere"] == 0
    assert "eos_gap_at_end" not in numbers


@pytest.mark.parametrize("cut", [1, 7, 64, 99])
def test_ends_are_looked_at_in_the_same_places_wherever_a_sample_is_cut(cut):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(100, 3, generator=generator) for _ in range(2))
    ids = torch.zeros(100, dtype=torch.long)
    ids[[13, 50, 99]] = 1

    def numbers(*spans):
        watch = TokenWatch(eos=1)
        for first, stop in spans:
            own = slice(first, stop)
            watch.observe(
                torch.ones(stop - first),
                [Span(first, stop, 100)],
                ids[own],
                (student[own], EYE),
                (teacher[own], EYE),
            )
        return watch.numbers()

    assert numbers((0, cut), (cut, 100)) == pytest.approx(numbers((0, 100)), rel=1e-5)  # fp32 sums
    places = [i for i in range(0, 100, 13) if i != 13]
    wanted = float(teacher[places].softmax(1)[:, 1].mean())
    assert numbers((0, 100))["teacher_eos_elsewhere"] == pytest.approx(wanted)


def test_a_kl_of_rounding_has_no_late_ratio():
    watch = TokenWatch()
    hidden = torch.zeros(10, 3)
    kl = torch.tensor([1e-9] * 5 + [1e-7] * 5)
    watch.observe(kl, [Span(0, 10, 10)], torch.zeros(10, dtype=torch.long), (hidden, EYE), (hidden, EYE))
    assert watch.numbers()["late_ratio"] == 0 and math.isfinite(watch.numbers()["kl_tenth_1"])
