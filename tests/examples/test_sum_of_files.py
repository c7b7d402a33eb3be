"""The example runs as it stands: named in the configuration, sampled with tools, judged by its own method."""

from functools import partial
from pathlib import Path

import pytest

from consilience.cli.jobs import rollout_jobs
from consilience.conf.errors import ConfigError, TaskError
from consilience.conf.load import compose
from consilience.rewards.grader import RewardGrader
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.parsing import ToolCall
from consilience.rollout.worker import RolloutWorker
from consilience.sandboxes.blocking import BlockingPool
from consilience.sandboxes.protocol import SandboxSpec
from consilience.tasks.registry import load_domain

FILE = Path(__file__).parents[2] / "examples" / "sum_of_files.py"
KIND = f"{FILE}:SumOfFiles"
TOKENIZER = byte_tokenizer()
SPEC = SandboxSpec(driver="bwrap")


@pytest.fixture(scope="module")
def domain():
    cfg = compose(["+task.domains.sums.kind=" + KIND, "+task.domains.sums.parameters.num_files=3"])
    return load_domain(cfg.task.domains["sums"].to_settings("sums", 1))


def said(message):
    calls = [
        ToolCall(c["function"]["name"], c["function"]["arguments"]) for c in message.get("tool_calls", ())
    ]
    turn = {"role": "assistant", "content": message["content"], "tool_calls": calls}
    return TOKENIZER.encode(text_of(render_assistant(turn, False)))


def rewards_of(domain, turns, problem):
    script = lambda turns, request, context: said(turns[TOKENIZER.decode(context).count("<tool_result>")])
    jobs = rollout_jobs(domain, [problem], prefix="s/0", samples=1, temperature=1.0, run_seed=1)
    engine = FakeRolloutEngine(partial(script, turns), max_context=20_000)
    with RewardGrader(sandbox=SPEC) as grader, BlockingPool(SPEC, 1, uses_per_box=1) as boxes:
        worker = RolloutWorker(engine, TOKENIZER, boxes, grader, flush_s=0.02)
        try:
            return [record.reward for record in worker.run(jobs)]
        finally:
            worker.close()


def test_its_worked_solution_is_rewarded_and_a_claim_is_not(domain):
    problem = domain.problems("train", 1)[0]
    assert len(problem.files) == 3 and domain.max_turns == 8
    turns = [message for message in problem.demo if message["role"] == "assistant"]
    assert rewards_of(domain, turns, problem) == [1.0]
    assert rewards_of(domain, [{"role": "assistant", "content": f"{problem.metadata['sum']}"}], problem) == [
        0.0
    ]


def test_problems_do_not_depend_on_how_many_are_asked_for(domain):
    assert domain.problems("test", 3)[2] == domain.problems("test", 1, start=2)[0]


@pytest.mark.parametrize(
    "kind, words",
    [("nowhere.py:X", "there is no file"), ("x:", "is needed"), ("sums", "kind is unknown")],
)
def test_a_kind_that_is_none_is_refused_before_anything_is_loaded(kind, words):
    with pytest.raises(ConfigError, match=words):
        compose([f"+task.domains.sums.kind={kind}"])


@pytest.mark.parametrize(
    "text, words",
    [
        ("class A: pass", "no method 'problem'"),
        ("B = 1", "no class 'A'"),
        ("import nothing_like_this", "importing it failed"),
        ("class A:\n def problem(self, i): return {'promt': 'x'}\n score = print", "unknown key 'promt'"),
        ("class A:\n def __init__(self, n): pass\n problem = score = print", "refuses them"),
    ],
)
def test_what_is_wrong_with_a_class_is_said(tmp_path, text, words):
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(TaskError, match=words):
        load_domain({"name": "mine", "kind": f"{tmp_path}/a.py:A"}).problems("train", 1)
