"""Workers killed while their tools run, over boxes that live on: no command runs twice in a box, and what is
not known is said. The kills are `kill -9` of the process that runs the command, and between two steps.

A box that was given back before its record had left the worker does not live on: its calls are run again in a
fresh one. One that was leased, but not yet in the log when its worker died, has no owner: it stays.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from forked_pool import ForkedPool
from lasting_boxes import LastingBoxes

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

torch.set_num_threads(1)
TOKENIZER = byte_tokenizer()


def turn(text="", *calls):
    message = {"role": "assistant", "content": text, "tool_calls": list(calls)}
    return TOKENIZER.encode(text_of(render_assistant(message, False)))


def shell(command):
    return ToolCall("shell", {"command": command})


def policy(request, context):
    """Two turns of two calls each, then what the last of them answered; `kind` comes from the prompt."""
    said = TOKENIZER.decode(context)
    kind = said.split("kind=")[1].split(";")[0]
    number = said.count("<tool_result>") // 2
    if number < 2:
        name = kind if number == 1 else "ok"
        return turn("", ToolCall("read", {"path": "start"}), shell(f"{name} {request.uid}"))
    return turn(said.rsplit("<tool_result>", 1)[1].split("</tool_result>")[0])


def job(uid, kind):
    return RolloutJob(
        uid, uid, "agent", "chat", ({"role": "user", "content": f"kind={kind};"},), reward="x", max_turns=4,
        max_tokens=1500, tools=("read", "shell"), files={"start": "here"},
        sampling=SamplingParams(max_tokens=1500),
    )  # fmt: skip


def run(folder, jobs, die_after=()):
    """Records by uid and the boxes; worker i is killed at its step `die_after[i]`, if it gets there."""
    boxes = LastingBoxes(folder / "boxes")

    def build(version):
        number = len((folder / "workers").read_text().split()) if (folder / "workers").exists() else 0
        steps = dict(enumerate(die_after, 1)).get(number)
        engine = FakeRolloutEngine(policy, die_after=steps, death="kill", max_running=3)
        return RolloutWorker(engine, TOKENIZER, boxes, FakeGrader(), flush_s=0.001, heartbeat_s=0.1)

    records = ForkedPool(build, folder / "workers", stall_s=10).generate(
        jobs, durable=Durable(folder / "log", lambda batch: None)
    )
    return {record.uid: record for record in records}, boxes


def plain(record):
    metadata = {k: v for k, v in record.metadata.items() if k != "resumed_at"}
    return replace(record, sandbox_ids=(), metadata=metadata).to_json()


@pytest.mark.timeout(120)
def test_a_command_runs_once_whenever_its_worker_is_killed_and_its_unknown_outcome_is_typed(tmp_path):
    kinds = ["ok", "die-before", "ok", "die-after"] + ["ok"] * 16
    jobs = [job(f"j{i}", kind) for i, kind in enumerate(kinds)]
    (tmp_path / "calm").mkdir()
    undisturbed, calm = run(tmp_path / "calm", [job(f"j{i}", "ok") for i in range(len(kinds))])
    assert all(path.name.startswith("released-") for path in calm.folder.iterdir())
    records, boxes = run(tmp_path, jobs, die_after=(35, 90, 150, 150, 40))
    assert max(Counter(boxes.commands()).values()) == 1
    ran = Counter(command for _, command in boxes.commands())
    unknown = {uid for uid, r in records.items() if r.outcome.kind is OutcomeKind.UNKNOWN}
    assert {"j1", "j3"} <= unknown
    assert ran["die-before j1#1"] == 0
    for uid in unknown:
        assert "is not run a second time" in records[uid].outcome.detail and records[uid].reward is None
        assert (boxes.folder / f"released-{records[uid].sandbox_ids[-1]}").is_dir()
    known = set(records) - unknown
    assert known and any("resumed_at" in records[uid].metadata for uid in known)
    for uid in known:
        assert ran[f"ok {uid}#0"] >= 1 and ran[f"ok {uid}#1"] >= 1
        assert plain(records[uid]) == plain(undisturbed[uid])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("kind", "times"), [("die-before", 0), ("die-after", 1)])
def test_a_command_that_kills_its_worker_is_unknown_on_either_side_of_its_effect(tmp_path, kind, times):
    records, boxes = run(tmp_path, [job("j0", kind)])
    assert records["j0"].outcome.kind is OutcomeKind.UNKNOWN
    assert sorted(command for _, command in boxes.commands()) == [f"{kind} j0#1"] * times + ["ok j0#0"]
