"""A stage saves now and then, keeps two checkpoints, and goes on from the newest bit for bit."""

from dataclasses import replace

import pytest
import torch
from small_trainer import CONFIG, small_model

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.training.checkpoint import CheckpointMeta, read_meta
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.step_folders import step_folder
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

META = CheckpointMeta(stage="sft", seed=3, step=0, special_tokens={"<bos>": 0}, domain="math")


def stage(folder, seed=0, config=CONFIG, **options):
    """Checkpoints of a fresh engine whose weights come from `seed`."""
    tokenizer = folder / "tokenizer-source.json"
    tokenizer.write_text("{}")
    engine = TorchEngine(small_model(seed, config), OptimizerSettings(lr=0.01), o_groups=config.o_groups)
    return StageCheckpoints(folder / "checkpoints", engine, tokenizer, META, **options)


def update(engine, number):
    """One training step whose batch depends on its number and on torch's random state."""
    tokens = torch.randint(CONFIG.vocab_size, (2, 12), generator=torch.Generator().manual_seed(number))
    noise = torch.rand(())

    def loss_fn(model, batch):
        logits = model(batch)[:, :-1].flatten(0, 1)
        return (0.5 + noise) * torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()), {}

    engine.forward_backward(loss_fn, tokens, {})
    engine.step()


def state_of(engine):
    return {n: t.clone() for n, t in engine.model.state_dict().items()}


def test_a_resumed_stage_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    first = stage(tmp_path)
    for number in range(3):
        update(first.engine, number)
    first.save(3, {"next": 24, "order": [2, 0, 1]})
    for number in range(3, 6):
        update(first.engine, number)
    torch.manual_seed(99)
    second = stage(tmp_path, seed=5)
    assert second.resume() == (3, {"next": 24, "order": [2, 0, 1]})
    for number in range(3, 6):
        update(second.engine, number)
    a, b = state_of(first.engine), state_of(second.engine)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert not torch.equal(a["head.weight"], small_model(0, CONFIG).head.weight)


def test_without_a_checkpoint_a_stage_starts_at_zero_and_its_weights_stay(tmp_path):
    checkpoints = stage(tmp_path)
    before = state_of(checkpoints.engine)
    assert checkpoints.resume() == (0, {})
    after = state_of(checkpoints.engine)
    assert all(torch.equal(before[n], after[n]) for n in before) and not checkpoints.folder.exists()


def test_the_two_newest_are_kept_and_the_newest_is_resumed(tmp_path):
    checkpoints = stage(tmp_path)
    for step in (1, 2, 9, 10):
        folder = checkpoints.save(step, {"next": step})
        assert folder == step_folder(checkpoints.folder, step)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["step-000009", "step-000010"]
    assert stage(tmp_path, seed=1).resume() == (10, {"next": 10})


def test_a_save_is_due_once_the_time_has_passed(tmp_path):
    patient = stage(tmp_path, every_s=1e9)
    patient.save_if_due(1, {})
    assert not patient.folder.exists()
    eager = stage(tmp_path, every_s=0.0)
    eager.save_if_due(1, {"next": 4})
    eager.save_if_due(2, {"next": 8})
    assert eager.resume() == (2, {"next": 8})
    patient.save(3, {})
    patient.save_if_due(4, {})  # a save of any kind starts the clock again
    assert patient.resume() == (3, {})


def test_a_checkpoint_says_what_the_stage_says_with_step_cursor_and_digest(tmp_path):
    checkpoints = stage(tmp_path)
    folder = checkpoints.save(7, {"next": 28})
    meta = read_meta(folder)
    assert (meta.stage, meta.seed, meta.domain, meta.step, meta.cursor) == ("sft", 3, "math", 7, {"next": 28})
    assert read_meta(folder).digest == meta.digest == weights_digest(to_official(checkpoints.engine.model))
    assert (folder / "tokenizer.json").read_text() == "{}" and (folder / "state").is_dir()
    assert checkpoints.meta == META


def test_saving_the_same_step_again_replaces_it(tmp_path):
    checkpoints = stage(tmp_path)
    checkpoints.save(1, {"next": 1})
    update(checkpoints.engine, 0)
    folder = checkpoints.save(1, {"next": 2})
    assert read_meta(folder).cursor == {"next": 2}
    assert read_meta(folder).digest == weights_digest(to_official(checkpoints.engine.model))
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000001"]


def test_weights_of_another_shape_and_damaged_files_are_refused_by_name(tmp_path):
    folder = stage(tmp_path).save(1, {})
    wider = stage(tmp_path, config=replace(CONFIG, vocab_size=41))
    before = state_of(wider.engine)
    with pytest.raises(CheckpointError, match=r"embed.weight.*\(40, 16\).*\(41, 16\)"):
        wider.resume()
    after = state_of(wider.engine)
    assert all(torch.equal(before[n], after[n]) for n in before)
    weights = next(folder.glob("model-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="digest"):
        stage(tmp_path).resume()


def steps_in(checkpoints):
    return sorted(int(p.name.removeprefix("step-")) for p in checkpoints.folder.iterdir())


def test_rollback_points_are_saved_by_step_and_the_newest_two_outlive_later_saves(tmp_path):
    checkpoints = stage(tmp_path, every_s=1e9, points_every=4)
    for step in range(1, 13):
        checkpoints.save_if_due(step, {})
    assert steps_in(checkpoints) == [8, 12]
    for step in (13, 14, 15):
        checkpoints.save(step, {})
    assert steps_in(checkpoints) == [8, 12, 14, 15]


@pytest.mark.parametrize(("step", "point"), [(12, 8), (15, 8), (16, 12), (3, 0), (7, 0)])
def test_the_way_back_leads_over_the_last_point_to_the_one_before_or_to_the_start(tmp_path, step, point):
    checkpoints = stage(tmp_path, every_s=1e9, points_every=4)
    kept = {}
    for number in range(0, step + 1, 4):
        checkpoints.save(number, {"at": number}, {"7.1": torch.tensor([[number]], dtype=torch.int16)})
        moments = checkpoints.engine.optimizer.state_tensors()
        kept[number] = state_of(checkpoints.engine), {n: t.clone() for n, t in moments.items()}
        update(checkpoints.engine, number)
    checkpoints.save(step, {"at": "late"})
    assert checkpoints.go_back(step) == (point, {"at": point})
    weights, optimizer = kept[point]
    found = state_of(checkpoints.engine)
    assert all(torch.equal(found[n], weights[n]) for n in weights)
    again = checkpoints.engine.optimizer.state_tensors()
    assert all(torch.equal(again[n], optimizer[n]) for n in optimizer)
    assert checkpoints.tensors["7.1"].tolist() == [[point]]
    assert steps_in(checkpoints) == [point]


def test_without_a_point_there_is_no_way_back(tmp_path):
    checkpoints = stage(tmp_path, every_s=1e9, points_every=4)
    checkpoints.save(9, {})
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step-000004; there is step-000009"):
        checkpoints.go_back(9)
    assert steps_in(checkpoints) == [9]


def test_the_stages_tensors_come_back_and_damage_to_them_is_seen(tmp_path):
    checkpoints = stage(tmp_path)
    folder = checkpoints.save(1, {}, {"7.1": torch.arange(6, dtype=torch.int16).view(3, 2)})
    again = stage(tmp_path)
    again.resume()
    assert torch.equal(again.tensors["7.1"], torch.arange(6, dtype=torch.int16).view(3, 2))
    (folder / "state" / "stage.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"stage.safetensors was changed or damaged"):
        stage(tmp_path).resume()
    checkpoints.save(2, {})
    again.resume()
    assert again.tensors == {}
