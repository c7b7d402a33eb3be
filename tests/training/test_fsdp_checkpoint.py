"""A checkpoint does not tell which engine or how many ranks wrote it; a killed save leaves the last one."""

import json
import os
import signal

import numpy as np
import pytest
import torch

from consilience.conf.errors import CheckpointError
from consilience.model.ranks import ALONE
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint, read_meta, save_checkpoint
from consilience.training.disk import Disk
from consilience.training.engine import is_cut
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.torch_engine import TorchEngine
from tests.rank_processes import on_ranks
from tests.training.test_fsdp_engine import whole
from tests.training.v4_ranks import SETTINGS, assert_close, train, v4_model

pytestmark = pytest.mark.row("checkpoints", "fsdp")

torch.set_num_threads(1)

META = CheckpointMeta(stage="sft", seed=3, step=0)


def engine_of(ranks, seed=0):
    if ranks is ALONE:
        return TorchEngine(v4_model(seed=seed), SETTINGS)
    from consilience.training.fsdp_engine import FsdpEngine

    return FsdpEngine(v4_model(seed=seed), SETTINGS, ranks=ranks)


def stage(ranks, folder, seed=0):
    return StageCheckpoints(folder / "checkpoints", engine_of(ranks, seed), folder / "tokenizer.json", META)


def saved_and_continued(ranks, folder):
    """Two updates, a checkpoint, two more; then the same two from the checkpoint in another engine."""
    if ranks.is_first:
        (folder / "tokenizer.json").write_text("{}")
    ranks.barrier()
    first = stage(ranks, folder)
    train(first.engine, 2)
    first.save(2, {"next": 2})
    reports = train(first.engine, 2, first=2)
    return whole(first.engine.model.state_dict()), reports, continued(ranks, folder)


def continued(ranks, folder):
    """Weights and reports of two updates from the checkpoint of step 2, by weights that were others."""
    second = stage(ranks, folder, seed=5)
    assert second.resume() == (2, {"next": 2}) and second.engine.num_steps == 2
    reports = train(second.engine, 2, first=2)
    return whole(second.engine.model.state_dict()), reports


def check_continued(found, expected, tolerance):
    """Reports within `tolerance`; weights within 5 times as much: Muon raises rounding (`assert_close`)."""
    weights, reports = found
    if tolerance:
        assert_close(weights, expected[0], 5 * tolerance, is_update=True)
    else:
        assert all(np.array_equal(weights[name], expected[0][name]) for name in weights)
    for own, other in zip(reports, expected[1]):
        assert own == pytest.approx(other, rel=tolerance, abs=0)


@pytest.mark.slow
def test_what_two_ranks_save_two_continue_bit_for_bit_and_one_process_as_well(tmp_path):
    weights, reports, again = on_ranks(2, saved_and_continued, tmp_path, folder=tmp_path)[0]
    check_continued(again, (weights, reports), 0.0)
    check_continued(continued(ALONE, tmp_path), (weights, reports), 1e-6)
    folder = tmp_path / "checkpoints/step-000002"
    model, meta = load_checkpoint(folder)
    one = TorchEngine(model, SETTINGS)
    one.load(folder / "state")
    save_checkpoint(tmp_path / "alone", model, tmp_path / "tokenizer.json", meta, one)
    assert files_of(tmp_path / "alone") == files_of(folder)
    assert read_meta(tmp_path / "alone") == meta


def files_of(folder):
    """Bytes of every file, the headers of tensors as what they mean."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "consilience.json"):
        data = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            data = json.loads(data[8:end]), data[end:]
        found[path.relative_to(folder).as_posix()] = data
    return found


@pytest.mark.slow
def test_what_one_process_saves_four_ranks_continue(tmp_path):
    weights, reports, again = saved_and_continued(ALONE, tmp_path)
    check_continued(again, (weights, reports), 0.0)
    for found in on_ranks(4, continued, tmp_path, folder=tmp_path):
        check_continued(found, (weights, reports), 1e-6)


def failing_disk(ranks, folder):
    """The first rank has no room for the index; both raise, and what was there stays."""
    engine = engine_of(ranks)
    assert is_cut(engine)
    save_checkpoint(folder / "ckpt", engine.model, None, META, engine)
    train(engine, 1)

    def full(path, text):
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError) as found:
        save_checkpoint(folder / "ckpt", engine.model, None, META, engine, disk=Disk(write_text=full))
    if ranks.is_first:
        (folder / "file").write_text("no folder")
    with pytest.raises(CheckpointError) as blocked:
        save_checkpoint(folder / "file" / "ckpt", engine.model, None, META, engine)
    return str(found.value), str(blocked.value)


@pytest.mark.slow
def test_what_fails_on_the_first_ranks_disk_is_an_error_on_all(tmp_path):
    first, second = on_ranks(2, failing_disk, tmp_path, folder=tmp_path)
    assert first == second and "no room to write the checkpoint" in first[0]
    load_checkpoint(tmp_path / "ckpt")  # verified
    assert sorted(p.name for p in tmp_path.iterdir() if "meeting" not in p.name) == ["ckpt", "file"]


def killed(ranks, folder, who):
    """Rank `who` dies by SIGKILL amid the second save."""
    engine = engine_of(ranks)
    save_checkpoint(folder / "ckpt", engine.model, None, META, engine)
    train(engine, 1)
    left = [9]

    def die(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if ranks.rank == who:
        from consilience.training import sharded_tensors

        plain = sharded_tensors._to_first
        sharded_tensors._to_first = lambda *given: (die(), plain(*given))[1]
    save_checkpoint(folder / "ckpt", engine.model, None, META, engine)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(who, tmp_path):
    with pytest.raises(AssertionError, match=r"rank \d"):
        on_ranks(2, killed, tmp_path, who, folder=tmp_path, limit_s=60)
    model, _ = load_checkpoint(tmp_path / "ckpt")  # verified
    assert all(map(torch.equal, model.state_dict().values(), v4_model().state_dict().values()))
    save_checkpoint(tmp_path / "ckpt", model, None, META)  # clears what the dead left
    assert not [p for p in tmp_path.iterdir() if ".tmp-" in p.name]
