"""The shipped fake keeps the engine's promises that a trainer leans on."""

import pytest
import torch
from torch import nn

from consilience.conf.errors import EngineError
from consilience.training.engine import TrainEngine
from consilience.training.fake_engine import FakeTrainEngine


def test_it_records_what_it_was_given_and_divides_like_the_real_one():
    engine: TrainEngine = FakeTrainEngine()
    metrics = engine.forward_backward(
        lambda model, x: (torch.tensor(float(x)), {"tokens": x * 10}), [1, 2], {"tokens": 5.0}
    )
    assert metrics == {"loss": 3.0, "tokens": 6.0}
    assert engine.batches == [[1, 2]] and engine.denominators == [{"tokens": 5.0}]


def test_a_step_moves_the_parameters_and_can_be_told_to_fail():
    engine = FakeTrainEngine(nn.Linear(2, 2), fail_at_step=1)
    before = engine.model.weight.detach().clone()
    assert engine.step(0.5)["lr"] == 0.5
    assert torch.allclose(engine.model.weight, before + 0.5)
    with pytest.raises(EngineError, match="told to fail"):
        engine.step()


def test_its_state_goes_to_disk_and_back(tmp_path):
    engine, other = FakeTrainEngine(), FakeTrainEngine()
    engine.step()
    engine.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert other.num_steps == 1
