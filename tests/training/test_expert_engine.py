"""A model whose experts are divided over ranks trains, clips, saves and goes on as on one process."""

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.exact import exact_mode
from consilience.model.expert_parallel import each_expert
from consilience.model.indexer import warming_up
from consilience.model.quantization import Quantization
from consilience.model.ranks import ALONE, Ranks
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.training.checkpoint import load_engine_state, load_weights, save_checkpoint
from consilience.training.engine import is_cut
from consilience.training.expert_engine import ExpertEngine, divide_like
from consilience.training.forward import hidden_at_loss
from consilience.training.tensor_files import read_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, TorchEngine
from tests.rank_processes import on_ranks
from tests.training.stage_ranks import META
from tests.training.v4_ranks import SETTINGS, assert_close, copies, packed_rows, supervised, train, v4_model

torch.set_num_threads(1)
# Norms of this model's first gradients are about 1: with 0.05 every step is clipped.
CLIPPED = replace(SETTINGS, grad_clip=0.05)


def whole(engine, tensors):
    """Arrays of the whole tensors by parameter; collective."""
    split = engine.split
    stacks = {n: torch.stack([*each_expert(t, split[n])]) for n, t in tensors.items() if n in split}
    return copies({**tensors, **stacks})


def held_bytes(optimizer):
    """What lies in this rank's memory of the optimiser's state."""
    adamw = optimizer.adamw.state if optimizer.shards is None else optimizer.shards.adamw._adamw.state
    moments = [t for state in adamw.values() for t in state.values()]
    momenta = optimizer.muon.held()
    return sum(t.nbytes for t in (*momenta, *moments))


def trained(ranks, expert_ranks, settings, folder):
    """Gradients of a first step, weights and reports after three, bytes held; a checkpoint in `folder`."""
    engine = ExpertEngine(v4_model(torch.float64), settings, ranks=ranks, expert_ranks=expert_ranks)
    report, load = supervised(engine, packed_rows())
    gradients = whole(engine, engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, first=1)]
    weights = engine.gather_weights()
    save_checkpoint(folder, engine.model, None, META, engine)
    assert_goes_on(engine, weights, {"ranks": ranks, "expert_ranks": expert_ranks}, folder)
    held = held_bytes(engine._part.optimizer), sum(p.nbytes for p in engine.model.parameters())
    return gradients, None if weights is None else copies(weights), reports, held


def assert_goes_on(engine, weights, how, folder):
    """From the files, and from weights that the first rank gives, to the same bits as the engine itself."""
    again = ExpertEngine(v4_model(torch.float64, 1), engine.settings, **how)
    again.put_weights(weights)
    assert_equal(again.model, engine.model)
    again = ExpertEngine(v4_model(torch.float64, 1), engine.settings, **how)
    load_weights(folder, again)
    load_engine_state(folder, again)
    engine.offload()
    engine.onload()
    assert train(engine, 1, first=3) == train(again, 1, first=3)
    assert_equal(again.model, engine.model)


