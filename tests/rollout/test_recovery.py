"""A worker that dies at any step: the next one goes on, and the records are those of an undisturbed run."""

import itertools
import shutil
from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG

from consilience.conf.errors import EngineError
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.log_replay import replay
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.parsing import ToolCall
from consilience.rollout.records import FinishReason, OutcomeKind
from consilience.rollout.worker import RolloutWorker

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()


def job(uid, **fields):
    fields = {"reward": "x", "max_tokens": 400, "sampling": SamplingParams(max_tokens=400), **fields}
    return RolloutJob(
        uid, fields.pop("group", uid), "agent", "chat", ({"role": "user", "content": uid},), **fields
    )


def agent_job(uid):
    return job(uid, tools=("read", "write"), max_turns=4, files={"start": f"next-{uid}"})


def turn(text="", *calls):
    message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


def two_step_policy(request, context):
    """Reads `start`, writes what it read, then answers with it; a function of the whole stream."""
    said = TOKENIZER.decode(context)
    if "<tool_result>" not in said:
        return turn("", ToolCall("read", {"path": "start"}))
    value = said.split("<tool_result>")[1].split("</tool_result>")[0]
    if "wrote" in said:
        return turn(value)
    return turn("", ToolCall("write", {"path": "out", "content": value}))


def wrote_its_answer(item):
    return float(item.sandbox is not None and item.sandbox.read("out").decode() == item.text)


def agent_worker(die_after=None, boxes=None):
    engine = FakeRolloutEngine(two_step_policy, max_running=4, die_after=die_after)
    return RolloutWorker(
        engine, TOKENIZER, boxes or FakeBoxes(4), FakeGrader(wrote_its_answer), flush_s=0.001
    )


def dead_after(worker, jobs, lease):
    """Records that left the worker before it died; None in their place if it did not die."""
    records = []
    try:
        for batch in worker.stream(jobs, lease):
            records += batch
    except EngineError as error:
        assert "died" in str(error)
        return records, True
    finally:
        worker.close()
    return records, False


def plain(record):
    """A record without what must differ: the boxes, and that it was resumed."""
    metadata = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
    return replace(record, sandbox_ids=(), metadata=metadata).to_json()


def survive(folder, jobs, build, deaths):
    """Run `jobs` over workers that die after so many steps each, then one that does not."""
    stored = {}
    for die_after in itertools.chain(deaths, [None]):
        missing = [j for j in jobs if j.uid not in stored]
        fence(folder)
        records, is_dead = dead_after(build(die_after), missing, take_lease(folder, "w"))
        stored |= {r.uid: r for r in records}
        if not is_dead:
            return [stored[j.uid] for j in jobs]
    raise AssertionError("unreachable")


@pytest.mark.parametrize("deaths", [(1,), (40,), (120, 60, 60), (150, 1, 1, 90), (35,) * 12])
def test_agents_go_on_with_their_turns_results_and_workspaces(tmp_path, deaths):
    jobs = [agent_job(f"a{i}") for i in range(6)]
    with_none = agent_worker()
    undisturbed = with_none.run(jobs)
    with_none.close()
    assert [r.reward for r in undisturbed] == [1.0] * 6
    records = survive(tmp_path, jobs, agent_worker, deaths)
    assert [plain(r) for r in records] == [plain(r) for r in undisturbed]
    if deaths[0] > 1:
        assert any(r.metadata.get("resumed_at") for r in records)


def talking_policy(request, context):
    """Thinks about the user's newest message for a while, then answers it."""
    asked = TOKENIZER.decode(context).rsplit("<｜User｜>", 1)[1].split("<")[0]
    return TOKENIZER.encode(f"{asked * 7}</think>re {asked}<｜end▁of▁sentence｜>")


@pytest.mark.parametrize("effort, num_samples", [("think", 3), ("chat", 1)])
@pytest.mark.parametrize("deaths", [(9,), (45, 50, 3, 1), (20,) * 7])
def test_conversations_go_on_in_the_user_turn_they_were_in(tmp_path, deaths, effort, num_samples):
    def worker(die_after=None):
        reply = talking_policy
        if effort == "chat":
            reply = lambda request, context: turn("re " + TOKENIZER.decode(context)[-40:-30] * 4)
        engine = FakeRolloutEngine(reply, max_running=3, die_after=die_after)
        return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), flush_s=0.001)

    jobs = [replace(job(f"t{i}"), effort=effort, user_turns=("more", f"end{i}")) for i in range(5)]
    whole = worker()
    undisturbed = whole.run(jobs)
    whole.close()
    assert [len(r.samples()) for r in undisturbed] == [num_samples] * 5
    records = survive(tmp_path, jobs, worker, deaths)
    assert [plain(r) for r in records] == [plain(r) for r in undisturbed]


