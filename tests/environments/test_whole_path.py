"""A scripted agent solves a repository through the worker: engine, tools, boxes, reward process, record."""

import json
from functools import partial

import pytest

from consilience.cli.jobs import rollout_jobs
from consilience.conf.load import compose
from consilience.conf.rules import for_domain
from consilience.rewards.grader import RewardGrader
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.parsing import ToolCall
from consilience.rollout.records import FinishReason, OutcomeKind
from consilience.rollout.worker import RolloutWorker
from consilience.sandboxes.blocking import BlockingPool
from consilience.sandboxes.host_client import HostPool, LocalHost
from consilience.sandboxes.protocol import SandboxSpec
from consilience.tasks.registry import load_domain

TOKENIZER = byte_tokenizer()
SPEC = SandboxSpec(driver="bwrap")


def said(message):
    calls = [c["function"] for c in message.get("tool_calls", ())]
    turn = {
        "role": "assistant",
        "content": message["content"],
        "tool_calls": [ToolCall(c["name"], c["arguments"]) for c in calls],
    }
    return TOKENIZER.encode(text_of(render_assistant(turn, False)))


def scripted(turns, request, context):
    """The turn after as many tool results as there are in the context."""
    return said(turns[TOKENIZER.decode(context).count("<tool_result>")])


def run(turns, domain, problem, pool=lambda: BlockingPool(SPEC, 2, uses_per_box=1)):
    jobs = rollout_jobs(
        domain, [problem], prefix="swe/0", samples=2, temperature=1.0, run_seed=1, is_graded=True
    )
    engine = FakeRolloutEngine(partial(scripted, turns), max_context=100_000)
    with RewardGrader(sandbox=SPEC) as grader, pool() as boxes:
        worker = RolloutWorker(engine, TOKENIZER, boxes, grader, flush_s=0.02)
        try:
            return worker.run(jobs)
        finally:
            worker.close()


@pytest.fixture(scope="module")
def swe():
    cfg = for_domain(compose(["task=software", "specialist=swe", "run=swe"]), "swe")
    domain = load_domain(cfg.task.domains["swe"].to_settings("swe", cfg.task.seed))
    return domain, domain.problems("train", 1)[0]


def test_an_agent_that_repairs_the_package_is_rewarded(swe):
    domain, problem = swe
    turns = [message for message in problem.demo if message["role"] == "assistant"]
    for record in run(turns, domain, problem):
        assert (record.reward, record.outcome.kind) == (1.0, OutcomeKind.GRADED), record.outcome
        assert record.finish is FinishReason.STOP and record.metadata["turns"] == len(turns)
        assert (
            record.isolation.startswith("bwrap") and len(record.sandbox_ids) == 2
        )  # its own and the judge's


def test_boxes_of_a_host_show_what_was_repaired_in_them_too(swe):
    domain, problem = swe
    turns = [message for message in problem.demo if message["role"] == "assistant"]
    local = LocalHost()
    try:
        records = run(turns, domain, problem, lambda: HostPool(local.ask, SPEC))
        assert [record.reward for record in records] == [1.0, 1.0]
    finally:
        local.close()


def test_one_that_says_so_without_doing_it_is_not(swe):
    domain, problem = swe
    look = next(message for message in problem.demo if message["role"] == "assistant")
    claim = {"role": "assistant", "content": "All tests pass. 10 passed in 0.01s."}
    records = run([look, claim], domain, problem)
    assert [record.reward for record in records] == [0.0, 0.0]


def test_one_that_hands_in_the_diff_as_its_answer_after_using_its_box_is_judged_by_the_box(swe):
    domain, problem = swe
    look = next(message for message in problem.demo if message["role"] == "assistant")
    patch = json.loads(
        json.dumps({"role": "assistant", "content": "--- a/x.py\n+++ b/x.py\n@@ -0,0 +1 @@\n+x"})
    )
    assert [record.reward for record in run([look, patch], domain, problem)] == [0.0, 0.0]
