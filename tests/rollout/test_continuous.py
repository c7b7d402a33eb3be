"""Jobs and weights reach a worker between two of its steps; every token knows the weights that sampled it."""

import contextlib
import threading
import time
from concurrent.futures import Future

import pytest
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.continuous import Inbox, Server, serve
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.parsing import ToolCall
from consilience.rollout.worker import RolloutWorker

TOKENIZER = byte_tokenizer()
WEIGHTS = {"w": torch.arange(6.0)}
DIGEST = weights_digest(WEIGHTS)


def job(uid, **fields):
    sampling = SamplingParams(max_tokens=500)
    messages = ({"role": "user", "content": uid},)
    return RolloutJob(
        uid, uid, "d", "chat", messages, reward="x", max_tokens=500, sampling=sampling, **fields
    )


def say(text, *calls):
    message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


@contextlib.contextmanager
def make(reply, sandboxes=None, **engine):
    worker = RolloutWorker(
        FakeRolloutEngine(reply, **engine), TOKENIZER, sandboxes, FakeGrader(), flush_s=0.0
    )
    try:
        yield worker
    finally:
        worker.close()


def publish(server, version, recompute=False):
    done = Future()
    server.publish(WEIGHTS, DIGEST, version, recompute, done)
    done.result(timeout=0)


def finish(server, num):
    records = {}
    while len(records) < num:
        records |= {r.uid: r for r in server.advance()}
    server.close()
    return records


@pytest.mark.parametrize("recompute", [False, True])
def test_requests_go_on_with_new_weights_and_each_token_has_its_version(recompute):
    with make(lambda request, context: say("ten letter")) as worker:
        server = Server(worker)
        server.begin([job("a")], None)
        for _ in range(4):
            server.advance()
        publish(server, 1, recompute)
        server.begin([job("b")], None)
        for _ in range(2):
            server.advance()
        publish(server, 2, recompute)
        publish(server, 5, recompute)
        records = finish(server, 2)
    assert records["a"].weight_version == (0,) * 4 + (1,) * 2 + (5,) * 5
    assert records["b"].weight_version == (1,) * 2 + (5,) * 9
    assert {r.token_ids for r in records.values()} == {tuple(say("ten letter"))}


def agent(request, context):
    said = TOKENIZER.decode(context)
    if "wrote" in said:
        return say("done")
    if "<tool_result>" not in said:
        return say("", ToolCall("read", {"path": "start"}))
    return say("", ToolCall("write", {"path": "out", "content": "x"}))


@pytest.mark.parametrize("recompute", [False, True])
def test_episodes_with_tools_see_their_whole_stream_wherever_weights_arrive(recompute):
    jobs = [
        job(f"a{i}", tools=("read", "write"), max_turns=4, files={"start": f"next-{i}"}) for i in range(3)
    ]
    with make(agent, FakeBoxes(3)) as worker:
        undisturbed = worker.run(jobs)
        server, version, records = Server(worker), 0, {}
        server.begin(jobs, None)
        while len(records) < 3:
            version += 1
            publish(server, version, recompute)
            records |= {r.uid: r for r in server.advance()}
        assert (worker.state().num_held, worker.state().num_running) == (0, 0)
        server.close()
    for before in undisturbed:
        after = records[before.uid]
        assert (after.token_ids, after.loss_mask) == (before.token_ids, before.loss_mask)
        versions = [v for v, m in zip(after.weight_version, after.loss_mask) if m]
        assert versions == sorted(versions) and len(set(versions)) > 20


def test_what_is_cleared_is_gone_from_the_engine_and_may_come_again():
    with make(lambda request, context: say("abc"), max_running=1) as worker:
        server = Server(worker)
        server.begin([job("a"), job("b")], None)
        server.advance()
        unfinished, held = worker.engine.clear()
        assert [(r.uid, r.prefix and len(r.prefix.token_ids)) for r in unfinished] == [
            ("a#0", 1),
            ("b#0", None),
        ]
        assert held == [] and worker.state().num_running == worker.state().num_waiting == 0
        worker.engine.submit(unfinished)
        finish(server, 2)


def test_refused_weights_reach_the_publisher_and_the_worker_goes_on():
    with make(lambda request, context: say("fine"), step_s=0.001) as worker:
        inbox, heard = Inbox(), []
        thread = threading.Thread(target=lambda: heard.extend(r for b in serve(worker, inbox) for r in b))
        thread.start()
        with pytest.raises(WeightsRefused):
            inbox.publish(WEIGHTS, "0" * 64, 1)
        inbox.publish(WEIGHTS, DIGEST, 2)
        inbox.submit([job("a")], None)
        while not heard:
            inbox.publish(WEIGHTS, DIGEST, 2)
        inbox.end()
        thread.join(timeout=10)
        assert not thread.is_alive() and heard[0].weight_version == (2,) * 5


def test_a_publisher_hears_that_the_worker_is_dead_and_does_not_wait():
    with make(lambda request, context: say("a long answer"), die_after=3) as worker:
        inbox, errors = Inbox(), []

        def run():
            try:
                list(serve(worker, inbox))
            except EngineError as error:
                errors.append(error)

        inbox.submit([job("a")], None)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(timeout=10)
        with pytest.raises(EngineError, match="the engine died after 3 steps"):
            inbox.publish(WEIGHTS, DIGEST, 1)
        with pytest.raises(EngineError, match="has stopped"):
            inbox.submit([job("b")], None)
        assert "died" in str(errors[0])


def test_a_worker_without_work_says_now_and_then_that_it_lives():
    with make(lambda request, context: say("x")) as worker:
        worker.heartbeat_s = 0.01
        inbox = Inbox()
        stream = serve(worker, inbox)
        assert [next(stream), next(stream)] == [[], []]
        inbox.end()
        assert [batch for batch in stream if batch] == []


def test_who_waits_with_weights_hears_why_the_worker_stopped_and_the_worker_keeps_its_own_error(monkeypatch):
    """The one who is told may be gone before the next one is told."""
    inbox, heard = Inbox(), []

    def publish():
        with pytest.raises(EngineError, match="disk is full") as error:
            inbox.publish({}, "0" * 64, 1)
        heard.append(error.value)

    threads = [threading.Thread(target=publish) for _ in range(3)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(inbox._messages) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    tell = Future.set_exception

    def tell_and_wait(self, error):
        before = len(heard)
        tell(self, error)
        while len(heard) == before and time.monotonic() < until:
            time.sleep(0.01)

    monkeypatch.setattr(Future, "set_exception", tell_and_wait)
    inbox.close("the disk is full")
    for thread in threads:
        thread.join(timeout=60)
    assert len(heard) == 3 and not inbox._waiting
