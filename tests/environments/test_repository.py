"""Repositories: every shipped task is sound, and only a repair of the package earns its reward."""

import json
import tomllib
from pathlib import Path

import pytest

from consilience.conf.errors import TaskError
from consilience.rewards.interface import Completion, Tamper
from consilience.rewards.suite_scores import faults_of_task, score
from consilience.rewards.workspace import workspace_patch
from consilience.rollout.dsml import ToolCall
from consilience.rollout.tools import TOOLS, run_tool
from consilience.tasks.registry import load_domain
from consilience.tasks.repository import FOLDER, demo_of, read_repository, task_names

NAMES = task_names()
SPANS = read_repository(FOLDER / "spans.toml")
WHERE = "spans/operations.py"
REPAIRED = f"""python3 - <<'END'
text = open("{WHERE}").read()
text = text.replace("merged and start < ", "merged and start <= ")
text = text.replace("(merged[-1][0], end)", "(merged[-1][0], max(merged[-1][1], end))")
open("{WHERE}", "w").write(text)
END
"""


def place(repository, box):
    for path, text in repository.base.items():
        box.write(path, text.encode())


def marks(patch, judge, repository=SPANS):
    """The reward of a patch, or "tamper"."""
    completion = Completion("", "", (), (), "stop", patch=patch)
    try:
        return score(completion, prompt="", metadata=repository.metadata, sandbox=judge)["reward"]
    except Tamper:
        return "tamper"
    finally:
        if judge.is_soiled:
            judge.renew()


def judged(script, agent, judge):
    """What a shell script in the agent's box earns."""
    place(SPANS, agent)
    agent.exec(["sh", "-c", script])
    return marks(workspace_patch(agent, SPANS.base), judge)


def test_there_are_ten_tasks_and_more():
    assert len(NAMES) >= 10


@pytest.mark.parametrize("name", NAMES)
def test_gold_passes_base_stub_and_broken_fail(name, judge):
    repository = read_repository(FOLDER / f"{name}.toml")
    assert faults_of_task(repository.metadata, repository.gold, judge) == []
    assert marks(repository.gold, judge, repository) == 1.0
    assert marks(repository.broken, judge, repository) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_worked_solution_answers_as_it_says_and_earns_the_reward(name, agent, judge):
    repository = read_repository(FOLDER / f"{name}.toml")
    place(repository, agent)
    *steps, last = demo_of(repository)
    for said, answer in zip(steps[::2], steps[1::2]):
        (call,) = said["tool_calls"]
        function = call["function"]
        call = ToolCall(function["name"], function["arguments"])
        assert run_tool(agent, call, tuple(TOOLS), max_chars=100_000) == answer["content"]
    assert marks(workspace_patch(agent, repository.base), judge, repository) == 1.0
    assert last["content"]


@pytest.mark.parametrize("name", NAMES)
def test_hidden_tests_and_patches_are_neither_in_the_prompt_nor_in_the_box(name):
    domain = load_domain({"kind": "repository", "parameters": {"tasks": [name]}})
    (problem,) = [p for split in ("train", "validation", "test") for p in _all(domain, split)]
    repository = read_repository(FOLDER / f"{name}.toml")
    seen = json.dumps([problem.messages, dict(problem.files)])
    assert problem.files == repository.base and problem.metadata["tests"] == repository.tests
    for source in repository.tests.values():
        blocks = source.split("def test_")[1:]
        assert not any(json.dumps(block)[1:-1] in seen for block in blocks)
    assert "+++ b/" not in seen


def _all(domain, split):
    try:
        return domain.problems(split, 1)
    except TaskError:
        return []


def test_a_repair_in_the_box_passes_whatever_else_was_left_there(agent, judge):
    mess = "python3 -m unittest discover -s tests; echo note > note.txt; mkdir -p .cache && echo x > .cache/y"
    assert judged(REPAIRED + mess, agent, judge) == 1.0


TAMPERING = tomllib.loads((Path(__file__).parent / "tampering.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("attempt", TAMPERING)
def test_tampering_earns_nothing(attempt, agent, judge):
    assert judged(TAMPERING[attempt], agent, judge) in (0.0, "tamper")


NAMED = ("patches unittest", "equals everything")


@pytest.mark.parametrize("attempt", NAMED)
def test_what_makes_everything_pass_names_itself(attempt, agent, judge):
    assert judged(TAMPERING[attempt], agent, judge) == "tamper"


def test_a_program_that_was_left_running_cannot_take_a_repair_back(agent, judge):
    place(SPANS, agent)
    agent.exec(["sh", "-c", REPAIRED + f"(sleep 1; echo x > {WHERE}) & exit 0"])
    patch = workspace_patch(agent, SPANS.base)
    assert marks(patch, judge) == 1.0
    agent.exec(["sleep", "1.2"])
    assert workspace_patch(agent, SPANS.base) == patch
