"""Data parallelism: how many ranks share a step changes neither gradients, weights nor what is reported."""

import functools

import numpy as np
import pytest
import torch
from torch import nn

from consilience.conf.errors import EngineError
from consilience.model.ranks import ALONE
from consilience.training.torch_engine import OptimizerSettings, TorchEngine
from tests.rank_processes import on_ranks
from tests.training.v4_ranks import SETTINGS, assert_close, copies, packed_rows, supervised, train, v4_model

pytestmark = pytest.mark.row("updates", "torch")

torch.set_num_threads(1)


def gradients_and_weights(ranks, dtype, micro_tokens):
    """Gradients and report of a first step, weights and reports after three."""
    engine = TorchEngine(v4_model(dtype), SETTINGS, ranks=ranks)
    report, load = supervised(engine, packed_rows(), micro_tokens)
    gradients = copies(engine.gradients())
    reports = [report | engine.step(1.0, load), *train(engine, 2, micro_tokens, first=1)]
    return gradients, copies(engine.model.state_dict()), reports


@functools.cache
def alone(dtype, micro_tokens=640):
    return gradients_and_weights(ALONE, dtype, micro_tokens)


def check(size, dtype, micro_tokens, tolerance, folder):
    """Every rank has what one process has that runs the whole batch at once, and the bits of the others."""
    found = on_ranks(size, gradients_and_weights, dtype, micro_tokens, folder=folder)
    gradients, weights, reports = alone(dtype)
    assert_close(found[0][0], gradients, tolerance)
    assert_close(found[0][1], weights, max(tolerance, 1e-11), is_update=True)
    for own, expected in zip(found[0][2], reports):
        assert own == pytest.approx(expected, rel=tolerance)
    for other in found[1:]:
        for one, same in zip(found[0][:2], other[:2]):
            assert all(np.array_equal(one[name], same[name]) for name in one)
        assert other[2] == found[0][2]
    return found[0]


