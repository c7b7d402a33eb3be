"""Each domain's reward declares what its verdict rests on, and gets a box exactly if it runs code."""

import importlib

import pytest

from consilience.rewards.interface import Tier
from consilience.tasks.registry import load_domain

DOMAINS = ("math", "code", "agent", "programs", "functions", "repository")


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_has_a_box_for_its_judge_exactly_if_its_tier_runs_code(name):
    domain = load_domain(name)
    tier = importlib.import_module(domain.reward.partition(":")[0]).TIER
    assert isinstance(tier, Tier)
    assert domain.needs_sandbox == (tier is not Tier.TEXT)


@pytest.mark.parametrize("name", ["exact_match", "program_scores", "suite_scores", "code_scores", "agent"])
def test_each_shipped_reward_declares_a_tier(name):
    assert importlib.import_module(f"consilience.rewards.{name}").TIER in Tier
