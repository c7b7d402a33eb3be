"""Held out once is held out always: whatever the seed, the size and the difficulty."""

import pytest

from consilience.conf.errors import TaskError
from consilience.tasks.fake_domain import FakeDomain
from consilience.tasks.registry import load_domain
from consilience.tasks.splits import SPLITS, SplitFractions, check_disjoint, content_id, split_of

KINDS = ("mathematics", "code", "agent")


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_disjoint_across_seeds_sizes_and_difficulties(kind):
    harder = {"mathematics": {"params": {"max_terms": 5}}, "code": {"num_examples": 3}, "agent": {"hops": 3}}
    domains = {f"seed {seed}": load_domain({"kind": kind, "seed": seed}) for seed in (0, 1, 77)}
    domains["harder"] = load_domain({"kind": kind, "parameters": harder[kind]})
    seen = check_disjoint(domains, {"train": 800, "validation": 80, "test": 80})
    assert all(seen[split] > 150 for split in ("validation", "test"))
    check_disjoint({k: d for k, d in domains.items() if k != "harder"}, {"train": 10, "test": 150})


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_the_same_whatever_was_asked_for_before(kind):
    one, other = load_domain({"kind": kind, "seed": 3}), load_domain({"kind": kind, "seed": 3})
    other.problems("test", 5)
    other.problems("train", 700, start=50)
    assert one.problems("train", 100, start=30) == other.problems("train", 100, start=30)
    assert one.problems("train", 130)[30:] == one.problems("train", 100, start=30)
    assert one.problems("train", 100) != load_domain({"kind": kind, "seed": 4}).problems("train", 100)


def test_equal_problems_of_different_seeds_are_equal_in_every_field():
    by_id = {p.id: p for p in load_domain({"kind": "code", "seed": 1}).problems("train", 1500)}
    again = load_domain({"kind": "code", "seed": 2}).problems("train", 1500)
    shared = [p for p in again if p.id in by_id]
    assert shared
    assert all(p == by_id[p.id] for p in shared)


def test_the_split_is_a_function_of_the_id_and_has_the_wanted_shares():
    fractions = SplitFractions(0.5, 0.2, 0.3)
    splits = [split_of(content_id("x", i), fractions) for i in range(20_000)]
    # Binomial with n = 20,000: three standard deviations are below 0.011.
    for name, share in (("train", 0.5), ("validation", 0.2), ("test", 0.3)):
        assert abs(splits.count(name) / len(splits) - share) < 0.011


def test_a_larger_train_share_never_takes_from_the_same_test_share():
    ids = [content_id("x", i) for i in range(2000)]
    few, many = SplitFractions(0.6, 0.3, 0.1), SplitFractions(0.9, 0.0, 0.1)
    assert [split_of(i, few) == "test" for i in ids] == [split_of(i, many) == "test" for i in ids]


def test_content_ids_differ_where_the_content_does():
    assert content_id("a", ["b"]) != content_id("a", "b") != content_id("ab")
    assert content_id({"x": 1, "y": 2}) == content_id({"y": 2, "x": 1})
    assert content_id("\ud800") != content_id("?")


def test_an_overlap_is_found_and_named():
    default, swapped = FakeDomain(), FakeDomain()
    swapped.fractions = SplitFractions(0.1, 0.1, 0.8)
    with pytest.raises(TaskError, match="is in 'train' of a and in 'test' of b"):
        check_disjoint({"a": default, "b": swapped}, {"train": 500, "test": 500})


def test_a_split_that_is_too_small_says_how_many_there_are():
    domain = FakeDomain(side=10)
    assert sum(len(domain.problems(s, n)) for s, n in _sizes(domain).items()) == 100
    with pytest.raises(TaskError, match=r"split 'test' has \d+ distinct problems, 90 are needed"):
        domain.problems("test", 50, start=40)


def test_a_generator_without_new_problems_ends_in_an_error_not_a_hang():
    sums = {"min_digits": 1, "max_digits": 1}  # 10 * 10 of them
    domain = load_domain({"kind": "math", "parameters": {"params": sums}})
    with pytest.raises(TaskError, match="ask for fewer or widen"):
        domain.problems("train", 201)
    assert domain.num_duplicates > 1000


@pytest.mark.parametrize("split", ["tests", "Train", ""])
def test_an_unknown_split_is_refused_with_the_names(split):
    with pytest.raises(TaskError, match="no split"):
        FakeDomain().problems(split, 1)


def test_negative_numbers_and_wrong_shares_are_refused():
    with pytest.raises(TaskError, match="0 or more"):
        FakeDomain().problems("train", -1)
    with pytest.raises(TaskError, match="must sum to 1"):
        SplitFractions(0.8, 0.1, 0.2)
    with pytest.raises(TaskError, match="share"):
        SplitFractions(1.2, -0.1, -0.1)


def _sizes(domain):
    """All problems of each split of a finite domain."""
    sizes = {}
    for split in SPLITS:
        low, high = 0, 10_000
        while low < high:
            middle = (low + high + 1) // 2
            try:
                domain.problems(split, middle)
                low = middle
            except TaskError:
                high = middle - 1
        sizes[split] = low
    return sizes
