"""Real boxes under workers that are killed: what ran ran once, what was there is there, none is left.

The host that owns the boxes is a process of its own; workers come and go.
"""

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from forked_pool import ForkedPool
from host_process import HostProcess

from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.engine import SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.grading import FakeGrader
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.parsing import ToolCall
from consilience.rollout.phases import Durable
from consilience.rollout.records import OutcomeKind
from consilience.rollout.worker import RolloutWorker
from consilience.sandboxes.host_client import HostPool
from consilience.sandboxes.protocol import Limits, SandboxSpec

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()
SPEC = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20, wall_s=10, memory_bytes=64 << 20))


def turn(text="", *calls):
    message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


def policy(request, context):
    """Two turns with a command each, the second one slow where the prompt says so; then what it answered."""
    said = TOKENIZER.decode(context)
    slow = " sleep 1.2;" if "kind=slow;" in said else ""
    number = said.count("<tool_result>")
    if number < 2:
        wait = slow if number == 1 else ""
        return turn("", ToolCall("shell", {"command": f"echo {request.uid} >> ran;{wait} cat ran start"}))
    return turn(said.rsplit("<tool_result>", 1)[1].split("</tool_result>")[0])


def job(uid, kind="quick"):
    return RolloutJob(
        uid, uid, "agent", "chat", ({"role": "user", "content": f"kind={kind};"},), reward="x", max_turns=4,
        max_tokens=1500, tools=("shell",), files={"start": "here"},
        sampling=SamplingParams(max_tokens=1500),
    )  # fmt: skip


class Fatal:
    """A pool whose owner is killed half a second into the first slow command that it has run."""

    def __init__(self, pool, marker):
        self.pool, self.marker = pool, marker
        self.find, self.release = pool.find, pool.release

    def lease(self):
        box = self.pool.lease()
        run = box.exec

        def fatal(argv, **options):
            if "sleep" in argv[-1] and not self.marker.exists():
                self.marker.touch()
                threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
            return run(argv, **options)

        box.exec = fatal
        return box


@pytest.fixture
def host(tmp_path):
    process = HostProcess(tmp_path / "host", ttl_s=3.0)
    yield process
    process.kill()


def run(host, folder, jobs, die_after=()):
    """Records by uid; worker i is killed at its step `die_after[i]`, if it gets there."""

    def build(version):
        number = len((folder / "workers").read_text().split()) if (folder / "workers").exists() else 0
        engine = FakeRolloutEngine(
            policy, die_after=dict(enumerate(die_after, 1)).get(number), death="kill", max_running=3
        )
        pool = HostPool(host.ask, SPEC, beat_s=0.5)
        boxes = Fatal(pool, folder / "died")
        worker = RolloutWorker(
            engine, TOKENIZER, boxes, FakeGrader(), flush_s=0.001, heartbeat_s=0.1, on_close=pool.close
        )
        return worker

    records = ForkedPool(build, folder / "workers", stall_s=20).generate(
        jobs, durable=Durable(folder / "log", lambda batch: None)
    )
    return {record.uid: record for record in records}


def plain(record):
    metadata = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
    return replace(record, sandbox_ids=(), metadata=metadata).to_json()


def wait_for(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(150)
def test_a_worker_killed_in_the_middle_of_a_command_leaves_it_run_once_and_no_box_behind(host, tmp_path):
    (tmp_path / "calm").mkdir()
    (tmp_path / "wild").mkdir()
    quick = [f"q{i}" for i in range(5)]
    jobs = [job("slow", "slow"), *map(job, quick)]
    (tmp_path / "calm" / "died").touch()  # nobody dies there
    undisturbed = run(host, tmp_path / "calm", jobs)
    num_calm = len(host.commands())
    records = run(host, tmp_path / "wild", jobs, die_after=(10_000, 40, 60))
    assert (tmp_path / "wild" / "died").exists()
    # its successor waited for the command that the killed worker had begun, and got its answer
    assert records["slow"].outcome.kind is OutcomeKind.GRADED and "resumed_at" in records["slow"].metadata
    told = TOKENIZER.decode(records["slow"].token_ids).rsplit("<tool_result>", 1)[1]
    assert told.startswith("slow#0\nslow#1\nhere")
    commands = Counter(host.commands()[num_calm:])
    assert max(commands.values()) == 1
    (box,) = {box for box, command in commands if "sleep" in command}
    wait_for(lambda: (host.folder / "final" / box).exists())
    assert host.final(box) == "slow#0\nslow#1\n"
    for uid in records:
        assert plain(records[uid]) == plain(undisturbed[uid])
    assert host.metrics()["taken_over"] >= 1
    wait_for(lambda: host.metrics()["leased"] == 0)
    wait_for(lambda: not host.processes())


@pytest.mark.timeout(60)
def test_boxes_that_no_log_names_end_with_their_lease(host):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        pool = HostPool(host.ask, SPEC, beat_s=0.5)
        boxes = [pool.lease() for _ in range(3)]
        os.write(writer, b"x")
        boxes[0].exec(["sh", "-c", "sleep 60"])
    os.read(reader, 1)
    assert host.metrics()["leased"] == 3 and len(host.processes()) >= 3
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    killed_at = time.monotonic()
    wait_for(lambda: host.metrics()["reaped"] == 3)
    assert time.monotonic() - killed_at > 2.0  # a successor had its time
    wait_for(lambda: not host.processes())


@pytest.mark.timeout(60)
def test_a_host_that_is_killed_leaves_no_box(host):
    pool = HostPool(host.ask, SPEC, beat_s=0.5)
    boxes = [pool.lease() for _ in range(3)]
    assert host.processes() and boxes[0].exec(["true"]).is_ok
    host.kill()
    wait_for(lambda: not host.processes(), limit_s=5.0)
    assert pool.find(boxes[0].id) is None
    pool.close()
