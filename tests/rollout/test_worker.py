import contextlib
import threading
import time

import pytest
import torch

from consilience.conf.errors import EngineError, SandboxLost, SandboxUnavailable
from consilience.model.digest import weights_digest
from consilience.rollout import protocol as p
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.deadlines import Limits
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import build_fake_worker, byte_tokenizer
from consilience.rollout.grading import FakeGrader, Graded
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.parsing import ToolCall
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()


def job(uid, **fields):
    fields = {"reward": "x", "max_tokens": 2000, "sampling": SamplingParams(max_tokens=2000), **fields}
    return RolloutJob(
        uid, fields.pop("group", uid), "agent", "chat", ({"role": "user", "content": uid},), **fields
    )


def agent_job(uid, **fields):
    return job(uid, tools=("read", "write"), max_turns=4, files={"start": f"next-{uid}"}, **fields)


def turn(text="", *calls):
    message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


def two_step_policy(request, context):
    """Reads `start`, writes what it read, then answers with it."""
    said = TOKENIZER.decode(context)
    if request.parent is None:
        return turn("", ToolCall("read", {"path": "start"}))
    value = said.split("<tool_result>")[1].split("</tool_result>")[0]
    if "wrote" in said:
        return turn(value)
    return turn("", ToolCall("write", {"path": "out", "content": value}))


def wrote_its_answer(item):
    """1 if the episode's own box, as the model left it, holds the answer."""
    return float(item.sandbox is not None and item.sandbox.read("out").decode() == item.text)


class SlowGrader:
    def __init__(self, engine_steps):
        self.engine_steps, self.seen = engine_steps, []

    def grade(self, items):
        before = self.engine_steps()
        time.sleep(0.05)
        self.seen.append(self.engine_steps() - before)
        return [Graded(0.0, {}, Outcome(OutcomeKind.GRADED)) for _ in items]


@contextlib.contextmanager
def make(reply, sandboxes=None, grader=None, *, engine=None, **options):
    """A worker over a fake engine with options `engine`; closed at the end."""
    fake = FakeRolloutEngine(reply, **(engine or {}))
    worker = RolloutWorker(fake, TOKENIZER, sandboxes, grader or FakeGrader(), flush_s=0.02, **options)
    try:
        yield worker
    finally:
        worker.close()


def test_records_come_in_job_order_whatever_finishes_first():
    reply = lambda request, context: turn("x" * (40 - 4 * int(TOKENIZER.decode(context[2:-2]))))
    with make(reply, engine={"max_running": 3}) as worker:
        jobs = [job(str(i)) for i in range(9)]
        records = worker.run(jobs)
    assert [r.uid for r in records] == [j.uid for j in jobs]
    assert [r.reward for r in records] == [40.0 - 4 * i for i in range(9)]
    assert all(r.outcome.kind is OutcomeKind.GRADED and r.isolation == "none" for r in records)


def test_multi_turn_episodes_run_their_tools_and_are_graded_with_their_own_box():
    boxes = FakeBoxes(2)
    with make(two_step_policy, boxes, FakeGrader(wrote_its_answer)) as worker:
        records = worker.run([agent_job(f"a{i}") for i in range(12)])
        assert worker.state().num_held == 0
    assert [r.reward for r in records] == [1.0] * 12
    assert all(r.metadata["turns"] == 3 and r.finish is FinishReason.STOP for r in records)
    assert all(len(r.sandbox_ids) == 1 for r in records) and len({r.sandbox_ids for r in records}) == 12
    assert boxes.num_leased == boxes.num_released == 12


def test_fewer_boxes_and_threads_than_episodes_never_deadlock():
    with make(two_step_policy, FakeBoxes(1), num_tool_threads=1, num_lease_threads=3) as worker:
        assert len(worker.run([agent_job(f"a{i}") for i in range(8)])) == 8


def test_grading_does_not_stop_decoding():
    engine_steps = lambda: worker.state().sampled_tokens
    grader = SlowGrader(engine_steps)
    reply = lambda request, context: turn("x" * (5 if "short" in TOKENIZER.decode(context) else 150))
    with make(reply, grader=grader, engine={"step_s": 0.001}) as worker:
        worker.run([job("short"), job("long")])
    assert grader.seen[0] > 5


def test_a_lost_box_ends_its_own_episode_only():
    def run(box, argv, stdin):
        raise SandboxLost("the box died")

    def reply(request, context):
        is_bad = "bad" in TOKENIZER.decode(context)
        return turn("", ToolCall("shell", {"command": "x"})) if is_bad else turn("fine")

    boxes = FakeBoxes(2, run)
    with make(reply, boxes) as worker:
        records = worker.run([job("bad", tools=("shell",), max_turns=2), job("good")])
    bad, good = records
    assert (bad.outcome.kind, bad.finish, bad.reward) == (OutcomeKind.LOST, FinishReason.ABORT, None)
    assert "the box died" in bad.outcome.detail and bad.num_sampled > 0 and len(bad.sandbox_ids) == 1
    assert good.reward == 4.0 and boxes.num_released == 1


