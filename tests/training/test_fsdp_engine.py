"""FSDP2 trains like one process: gradients, weights, reports, whatever the number of ranks."""

import functools
import re

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from consilience.conf.errors import EngineError
from consilience.model.quantization import is_passing
from consilience.model.ranks import ALONE
from consilience.training.forward import hidden_at_loss
from consilience.training.packing import split_micro_batches
from consilience.training.torch_engine import TorchEngine
from tests.rank_processes import on_ranks
from tests.training.v4_ranks import SETTINGS, assert_close, copies, packed_rows, supervised, train, v4_model

pytestmark = pytest.mark.row("updates", "fsdp")

torch.set_num_threads(1)


def whole(tensors):
    """Whole tensors as arrays; collective."""
    return copies({n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()})


def trained(ranks, dtype, micro_tokens):
    """Gradients of a first step, weights and reports after three."""
    from consilience.training.fsdp_engine import FsdpEngine

    engine = FsdpEngine(v4_model(dtype), SETTINGS, ranks=ranks)
    report, load = supervised(engine, packed_rows(), micro_tokens)
    engine.gradients()
    held = engine.optimizer.held
    # What no loss has reached has a gradient of zero here and none alone.
    gradients = whole({n: held[n].grad for n in engine.optimizer.names if held[n].grad is not None})
    gradients = {name: value for name, value in gradients.items() if value.any()}
    reports = [report | engine.step(1.0, load), *train(engine, 2, micro_tokens, first=1)]
    return gradients, whole(engine.model.state_dict()), reports, engine.optimizer.state_bytes()


@functools.cache
def alone(dtype):
    engine = TorchEngine(v4_model(dtype), SETTINGS)
    report, load = supervised(engine, packed_rows(), 640)
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, 640, first=1)]
    num_bytes = sum(t.nbytes for t in engine.optimizer.state_tensors().values())
    return gradients, copies(engine.model.state_dict()), reports, num_bytes


def check(size, dtype, micro_tokens, tolerance, folder):
    found = on_ranks(size, trained, dtype, micro_tokens, folder=folder)
    gradients, weights, reports, num_bytes = alone(dtype)
    assert_close(found[0][0], gradients, tolerance)
    assert_close(found[0][1], weights, max(tolerance, 1e-11), is_update=True)
    for _, _, own, _ in found:
        for report, expected in zip(own, reports):
            assert report == pytest.approx(expected, rel=tolerance)
    return [own for *_, own in found], num_bytes


def test_two_ranks_with_five_micro_batches_train_like_one_process(tmp_path):
    held, num_bytes = check(2, torch.float64, 160, 1e-12, tmp_path)
    assert sum(held) >= num_bytes > max(held)  # cut; what is small is whole on each


def gathered_weights(ranks):
    """Of the matrices that layers have whole in two forwards of a cut model: whether they are marked."""
    from consilience.training.fsdp_model import cut_model

    seen = {}

    def note(name):
        def look(module, _given):
            for own, weight in module.named_parameters():
                if f"{name}.{own}" in cut and not isinstance(weight, DTensor):
                    seen.setdefault(f"{name}.{own}", []).append(is_passing(weight))

        return look

    cut_model(model := v4_model(torch.float32), ranks)
    cut = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(note(f"layers.{number}"))
    with torch.no_grad():
        for _ in range(2):
            model(torch.arange(2, 34)[None])
    return seen


def test_gathered_weights_are_marked_as_passing(tmp_path):
    for seen in on_ranks(2, gathered_weights, folder=tmp_path):
        assert {name.rsplit(".", 1)[-1] for name in seen} >= {"weight", "w1", "w2", "w3"}
        assert all(marks == [True, True] for marks in seen.values()), seen


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_changes_nothing_in_fp32(size, tmp_path):
    check(size, torch.float32, 160, 1e-5, tmp_path)  # the order in which partial sums are added


def with_a_loss_that_is_not_finite(ranks):
    from consilience.training.fsdp_engine import FsdpEngine

    engine = FsdpEngine(v4_model(), SETTINGS, ranks=ranks)
    before = whole(engine.model.state_dict())

    def loss_fn(model, micro):
        loss = hidden_at_loss(model, micro).hidden.sum()
        return loss * (float("nan") if micro.sample_index.max() > 3 else 1.0), {}

    with pytest.raises(EngineError) as found:
        engine.forward_backward(loss_fn, split_micro_batches(packed_rows(), 160), {})
    with pytest.raises(EngineError, match="no gradient to apply"):
        engine.step()
    after = whole(engine.model.state_dict())
    train(engine, 1)
    return str(found.value), all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_a_rank_is_an_error_on_all(tmp_path):
    first, second = on_ranks(2, with_a_loss_that_is_not_finite, folder=tmp_path)
    assert first == second and first[1] and "is nan; no parameter was changed" in first[0]


def test_an_older_pytorch_is_refused_by_its_version():
    from consilience.training.fsdp_model import check_version

    with pytest.raises(
        EngineError, match=rf"PyTorch {re.escape(torch.__version__)} .* install 2.13 or newer"
    ):
        check_version(torch.nn.Module)


def test_one_rank_is_told_to_take_the_plain_engine():
    from consilience.training.fsdp_engine import FsdpEngine

    with pytest.raises(EngineError, match=r"this is one; take engine.kind=torch"):
        FsdpEngine(v4_model(), SETTINGS, ranks=ALONE)