def assert_equal(found, expected):
    for (name, value), other in zip(found.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(value, other), name


@functools.cache
def alone():
    engine = TorchEngine(v4_model(torch.float64), CLIPPED)
    report, load = supervised(engine, packed_rows())
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, first=1)]
    state = {name: tensor.clone() for name, tensor in engine.optimizer.state_tensors().items()}
    weights = copies(to_official(engine.model))
    sizes = {name: p.nbytes for name, p in engine.model.named_parameters()}
    num_bytes = sum(sizes.values()), sum(size for name, size in sizes.items() if ".ffn.experts." in name)
    return gradients, weights, reports, state, num_bytes


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(("size", "experts"), [(2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("is_sharded", [False, True])
def test_muon_on_ranks_that_divide_experts_is_that_of_one_process(size, experts, is_sharded, tmp_path):
    settings = replace(CLIPPED, is_sharded=is_sharded)
    found = on_ranks(size, trained, experts, settings, folder := tmp_path / "checkpoint", folder=tmp_path)
    gradients, weights, reports, state, num_bytes = alone()
    for rank, (own, _, own_reports, _) in enumerate(found):
        assert_close(own, gradients, 1e-11)
        assert own_reports == found[0][2], rank
        for report, expected in zip(own_reports, reports):
            assert report == pytest.approx(expected, rel=1e-11)
    mixing = {name for name in weights if "_fn" in name}  # its rows without a gradient are rounding
    assert found[0][1].keys() == weights.keys() and all(other[1] is None for other in found[1:])
    for name in weights.keys() - mixing:
        np.testing.assert_allclose(found[0][1][name], weights[name], rtol=1e-9, atol=1e-10, err_msg=name)
    stored = read_tensors(folder / "state" / OPTIMIZER_FILE)
    assert stored.keys() == {*state, "num_steps"} and int(stored["num_steps"]) == 3
    for name, expected in state.items():
        if not name.endswith("fn"):
            torch.testing.assert_close(stored[name], expected, rtol=1e-9, atol=1e-9, msg=name)
    weight_bytes, expert_bytes = num_bytes
    held = sum(t.nbytes for t in state.values())
    for own_state, own_weights in (each[3] for each in found):
        assert own_weights == weight_bytes - expert_bytes + expert_bytes // experts
        assert own_state < (1.1 * held / size if is_sharded else held - expert_bytes / 2 + 1)


def with_a_disk_that_fails(ranks, folder):
    engine = ExpertEngine(v4_model(), SETTINGS, ranks=ranks, expert_ranks=2)
    train(engine, 1)
    if not ranks.is_first:
        return engine.write_weights(None, 4 << 20)
    with pytest.raises(OSError):
        engine.write_weights(folder / "a file" / "in the way", 4 << 20)
    return None


@pytest.mark.slow
def test_what_fails_on_the_disk_is_the_first_ranks_error_and_nobody_waits(tmp_path):
    (tmp_path / "a file").write_text("")
    assert on_ranks(2, with_a_disk_that_fails, tmp_path, folder=tmp_path) == [None, None]


def with_another_checkpoint(ranks, folder):
    engine = ExpertEngine(v4_model(), replace(SETTINGS, kind="adamw"), ranks=ranks, expert_ranks=2)
    with pytest.raises(CheckpointError) as refused:
        engine.load(folder)
    return str(refused.value)


@pytest.mark.slow
def test_state_of_another_optimiser_is_refused_on_all_ranks(tmp_path):
    engine = TorchEngine(v4_model(), SETTINGS)
    engine.save(tmp_path / "state")
    for said in on_ranks(2, with_another_checkpoint, tmp_path / "state", folder=tmp_path):
        assert OPTIMIZER_FILE in said and "resume with the model and optimiser that wrote it" in said


def test_experts_that_do_not_come_out_even_are_refused_and_so_is_a_model_without():
    with pytest.raises(ConfigError, match=r"is 3, which does not divide the 4 experts of layers\.0"):
        ExpertEngine(v4_model(), ranks=Ranks(0, 3), expert_ranks=3)
    with pytest.raises(ConfigError, match="the model has no routed experts; set it to 1"):
        ExpertEngine(torch.nn.Linear(2, 2), ranks=Ranks(0, 2), expert_ranks=2)


def test_other_engines_have_whole_experts_and_leave_a_reference_whole():
    engine = TorchEngine(v4_model(), SETTINGS, ranks=ALONE)
    divide_like(reference := v4_model(), engine)
    assert not is_cut(engine) and len(reference.layers[0].ffn.experts.w1) == 4


MODES = (
    {"exact": True},
    {"quantization": "fp4_fp8"},
    {"recompute": "cheap"},
    {"recompute": "block"},
    {"warms": True},
)


def in_modes(build):
    """Gradients of a first step, in each of the modes in which a stage may run."""
    found = []
    for mode in MODES:
        model = v4_model(torch.float32)
        model.quantize(Quantization.from_name(mode.get("quantization", "off")))
        set_recompute(model, recompute_policy(mode.get("recompute", "none")))
        engine = build(model, mode.get("exact", False))
        with warming_up(engine.model) if "warms" in mode else nullcontext():
            supervised(engine, packed_rows())
            gradients = engine.gradients()
            found.append(whole(engine, gradients) if is_cut(engine) else copies(gradients))
    return found


def divided_in_modes(ranks):
    found = in_modes(
        lambda model, exact: ExpertEngine(model, SETTINGS, ranks=ranks, expert_ranks=2, exact=exact)
    )
    engine = ExpertEngine(v4_model(), SETTINGS, ranks=ranks, expert_ranks=2)
    with torch.no_grad(), exact_mode():
        own, alone = (hidden_at_loss(model, packed_rows()).hidden for model in (engine.model, v4_model()))
    assert torch.equal(own, alone)  # in exact mode to the bit
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_every_way_to_compute_goes_with_divided_experts(tmp_path):
    found = on_ranks(2, divided_in_modes, folder=tmp_path)
    alone = in_modes(lambda model, exact: TorchEngine(model, SETTINGS, exact=exact))
    assert len({len(one) for one in alone}) > 1  # indexers alone learn in their warm-up
    for own in found:
        for gradients, expected in zip(own, alone, strict=True):
            assert_close(gradients, expected, 1e-5)