class NoBoxes:
    def lease(self):
        raise SandboxUnavailable("no isolation as strong as bwrap_user")

    def release(self, box):
        raise AssertionError("nothing was leased")


def test_a_lease_that_fails_is_infrastructure_never_reward_zero():
    with make(two_step_policy, NoBoxes()) as worker:
        (record,) = worker.run([agent_job("a")])
    assert record.outcome.kind is OutcomeKind.LOST and "bwrap_user" in record.outcome.detail


def test_calls_that_cannot_run_are_answered_without_leasing_a_box():
    def reply(request, context):
        return turn("", ToolCall("fly", {})) if request.parent is None else turn("sorry")

    boxes = FakeBoxes(1)
    with make(reply, boxes) as worker:
        (record,) = worker.run([agent_job("a")])
    assert boxes.num_leased == 0 and record.finish is FinishReason.STOP
    assert "unknown tool 'fly'" in TOKENIZER.decode(record.token_ids)


class BrokenGrader:
    def __init__(self, verdicts):
        self.verdicts = verdicts

    def grade(self, items):
        if self.verdicts is None:
            raise OSError("no judge")
        return self.verdicts


@pytest.mark.parametrize(
    "verdicts, kind, detail",
    [
        (None, OutcomeKind.INFRA, "no judge"),
        ([], OutcomeKind.INFRA, "0 verdicts for 1"),
        ([Graded(float("nan"), {}, Outcome(OutcomeKind.GRADED))], OutcomeKind.FAILED, "nan"),
        ([Graded(None, {}, Outcome(OutcomeKind.GRADED))], OutcomeKind.FAILED, "None"),
        ([Graded(None, {}, Outcome(OutcomeKind.FAILED, "raised"))], OutcomeKind.FAILED, "raised"),
    ],
)
def test_a_grader_that_fails_is_a_typed_outcome(verdicts, kind, detail):
    with make(lambda request, context: turn("x"), grader=BrokenGrader(verdicts)) as worker:
        (record,) = worker.run([job("a")])
    assert (record.outcome.kind, record.reward) == (kind, None) and detail in record.outcome.detail


def test_a_job_without_a_reward_is_not_graded_and_not_masked():
    grader = FakeGrader()
    with make(lambda request, context: turn("x"), grader=grader) as worker:
        (record,) = worker.run([job("a", reward="")])
    assert record.reward is None and record.outcome.is_scored and grader.calls == []


def test_jobs_that_cannot_start_are_aborted_and_the_others_run():
    bad_message = RolloutJob("m", "m", "d", "chat", ({"role": "alien", "content": ""},), reward="x")
    bad_effort = RolloutJob("e", "e", "d", "frantic", ({"role": "user", "content": ""},), reward="x")
    with make(lambda request, context: turn("x"), max_context=30) as worker:
        records = worker.run([bad_message, bad_effort, job("t", tools=("read",)), job("l" * 40), job("ok")])
    details = [r.outcome.detail for r in records]
    assert [r.outcome.kind for r in records] == [OutcomeKind.INFRA] * 4 + [OutcomeKind.GRADED]
    for found, detail in zip(["alien", "frantic", "context holds 30", "context holds 30"], details):
        assert found in detail
    with pytest.raises(EngineError, match="share a uid"):
        build_fake_worker().run([job("a"), job("a")])


def test_a_dead_engine_stops_the_run_and_gives_every_box_back():
    boxes = FakeBoxes(4)
    with (
        make(two_step_policy, boxes, engine={"die_after": 150}) as worker,
        pytest.raises(EngineError, match="died"),
    ):
        worker.run([agent_job(f"a{i}") for i in range(6)])
    assert boxes.num_leased == boxes.num_released


def test_a_stream_that_is_broken_off_gives_every_box_back_and_the_worker_goes_on():
    boxes = FakeBoxes(2)
    with make(two_step_policy, boxes, engine={"step_s": 0.0002}) as worker:
        stream = worker.stream([agent_job(f"a{i}") for i in range(12)])
        assert next(stream)
        stream.close()
        records = worker.run([agent_job(f"b{i}") for i in range(4)])
    assert [r.finish for r in records] == [FinishReason.STOP] * 4
    assert boxes.num_leased == boxes.num_released


