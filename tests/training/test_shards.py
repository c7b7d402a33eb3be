"""A V4 model whose optimiser state is divided among ranks trains, clips and resumes as on one process."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from consilience.conf.errors import EngineError
from consilience.model.config import PRESETS
from consilience.model.ranks import ALONE
from consilience.model.transformer import Transformer
from consilience.training.optimizers import parameter_groups
from consilience.training.shards import state_bytes
from consilience.training.tensor_files import read_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, TorchEngine
from tests.rank_processes import on_ranks
from tests.training.v4_ranks import SETTINGS, assert_close, copies, packed_rows, supervised, train, v4_model

pytestmark = pytest.mark.row("updates", "torch, shard_state")

torch.set_num_threads(1)
# Norms of this model's first gradients are about 1: with 0.05 every step is clipped.
SHARDED = replace(SETTINGS, is_sharded=True, grad_clip=0.05)


def engine_of(ranks, settings, dtype=torch.float64):
    return TorchEngine(v4_model(dtype), settings, ranks=ranks)


def gradients_and_weights(ranks, settings, dtype=torch.float64):
    """Gradients and report of a first step, weights and reports after three, and the state's bytes here."""
    engine = engine_of(ranks, settings, dtype)
    report, load = supervised(engine, packed_rows())
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, first=1)]
    state = copies(engine.optimizer.state_tensors())
    return gradients, copies(engine.model.state_dict()), reports, state, held_bytes(engine.optimizer)


def held_bytes(optimizer):
    """What lies in this rank's memory, counted from the tensors."""
    if optimizer.shards is None:
        return sum(tensor.nbytes for tensor in optimizer.state_tensors().values())
    momenta = optimizer.shards.muon._muon.state_tensors().values()
    moments = [t for s in optimizer.shards.adamw._adamw.state.values() for t in s.values()]
    return sum(tensor.nbytes for tensor in (*momenta, *moments))


@functools.cache
def alone(dtype=torch.float64):
    return gradients_and_weights(ALONE, replace(SHARDED, is_sharded=False), dtype)


def check(found, dtype, tolerance):
    gradients, weights, reports, state, _ = alone(dtype)
    for own in found:
        assert_close(own[0], gradients, tolerance)
        assert_close(own[1], weights, max(tolerance, 1e-11), is_update=True)
        for report, expected in zip(own[2], reports):
            assert report == pytest.approx(expected, rel=tolerance)
        assert own[3].keys() == state.keys()
        for one, same in zip(own[:4:3], found[0][:4:3]):
            assert all(np.array_equal(one[name], same[name]) for name in one)
        assert all(np.array_equal(own[1][name], found[0][1][name]) for name in own[1])
    for name, value in state.items():
        if name.startswith("adamw.step."):
            assert found[0][3][name] == value
        assert found[0][3][name].dtype == value.dtype and found[0][3][name].shape == value.shape
    groups = parameter_groups(v4_model(dtype))
    assert [own[4] for own in found] == state_bytes(groups, len(found))
    assert max(own[4] for own in found) < 1.3 * state_bytes(groups, 1)[0] / len(found) + 512


def test_two_ranks_train_like_one_process_and_each_holds_half_the_state(tmp_path):
    assert all(report["grad_norm"] > SHARDED.grad_clip for report in alone()[2])
    check(on_ranks(2, gradients_and_weights, SHARDED, folder=tmp_path), torch.float64, 1e-12)


# fp32: 1e-5 of each tensor's largest value, the order in which partial sums are added.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "dtype", "tolerance"),
    [(1, torch.float64, 1e-12), (3, torch.float64, 1e-12), (4, torch.float32, 1e-5)],
)
def test_the_number_of_ranks_changes_nothing(size, dtype, tolerance, tmp_path):
    if size == 1:
        found = [gradients_and_weights(ALONE, SHARDED, dtype)]
    else:
        found = on_ranks(size, gradients_and_weights, SHARDED, dtype, folder=tmp_path)
    check(found, dtype, tolerance)


def save_after_two(ranks, folder):
    engine = engine_of(ranks, SHARDED)
    train(engine, 2)
    engine.save(folder)
    weights = copies(engine.model.state_dict())
    train(engine, 1, first=2)
    return weights, copies(engine.model.state_dict())


def resume(ranks, weights, folder, settings):
    engine = engine_of(ranks, settings)
    engine.model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    engine.load(folder)
    train(engine, 1, first=2)
    return engine.num_steps, copies(engine.model.state_dict())


