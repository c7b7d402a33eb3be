"""Shares of the update: what is asked for is reached, whatever each teacher's own pull."""

import random

import pytest

from consilience.distill.balance import MEMORY, MOST, UpdateBalance, shares


def test_shares_by_hand():
    assert shares({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    assert shares({"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0} and shares({}) == {}


def test_two_steps_by_hand():
    balance = UpdateBalance({"a": 1.0, "b": 1.0})
    assert balance.factors({"a", "b"}) == {"a": 1.0, "b": 1.0}  # nothing was seen yet
    balance.observe({"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    # Past 2.7 and 0.9; halves at a geometric mean of 1 pull sqrt(3) each: 1.8 + sqrt(3) for both.
    half = 1.8 + 3**0.5
    assert balance.factors({"a", "b"}) == pytest.approx({"a": (half - 2.7) / 3, "b": half - 0.9})
    assert MEMORY == 0.9


def measured(balance, pulls_of, steps, last):
    """Shares over the last steps of a run whose teachers pull `pulls_of(step)` at factor 1."""
    total = {}
    for step in range(steps):
        pulls = pulls_of(step)
        factors = balance.factors(set(pulls))
        done = {name: pull * factors[name] for name, pull in pulls.items()}
        balance.observe(done, factors)
        if step >= steps - last:
            total |= {name: total.get(name, 0.0) + pull for name, pull in done.items()}
    return shares(total)


def test_shares_follow_the_weights_within_2_percent_though_pulls_differ_30_fold_and_vary():
    weights = {"math": 1.0, "code": 2.0, "agent": 1.0}
    draw = random.Random(0)
    usual = {"math": 30.0, "code": 1.0, "agent": 4.0}
    pulls_of = lambda step: {name: pull * draw.uniform(0.7, 1.3) for name, pull in usual.items()}
    found = measured(UpdateBalance(weights), pulls_of, 100, 60)
    for name, share in shares(weights).items():
        assert found[name] == pytest.approx(share, abs=0.02)
    plain = shares(usual)
    assert plain["math"] > 0.8  # without balance one teacher has nearly all


def test_a_teacher_that_a_mini_batch_lacks_is_made_up_for():
    usual = {"a": 1.0, "b": 1.0}
    pulls_of = lambda step: usual if step % 4 else {"a": 1.0}
    found = measured(UpdateBalance({"a": 1.0, "b": 1.0}), pulls_of, 80, 40)
    assert found["a"] == pytest.approx(0.5, abs=0.02)


def test_factors_have_a_geometric_mean_of_1_in_the_end_and_keep_their_bounds():
    balance, usual = UpdateBalance({"a": 1.0, "b": 1.0}), {"a": 3.0, "b": 1.0}
    for _ in range(200):
        factors = balance.factors({"a", "b"})
        balance.observe({name: pull * factors[name] for name, pull in usual.items()}, factors)
    assert factors == pytest.approx({"a": 3**-0.5, "b": 3**0.5})
    far = UpdateBalance({"a": 1.0, "b": 1e6})
    far.observe({"a": 5.0, "b": 1.0}, {"a": 1.0, "b": 1.0})
    assert far.factors({"a", "b"}) == {"a": 1 / MOST, "b": MOST}


def test_a_restored_balance_goes_on_as_the_one_it_was_taken_from():
    one = UpdateBalance({"a": 1.0, "b": 3.0})
    for pull in (1.0, 2.0, 5.0):
        one.observe({"a": pull, "b": 2 * pull}, one.factors({"a", "b"}))
    other = UpdateBalance({"a": 1.0, "b": 3.0})
    other.restore(one.state())
    assert other.factors({"a", "b"}) == one.factors({"a", "b"}) and other.state() == one.state()
    fewer = UpdateBalance({"a": 1.0})
    fewer.restore(one.state())
    assert set(fewer.state()["pulled"]) == set(fewer.state()["usual"]) == {"a"}