def test_published_weights_show_in_the_records_of_the_next_run():
    worker = build_fake_worker()
    weights = {"w": torch.ones(3)}
    worker.publish(weights, weights_digest(weights), 5)
    (record,) = worker.run([job("a")])
    assert set(record.weight_version) == {5} and worker.state().digest == weights_digest(weights)
    worker.close()


def test_samples_of_a_group_share_their_prompt_ids_and_another_prompt_does_not():
    worker = build_fake_worker()
    records = worker.run([job("a/0", group="a"), job("a/1", group="a")])
    assert p.USER in TOKENIZER.decode(records[0].prompt_ids)
    assert records[0].prompt_ids != records[1].prompt_ids  # same group name, other messages
    worker.close()


def test_no_thread_outlives_its_worker():
    before = threading.active_count()
    with make(two_step_policy, FakeBoxes(2)) as worker:
        worker.run([agent_job("a")])
    assert threading.active_count() == before


SHORT = Limits(tool_s=0.2, lease_s=0.2, grade_s=0.2, grade_sample_s=0.0, release_s=0.2, close_s=1.0)


class Stuck:
    """A function that hangs until the test is over, for whatever `name` is in."""

    def __init__(self):
        self.over = threading.Event()
        self.seen: list[str] = []

    def hang(self, name):
        self.seen.append(name)
        if "bad" in name:
            self.over.wait(60)


class StuckBoxes(FakeBoxes):
    """The first lease hangs."""

    def __init__(self, stuck):
        super().__init__(4)
        self.stuck = stuck

    def lease(self):
        self.stuck.hang("good" if self.stuck.seen else "bad")
        return super().lease()


def stalled_of(records):
    return {r.uid: r.metadata["stalled"]["stage"] for r in records if "stalled" in r.metadata}


def test_a_tool_that_hangs_ends_its_own_episode_with_the_stall_and_holds_nobody_up():
    stuck = Stuck()

    def run(box, argv, stdin):
        stuck.hang(" ".join(argv))
        return 0, b"ok"

    def reply(request, context):
        name = "bad" if "bad" in TOKENIZER.decode(context) else "good"
        return turn("", ToolCall("shell", {"command": name})) if request.parent is None else turn("fine")

    boxes = FakeBoxes(4, run)
    with make(reply, boxes, num_tool_threads=1, limits=SHORT) as worker:
        jobs = [job(uid, tools=("shell",), max_turns=2) for uid in ("bad", "a", "b", "c")]
        records = worker.run(jobs)
        assert worker.state().num_held == 0
    assert stalled_of(records) == {"bad": "tool"} and [r.reward for r in records] == [None, 4.0, 4.0, 4.0]
    bad = records[0]
    assert (bad.outcome.kind, bad.finish) == (OutcomeKind.INFRA, FinishReason.ABORT)
    assert bad.metadata["stalled"]["uids"] == ("bad",) and bad.metadata["stalled"]["waited_s"] > 0.2
    assert boxes.num_leased == boxes.num_released == 4
    stuck.over.set()


def test_a_lease_that_hangs_is_given_up_and_the_box_that_comes_late_is_given_back():
    stuck = Stuck()
    boxes = StuckBoxes(stuck)

    def free_late(item):
        if not stuck.over.is_set():
            stuck.over.set()
            time.sleep(0.1)  # within its limit: the late box arrives while this stream still runs
        return 1.0

    with make(two_step_policy, boxes, FakeGrader(free_late), num_lease_threads=1, limits=SHORT) as worker:
        records = worker.run([agent_job(f"a{i}") for i in range(4)])
    assert list(stalled_of(records).values()) == ["lease"] and [r.reward for r in records].count(1.0) == 3
    assert boxes.num_leased == boxes.num_released == 4


def test_a_grader_that_hangs_ends_its_batch_only():
    stuck = Stuck()
    grader = FakeGrader(lambda item: [stuck.hang(item.uid), 1.0][1])
    with make(lambda request, context: turn("x"), grader=grader, grade_batch=1, limits=SHORT) as worker:
        records = worker.run([job("bad"), job("a"), job("b")])
        assert stalled_of(records) == {"bad": "grade"}
        assert [(r.uid, r.reward) for r in records[1:]] == [("a", 1.0), ("b", 1.0)]
        (again,) = worker.run([job("c")])  # and the worker is as good as before
    assert again.reward == 1.0
    stuck.over.set()


def test_a_stream_that_is_broken_off_waits_for_its_threads_no_longer_than_their_limit():
    stuck = Stuck()
    grader = FakeGrader(lambda item: [stuck.hang(item.uid), 1.0][1])
    with make(lambda request, context: turn("x"), grader=grader, grade_batch=1, limits=SHORT) as worker:
        stream = worker.stream([job("a"), job("bad"), job("bad too")])
        assert next(stream)
        stream.close()
    stuck.over.set()
