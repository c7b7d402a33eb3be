"""A second copy of the token log: recovery from it where the first is lost, torn, or has a hole."""

import shutil

import numpy as np
import pytest
from test_recovery import agent_job, agent_worker, dead_after, plain

from consilience.rollout.engine import NewTokens
from consilience.rollout.frame_file import read_frames
from consilience.rollout.lease import fence, take_lease
from consilience.rollout.log_replay import replay
from consilience.rollout.phases import OpenPhase
from consilience.rollout.store import RolloutStore
from consilience.rollout.token_log import TokenLog


def written(folder, copy, *, segment_bytes=400, num_steps=60):
    """A closed log of two episodes in several segments, and what was told to it."""
    log = TokenLog(take_lease(folder, "w", copy_folder=copy), segment_bytes=segment_bytes)
    told = {"a": [], "b": []}
    for uid in told:
        log.open(f"{uid}#0", uid, 0, (1, 2), 7)
    for step in range(num_steps):
        new = NewTokens(0)
        for uid in told:
            new.add(f"{uid}#0", step, 100 + step, float(np.float32(-step / 7)))
            told[uid].append(100 + step)
        log.step(new)
        if step % 5 == 0:
            log.sync()
    log.close()
    return log, told


def tokens_of(found):
    return {uid: episode.turns[0].token_ids for uid, episode in found.episodes.items()}


def segments(folder):
    return sorted(folder.glob("*.log"))


def test_the_copy_is_the_same_bytes_and_nothing_else_lies_there(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    written(first, copy)
    assert len(segments(first)) > 3
    assert [p.read_bytes() for p in segments(first)] == [p.read_bytes() for p in segments(copy)]
    assert {p.suffix for p in copy.iterdir()} == {".log"}


@pytest.mark.parametrize("damage", ["all", "one", "torn", "hole", "header", "copy torn", "copy gone"])
def test_what_was_written_comes_back_from_either_copy(damage, tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    _, told = written(first, copy)
    middle = segments(first)[1]
    data = middle.read_bytes()
    if damage == "all":
        shutil.rmtree(first)
    elif damage == "one":
        middle.unlink()
    elif damage == "torn":
        middle.write_bytes(data[: len(data) // 2])
    elif damage == "hole":
        middle.write_bytes(data[:60] + bytes(80) + data[140:])
    elif damage == "header":
        middle.write_bytes(bytes(20) + data[20:])
    elif damage == "copy torn":
        (copy / middle.name).write_bytes(data[:90])
    else:
        shutil.rmtree(copy)
    fence(first, copy_folder=copy)
    found = replay(first, copy=copy)
    assert tokens_of(found) == told and found.faults == {}
    # Without the copy the damage costs something, so the test has power.
    if not damage.startswith("copy"):
        assert tokens_of(replay(first)) != told


def test_a_copy_that_is_behind_gives_what_it_has_and_a_hole_it_does_not_fill_is_named(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    _, told = written(first, copy, segment_bytes=1 << 20)
    (segment,) = segments(first)
    data, behind = segment.read_bytes(), copy / segment.name
    behind.write_bytes(data[: len(data) - 200])
    num_copied = len(read_frames(behind).payloads)
    segment.write_bytes(data[:200] + bytes(100) + data[300:])
    fence(first, copy_folder=copy)
    found = replay(first, copy=copy)
    assert len(tokens_of(found)["a"]) == num_copied - 2  # two opened turns, then a frame a step
    assert tokens_of(found)["a"] == told["a"][: num_copied - 2]
    assert list(found.faults) == [segment.name]


def test_epochs_go_on_above_those_that_only_the_copy_has_and_these_are_fenced(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    log, _ = written(first, copy)
    shutil.rmtree(first)
    assert not log.lease.is_fenced
    fence(first, copy_folder=copy)
    assert log.lease.is_fenced  # one that was only frozen acknowledges nothing more
    assert take_lease(first, "w", copy_folder=copy).epoch == log.lease.epoch + 1


def test_a_folder_that_takes_no_copy_leaves_the_log_as_it_is(tmp_path):
    first, copy = tmp_path / "first", tmp_path / "file"
    copy.write_text("in the way")
    log, told = written(first, copy)
    assert str(copy) in log._copy.fault
    fence(first, copy_folder=copy)
    assert tokens_of(replay(first, copy=copy)) == told


@pytest.mark.parametrize("lost", ["all", "segments"])
@pytest.mark.parametrize("deaths", [(40,), (120, 60), (150, 90)])
def test_agents_go_on_from_the_copy_when_the_first_log_is_gone(deaths, lost, tmp_path):
    first, copy = tmp_path / "first", tmp_path / "copy"
    jobs = [agent_job(f"a{i}") for i in range(6)]
    whole = agent_worker()
    undisturbed = whole.run(jobs)
    whole.close()
    stored = {}
    for die_after in (*deaths, None):
        fence(first, copy_folder=copy)
        missing = [j for j in jobs if j.uid not in stored]
        records, is_dead = dead_after(
            agent_worker(die_after), missing, take_lease(first, "w", copy_folder=copy)
        )
        assert is_dead == (die_after is not None)
        stored |= {r.uid: r for r in records}
        if lost == "all":
            shutil.rmtree(first)
        else:
            for path in segments(first):
                path.unlink()
    assert [plain(stored[j.uid]) for j in jobs] == [plain(r) for r in undisturbed]
    assert any(r.metadata.get("resumed_at") for r in stored.values())


def test_a_whole_phase_needs_no_copy_any_more(tmp_path):
    store = RolloutStore(tmp_path / "rollouts", log_copy=tmp_path / "copy")
    jobs = [agent_job("a")]
    phase = OpenPhase(store, 3, lambda step: jobs)
    assert phase.durable.copy_folder == tmp_path / "copy" / "000003"
    worker = agent_worker()
    for records in worker.stream(phase.missing, phase.durable.take_lease("w")):
        phase.keep(records)
    worker.close()
    assert segments(tmp_path / "copy" / "000003")
    phase.finish()
    assert not (tmp_path / "copy" / "000003").exists()
