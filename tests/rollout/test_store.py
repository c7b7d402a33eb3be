import math
from dataclasses import replace

import numpy as np
import pytest

from consilience.conf.errors import RunError
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.store import RolloutStore
from consilience.rollout.token_routing import TokenRouting


def record(uid, text="é\udc80"):
    return RolloutRecord(
        uid, "g", "math", "chat", None, (0, 3), (7, 8, 1), (-0.25, math.nan, -1.5), (1, 0, 1), (2, -1, 2),
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), 1.0, {"reward": 1.0}, metadata={"text": text},
    )  # fmt: skip


def test_records_come_back_as_they_were_phase_by_phase(tmp_path):
    store = RolloutStore(tmp_path / "rollouts")
    first, second = [record("a"), record("b")], [record("c")]
    store.append("step-0000", first)
    store.append("step-0001", second)
    assert store.phases() == ["step-0000", "step-0001"]
    assert [r.to_json() for r in store.read()] == [r.to_json() for r in first + second]
    (back,) = store.read("step-0001")
    assert math.isnan(back.logprobs[1]) and back.outcome == Outcome(OutcomeKind.GRADED)


def test_routing_lies_beside_the_tokens_and_must_be_of_their_number(tmp_path):
    routing = TokenRouting.of((1, 2), np.arange(20, dtype=np.uint8).reshape(5, 2, 2))
    store = RolloutStore(tmp_path)
    store.append("p", [replace(record("a"), routing=routing), record("b")])
    assert [r.routing for r in store.read("p")] == [routing, None]
    with pytest.raises(ValueError, match="a: 5 tokens, routing of 4"):
        replace(record("a"), routing=TokenRouting.of((1, 2), np.zeros((4, 2, 2), np.uint8)))


def test_what_a_killed_writer_left_of_a_phase_goes_with_the_rest(tmp_path):
    store = RolloutStore(tmp_path)
    store.append("p", [record("a")])
    (tmp_path / ".p.jsonl.4711").write_text("half a rec")
    store.clear_partial("p")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl"]


def test_a_phase_written_again_replaces_the_old_one_and_leaves_nothing_beside(tmp_path):
    store = RolloutStore(tmp_path)
    store.append("p", [record("a")])
    store.append("p", [record("b")])
    assert [r.uid for r in store.read("p")] == ["b"]
    assert [f.name for f in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_disk_that_refuses_is_one_clear_error_and_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match="cannot write"):
        RolloutStore(tmp_path / "file" / "rollouts").append("p", [record("a")])
    with pytest.raises(RunError, match="phase name"):
        RolloutStore(tmp_path).append("../p", [])


def test_a_damaged_line_is_named(tmp_path):
    store = RolloutStore(tmp_path)
    path = store.append("p", [record("a"), record("b")])
    path.write_text(path.read_text(errors="surrogateescape")[:-30], errors="surrogateescape")
    with pytest.raises(RunError, match="line 2"):
        list(store.read())
    with pytest.raises(RunError, match="cannot read"):
        list(store.read("missing"))