@pytest.mark.slow
@pytest.mark.row("checkpoints", "torch, shard_state")
def test_a_checkpoint_of_two_ranks_goes_on_with_one_two_and_four(tmp_path):
    """With two the same bits; else the order of sums differs, 1e-11 as above."""
    saved, straight = on_ranks(2, save_after_two, tmp_path / "state", folder=tmp_path)[0]
    state = read_tensors(tmp_path / "state" / OPTIMIZER_FILE)
    whole = engine_of(ALONE, SETTINGS).optimizer.state_tensors()
    assert state.keys() - {"num_steps"} == whole.keys()
    assert all(state[name].shape == value.shape for name, value in whole.items())
    for size in (2, 4):
        found = on_ranks(size, resume, saved, tmp_path / "state", SHARDED, folder=tmp_path)
        for num_steps, weights in found:
            assert num_steps == 3
            assert_close(weights, straight, 0 if size == 2 else 1e-11, is_update=True)
    for settings in (SHARDED, replace(SHARDED, is_sharded=False)):
        num_steps, weights = resume(ALONE, saved, tmp_path / "state", settings)
        assert num_steps == 3
        assert_close(weights, straight, 1e-11, is_update=True)


def not_finite(ranks):
    """One number of an expert on rank 1; both stop, nothing moves, and training goes on."""
    engine = engine_of(ranks, SHARDED)
    before = copies(engine.model.state_dict())
    supervised(engine, packed_rows())
    if ranks.rank == 1:
        engine.model.layers[1].ffn.experts.w1.grad[0, 0, 0] = torch.nan
    with pytest.raises(EngineError) as found:
        engine.step()
    after = copies(engine.model.state_dict())
    assert all(np.array_equal(before[name], value) for name, value in after.items())
    with pytest.raises(EngineError, match="no gradient to apply"):
        engine.step()
    train(engine, 1)
    return str(found.value), copies(engine.model.state_dict())


@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    (said, weights), (other, same) = on_ranks(2, not_finite, folder=tmp_path)
    assert said == other
    assert "the gradient of layers.1.ffn.experts.w1 is not finite (1 of" in said
    assert all(np.array_equal(weights[name], same[name]) for name in weights)


def first_gradients(ranks):
    """Exact, rounded by chance, and the same again."""
    found = []
    for has_bf16_exchange in (False, True, True):
        settings = replace(SHARDED, has_bf16_exchange=has_bf16_exchange)
        engine = engine_of(ranks, settings, torch.float32)
        supervised(engine, packed_rows())
        found.append(copies(engine.gradients()))
    return found


@pytest.mark.slow
def test_rounding_touches_gradients_of_experts_only_and_repeats(tmp_path):
    """Relative error of a rounding is at most 2⁻⁷, its deviation half of that."""
    exact, once, twice = on_ranks(2, first_gradients, folder=tmp_path)[0]
    for name, value in exact.items():
        assert np.array_equal(once[name], twice[name])
        error = np.linalg.norm(once[name] - value)
        if ".experts." in name:
            assert 0 < error < 2**-8 * np.linalg.norm(value)
        else:
            assert error == 0


# All parameters with MTP (specification, section 0), routers' biases, AdamW's numbers and its tensors: 9 a
# block, 4 a CSA, 2 a HCA, 5 each of trunk and MTP.
COUNTS = {
    "flash": (290_942_289_362, 41 * 256, 1_060_953_298, 530),
    "pro": (1_598_837_347_742, 59 * 384, 1_856_634_142, 750),
}


@pytest.mark.parametrize("preset", COUNTS)
def test_bytes_a_rank_of_the_released_models(preset):
    """Momentum 4 bytes a number, moments 8, a count 4 a tensor. No memory stands behind the weights."""
    with torch.device("meta"):
        groups = parameter_groups(Transformer(PRESETS[preset]))
    parameters, biases, by_adamw, tensors = COUNTS[preset]
    total = 4 * (parameters - biases - by_adamw) + 8 * by_adamw + 4 * tensors
    assert state_bytes(groups, 1) == [total]
    for num_ranks in (8, 64):
        found = state_bytes(groups, num_ranks)
        assert max(found) < 1.01 * total / num_ranks
    repeated = sum(state_bytes(groups, 256)) - total  # dense momentum a second time
    dense = sum(p.parameter.numel() for p in groups.muon if ".experts." not in p.name)
    assert repeated == pytest.approx(4 * dense, rel=1e-4)
