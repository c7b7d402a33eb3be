"""One dict chooses; every wrong name says the right one."""

import subprocess
import sys

import pytest

from consilience.conf.errors import TaskError
from consilience.tasks.domain import Problem
from consilience.tasks.registry import load_domain

DEFAULTS = {
    "mathematics": ("think", 1, False, (), "consilience.rewards.reasoning_gym_scores:score"),
    "code": ("chat", 1, True, (), "consilience.rewards.code_scores:score"),
    "agent": ("think", 4, False, ("read",), "consilience.rewards.agent:score"),
}


@pytest.mark.parametrize("kind", DEFAULTS)
def test_each_kind_has_working_defaults(kind):
    domain = load_domain({"kind": kind})
    found = (domain.effort, domain.max_turns, domain.needs_sandbox, domain.tools, domain.reward)
    assert domain.name == kind
    assert found == DEFAULTS[kind]
    assert {p.domain for p in domain.problems("train", 3)} == {kind}


def test_a_name_may_stand_for_the_kind_and_settings_override_the_defaults():
    assert load_domain("math").name == "math"
    domain = load_domain(
        {
            "name": "sums",
            "kind": "math",
            "effort": "chat",
            "max_tokens": 7,
            "max_turns": None,
            "reward": "r.py:s",
            "needs_sandbox": True,
        }
    )
    assert (domain.name, domain.effort, domain.max_tokens, domain.max_turns) == ("sums", "chat", 7, 1)
    assert (domain.reward, domain.needs_sandbox) == ("r.py:s", True)
    assert domain.problems("train", 1)[0].domain == "sums"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("mathematic", "unknown domain 'mathematic'; did you mean 'mathematics'"),
        ({"kind": "agnet"}, "did you mean 'agent'"),
        ({}, "unknown domain ''"),
        ({"kind": "math", "sed": 1}, "did you mean 'seed'"),
        ({"kind": "math", "seed": -1}, "seed"),
        ({"kind": "math", "max_tokens": 0}, "max_tokens"),
        ({"kind": "math", "splits": {"test": 0.5}}, "must sum to 1"),
        ({"kind": "math", "splits": {"tets": 0.5}}, "did you mean 'test'"),
    ],
)
def test_each_mistake_in_the_settings_is_named(settings, words):
    with pytest.raises(TaskError, match=words):
        load_domain(settings)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_a_domain_is_a_dataset_too(kind):
    domain = load_domain(kind)
    dataset = domain.as_dataset("validation", 12)
    assert dataset.column_names == ["id", "domain", "prompt", "messages", "metadata", "files", "demo"]
    assert dataset["id"] == [p.id for p in domain.problems("validation", 12)]
    assert dataset[3]["prompt"] == domain.problems("validation", 4)[3].messages[-1]["content"]


def test_choosing_the_agent_domain_does_not_import_reasoning_gym_torch_or_datasets():
    code = (
        "import sys\nfrom consilience.tasks.registry import load_domain\n"
        "load_domain('agent').problems('train', 5)\n"
        "print([m for m in ('reasoning_gym', 'torch', 'datasets', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_problems_are_frozen_records():
    (problem,) = load_domain("agent").problems("test", 1)
    assert isinstance(problem, Problem)
    with pytest.raises(AttributeError):
        problem.id = "other"
