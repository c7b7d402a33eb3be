"""The metrics file survives a crash at any byte and never shows a step twice."""

import json
import math
import resource

import numpy as np
import pytest
import torch

from consilience.conf.errors import RunError
from consilience.training.metrics import FanOut, MemorySink, MetricsLog, RolloutRow, read_metrics, surviving


def write(path, steps, **kwargs):
    log = MetricsLog(path, **kwargs)
    for step in steps:
        log.scalars(step, {"loss": 1.0 / step})
    log.finish()


def steps(path):
    return [row["step"] for row in read_metrics(path)]


def test_every_line_is_readable_as_soon_as_it_is_written(tmp_path):
    log = MetricsLog(tmp_path / "stages/sft/metrics.jsonl")
    log.scalars(
        1, {"loss": torch.tensor(0.5), "n": np.int64(3), "kl": {"math": np.float32(0.25)}, "bad": math.nan}
    )
    (row,) = read_metrics(log.path)
    assert row["step"] == 1 and row["loss"] == 0.5 and row["n"] == 3
    assert row["kl"] == {"math": 0.25} and row["bad"] is None and row["time"] > 0
    log.finish()
    log.finish()


def test_a_resume_cuts_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2, 3, 4, 5])
    write(path, [4, 5, 6], resume_step=3)
    assert steps(path) == [1, 2, 3, 4, 5, 6]
    write(path, [1], resume_step=0)
    assert steps(path) == [1]


def test_a_crash_at_any_byte_of_the_last_line_loses_that_line_only(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2])
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for cut in range(second, len(whole)):
        path.write_bytes(whole[:cut])
        assert steps(path) == [1]
        write(path, [2])
        assert steps(path) == [1, 2]


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(RunError, match=r"m.jsonl, line 2: not a line of metrics"):
        read_metrics(path)
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_a_full_disk_is_a_run_error_and_what_was_written_stays(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    log.scalars(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, hard))
    try:
        with pytest.raises(RunError, match="free disk space and run again"):
            log.scalars(2, {"loss": 1.0})
        with pytest.raises(RunError, match="free disk space and run again"):
            log.finish()  # as a stage does on its way out
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.finish()
    assert steps(log.path) == [1]


def test_sinks_receive_everything_in_order():
    sinks = [MemorySink(), MemorySink()]
    out = FanOut(sinks)
    row = RolloutRow("u", "p", "c", reward=1.0, reward_parts={"b": 2.0, "a": math.inf})
    out.scalars(1, {"loss": 2.0})
    out.rollouts(1, [row])
    out.finish()
    for sink in sinks:
        assert sink.rows == [{"step": 1, "loss": 2.0}] and sink.samples == [(1, row)] and sink.is_finished
    assert json.loads(row.cells()["reward_parts"]) == {"a": None, "b": 2.0}


def test_rows_that_a_stage_went_back_over_do_not_survive_also_after_a_resume(tmp_path):
    path = tmp_path / "m.jsonl"
    write(path, [1, 2, 3, 4])
    log = MetricsLog(path)
    log.scalars(2, {"rolled_back_from": 4})
    log.scalars(3, {"loss": 30.0})
    log.scalars(4, {"loss": 40.0})
    log.finish()
    assert [(row["step"], row["loss"]) for row in surviving(read_metrics(path))] == [
        (1, 1.0),
        (2, 0.5),
        (3, 30.0),
        (4, 40.0),
    ]
    write(path, [4], resume_step=3)
    assert [row["loss"] for row in surviving(read_metrics(path))] == [1.0, 0.5, 30.0, 0.25]
    assert len(read_metrics(path)) == 6  # 1 2 3, the marker, 3 4: what was undone stays on record
