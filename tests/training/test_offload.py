"""A trainer that was away between its steps is the trainer that was not, to the bit."""

import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.offload import OffloadedModels, offloaded
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)


def engine(**settings):
    return TorchEngine(initialize(Transformer(PRESETS["tiny"]), 3), OptimizerSettings(**settings))


def loss_fn(model, numbers):
    loss = sum(
        (p.double().square().sum() * n for n, p in enumerate(model.parameters(), 1)), torch.tensor(0.0)
    )
    return loss * numbers, {}


@pytest.mark.parametrize("settings", [{}, {"kind": "adamw"}, {"is_sharded": True}])
def test_steps_around_an_offload_end_with_the_bits_of_steps_without(settings):
    stays, goes = engine(**settings), engine(**settings)
    size = sum(p.nbytes for p in goes.model.parameters())
    for step in range(3):
        for each in (stays, goes):
            each.forward_backward(loss_fn, 1e-6 * (step + 1), {})
            each.step()
        with offloaded([goes]):
            gone = goes._copies.num_bytes
            assert all(p.untyped_storage().nbytes() == 0 for p in goes.model.parameters())
        assert gone > 1.9 * size, "the optimiser's state goes too"
    pairs = zip(stays.model.state_dict().items(), goes.model.state_dict().values())
    assert all(torch.equal(one, two) for (_, one), two in pairs)
    states = stays.optimizer.state_tensors(), goes.optimizer.state_tensors()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_trainer_in_the_middle_of_a_step_does_not_go():
    busy = engine()
    busy.forward_backward(loss_fn, 1.0, {})
    with pytest.raises(EngineError, match=r"has a gradient that no step has taken"):
        busy.offload()
    busy.discard()
    busy.offload()
    busy.onload()


def test_a_reference_comes_back_after_an_error_too():
    model = initialize(Transformer(PRESETS["tiny"]), 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="sampling failed"), offloaded([OffloadedModels([model])]):
        assert model.head.weight.untyped_storage().nbytes() == 0
        raise RuntimeError("sampling failed")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