def test_a_workspace_that_cannot_be_rebuilt_is_infrastructure_and_says_which_call_differed(tmp_path):
    jobs = [agent_job("a")]
    lease = take_lease(tmp_path, "w")
    _, is_dead = dead_after(agent_worker(180), jobs, lease)
    assert is_dead
    fence(tmp_path)
    assert replay(tmp_path).episodes["a"].turns[0].results
    changed = [replace(jobs[0], files={"start": "something else"})]
    ((record,), _) = dead_after(agent_worker(), changed, take_lease(tmp_path, "w"))
    assert (record.finish, record.outcome.kind) == (FinishReason.ABORT, OutcomeKind.LOST)
    assert "read answered 'next-a'" in record.outcome.detail


class NetworkBoxes(FakeBoxes):
    """Boxes whose commands may reach beyond them."""

    def lease(self):
        box = super().lease()
        box.enforced = replace(box.enforced, network=True)
        return box


@pytest.mark.parametrize("tool", ["read", "shell"])
def test_a_call_that_may_have_acted_through_a_network_is_not_repeated_in_another_box(tmp_path, tool):
    arguments = {"read": {"path": "start"}, "shell": {"command": "post"}}[tool]

    def policy(request, context):
        done = "<tool_result>" in TOKENIZER.decode(context)
        return turn("done") if done else turn("", ToolCall(tool, arguments))

    ran = []

    def run(box, argv, stdin):
        ran.append(argv[-1])
        return 0, b"sent"

    def worker(die_after=None):
        engine = FakeRolloutEngine(policy, die_after=die_after)
        return RolloutWorker(engine, TOKENIZER, NetworkBoxes(2, run), FakeGrader(), flush_s=0.001)

    jobs = [job("a", tools=("read", "shell"), max_turns=3, files={"start": "x"})]
    size = len(policy(jobs[0], ()))
    (record,) = survive(tmp_path, jobs, worker, [size + 1])
    kind, num = {"read": (OutcomeKind.GRADED, 0), "shell": (OutcomeKind.LOST, 1)}[tool]
    assert (record.outcome.kind, len(ran)) == (kind, num)
    if tool == "shell":
        assert "may have acted through its network" in record.outcome.detail


def test_a_log_of_another_prompt_is_noted_and_not_used(tmp_path):
    dead_after(agent_worker(30), [agent_job("a")], take_lease(tmp_path, "w"))
    fence(tmp_path)
    other = replace(agent_job("a"), messages=({"role": "user", "content": "other"},))
    ((record,), _) = dead_after(agent_worker(), [other], take_lease(tmp_path, "w"))
    assert record.reward == 1.0 and "another prompt or seed" in record.metadata["log_fault"]
    assert "resumed_at" not in record.metadata
    fence(tmp_path)
    assert replay(tmp_path).faults == {}


def test_nothing_is_shown_before_it_is_in_the_log(tmp_path):
    seen, log = [], tmp_path / "log"

    def look(item):
        copy = tmp_path / "copies" / item.uid  # `replay` reads fenced logs; the owner lives on
        shutil.copytree(log, copy)
        fence(copy)
        turns = replay(copy).episodes[item.uid].turns
        seen.append(
            (turns[-1].finish, tuple(turns[-1].token_ids) == item.token_ids[-len(turns[-1].token_ids) :])
        )
        return 1.0

    engine = FakeRolloutEngine(two_step_policy)
    worker = RolloutWorker(engine, TOKENIZER, FakeBoxes(4), FakeGrader(look))
    list(worker.stream([agent_job("a"), job("b")], take_lease(log, "w")))
    worker.close()
    assert seen == [("stop", True)] * 2


class Dying(NativeEngine):
    """The native engine, dead after so many steps."""

    def __init__(self, *args, die_after=None, **options):
        super().__init__(*args, **options)
        self.left = die_after

    def step(self):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise EngineError("the engine died")
        return super().step()


MODEL = initialize(Transformer(replace(CONFIG, vocab_size=272)), 0)


def native_worker(die_after=None):
    engine = Dying(MODEL, max_rows=5, max_length=90, exact=True, die_after=die_after)
    return RolloutWorker(engine, TOKENIZER, None, FakeGrader(), max_context=90, flush_s=0.001)


@pytest.mark.parametrize("deaths", [(7,), (20, 3, 11), (1,) * 5])
def test_on_the_native_engine_records_are_the_undisturbed_ones_to_the_last_bit(tmp_path, deaths):
    jobs = [
        job(f"p{i // 2}/{i % 2}", group=f"p{i // 2}", max_tokens=30, sampling=SamplingParams(1.0, 30, (), i))
        for i in range(8)
    ]
    whole = native_worker()
    undisturbed = whole.run(jobs)
    whole.close()
    records = survive(tmp_path, jobs, native_worker, deaths)
    assert [plain(r) for r in records] == [plain(r) for r in undisturbed]