def test_two_ranks_train_like_one_process(tmp_path):
    gradients, _, reports = check(2, torch.float64, 160, 1e-12, tmp_path)
    assert len(gradients) == len([p for p in v4_model().parameters() if p.requires_grad])
    assert reports[0]["max_weight"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("micro_tokens", [160, 320])
@pytest.mark.parametrize("size", [2, 4])
def test_the_number_of_ranks_and_of_micro_batches_changes_nothing(size, micro_tokens, tmp_path):
    # fp32: 1e-5 of each tensor's largest value, the order in which partial sums are added.
    check(size, torch.float32, micro_tokens, 1e-5, tmp_path)
    check(size, torch.float64, micro_tokens, 1e-12, tmp_path)


@pytest.mark.slow
def test_the_same_ranks_make_the_same_bits_again(tmp_path):
    (tmp_path / "again").mkdir()
    once = on_ranks(2, gradients_and_weights, torch.float32, 160, folder=tmp_path)[0]
    twice = on_ranks(2, gradients_and_weights, torch.float32, 160, folder=tmp_path / "again")[0]
    for one, other in zip(once[:2], twice[:2]):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert once[2] == twice[2]


class Rows(nn.Module):
    """Three weights, of which a micro-batch reads one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in range(3)])
        for number, layer in enumerate(self.layers):
            layer.attn_norm = nn.Module()
            layer.attn_norm.weight = nn.Parameter(torch.full((2,), number + 1.0))

    def forward(self, number):
        return self.layers[number].attn_norm.weight


def row_loss(model, given):
    number, factor = given
    if factor == "broken":
        raise ValueError("a loss of its own")
    return factor * model(number).sum(), {f"of_{number}": 1.0}


def one_rank_only(ranks):
    """Rank 0 runs layer 0 and rank 1 layer 1; nobody runs layer 2."""
    engine = TorchEngine(Rows(), OptimizerSettings(kind="adamw", grad_clip=0.0), ranks=ranks)
    report = engine.forward_backward(row_loss, [(0, 2.0), (1, 3.0), (0, 4.0)], {"of_0": 2.0})
    gradients = {name: grad.tolist() for name, grad in engine.gradients().items()}
    norm = engine.step()["grad_norm"]
    return report, gradients, norm, [p.tolist() for p in engine.model.parameters()]


def test_a_parameter_with_a_gradient_on_one_rank_only_is_moved_on_all(tmp_path):
    for report, gradients, norm, weights in on_ranks(2, one_rank_only, folder=tmp_path):
        assert report == {"loss": 2.0 * 2 + 3.0 * 4 + 4.0 * 2, "of_0": 1.0, "of_1": 1.0}
        first, second = (f"layers.{i}.attn_norm.weight" for i in range(2))
        assert gradients == {first: [6.0, 6.0], second: [3.0, 3.0]}
        assert norm == pytest.approx((2 * 36 + 2 * 9) ** 0.5)
        assert weights[0][0] < 1.0 and weights[1][0] < 2.0 and weights[2] == [3.0, 3.0]


def failures(ranks):
    engine = TorchEngine(Rows(), OptimizerSettings(kind="adamw"), ranks=ranks)
    said = []
    for factor in (float("nan"), "broken"):
        with pytest.raises((EngineError, ValueError)) as found:
            engine.forward_backward(row_loss, [(0, 1.0), (1, factor), (2, factor)], {})
        said.append((type(found.value).__name__, str(found.value)))
        assert all(p.grad is None for p in engine.model.parameters())
    engine.forward_backward(row_loss, [(0, 1.0), (1, 1.0)], {})
    if ranks.rank == 1:
        engine.model.layers[1].attn_norm.weight.grad[0] = torch.inf
    with pytest.raises(EngineError) as found:
        engine.step()
    said.append((type(found.value).__name__, str(found.value)))
    with pytest.raises(EngineError, match="no gradient to apply"):
        engine.step()
    return said, [p.tolist() for p in engine.model.parameters()]


def test_what_fails_on_one_rank_fails_on_all_and_nothing_moves(tmp_path):
    first, second = on_ranks(2, failures, folder=tmp_path)
    nan, broken, gradient = zip(first[0], second[0])
    assert nan[0] == nan[1] and nan[0][0] == "EngineError"
    assert nan[0][1].startswith("step 0: the loss of micro-batch 1 is nan; no parameter was changed")
    assert broken[0] == (
        "EngineError", "step 0: rank 1 failed in micro-batch 1 (ValueError: a loss of its own)"
    )  # fmt: skip
    assert broken[1] == ("ValueError", "a loss of its own")
    assert gradient[0] == gradient[1] and "layers.1.attn_norm.weight is not finite" in gradient[0][1]
    assert first[1] == second[1] == [p.tolist() for p in Rows().parameters()]


def saved_and_loaded(ranks, folder):
    engine = TorchEngine(v4_model(), SETTINGS, ranks=ranks)
    torch.manual_seed(ranks.rank)
    train(engine, 1)
    engine.save(folder / f"by-{ranks.rank}")
    ranks.barrier()
    written = [(folder / f"by-{rank}").is_dir() for rank in range(ranks.size)]
    other = TorchEngine(v4_model(), SETTINGS, ranks=ranks)
    other.model.load_state_dict(engine.model.state_dict())
    other.load(folder / "by-0")
    drawn = torch.rand(()).item()
    train(engine, 1, first=1)
    train(other, 1, first=1)
    same = all(map(torch.equal, engine.model.state_dict().values(), other.model.state_dict().values()))
    return written, same, other.num_steps, drawn


@pytest.mark.row("checkpoints", "torch")
def test_the_first_rank_saves_for_all_and_all_load(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(()).item()
    found = on_ranks(2, saved_and_loaded, tmp_path, folder=tmp_path)
    assert found == [([True, False], True, 2, expected)] * 2
