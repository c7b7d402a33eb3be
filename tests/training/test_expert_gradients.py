"""Gradients, their norms and two updates with experts over ranks, as in one process."""

import math
import re
from dataclasses import replace

import pytest
import torch

from consilience.model.checkpoint import to_official
from consilience.model.config import TINY
from consilience.model.expert_exchange import Shard
from consilience.model.expert_parallel import each_expert, official_tensors, shard_experts, sharded_names
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.ranks import ALONE, Ranks
from consilience.model.transformer import Transformer
from consilience.training.expert_gradients import sum_gradients, whole_norms
from consilience.training.optimizers import V4Optimizer, gate_bias_names, parameter_groups
from tests.rank_processes import on_ranks
from tests.ranks_table import keep, off

pytestmark = pytest.mark.row("experts over ranks: updates", "library")

torch.set_num_threads(1)

CONFIG = replace(TINY, vocab_size=53, hidden_size=32, n_routed_experts=5)
TOKENS = torch.randint(53, (4, 23), generator=torch.Generator().manual_seed(3))
SEGMENTS = torch.tensor([[0] * 23, [0] * 9 + [1] * 14, [0] * 20 + [-1] * 3, [-1] * 23])


def train(model, rows, ranks):
    """Norms of two steps by name, and the optimiser; the rows of this rank, one a micro-batch."""
    shards, norms = sharded_names(model), []
    optimizer = V4Optimizer(
        parameter_groups(model, o_groups=CONFIG.o_groups),
        lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6, momentum=0.95, update_rms=0.18,
        bias_speed=0.1,
    )  # fmt: skip
    for _ in range(2):
        trace = Trace(wants_losses=True)
        for row in rows:
            trace.start_losses()
            hidden = model.hidden(TOKENS[row : row + 1], SEGMENTS[row : row + 1], trace=trace)
            read = hidden[SEGMENTS[row : row + 1] >= 0]
            ((read**2).sum() + sum(trace.balance_loss)).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        sum_gradients(grads, ranks, shards)
        norms.append(whole_norms({name: float(grad.norm()) for name, grad in grads.items()}, shards))
        loads = {name: trace.expert_load[layer].double() for layer, name in gate_bias_names(model).items()}
        ranks.sum_(loads.values())
        optimizer.step(1.0, loads)
        model.zero_grad()
    return norms, optimizer


def build():
    return initialize(Transformer(CONFIG), 0).double()


def train_on_each(ranks, expert_ranks):
    """Norms, then the whole model's tensors and its optimiser's state."""
    within, across = ranks.split(expert_ranks)
    model = build()
    shard_experts(model, within, copies=across, waves=2)
    norms, optimizer = train(model, ranks.part(range(len(TOKENS))), ranks)
    shards, own = sharded_names(model), optimizer.state_tensors()
    whole = dict(own)
    for key, tensor in own.items():
        if shard := shards.get(key.removeprefix("muon.momentum.")):
            whole[key] = torch.stack(list(each_expert(tensor, shard)))
    return norms, {name: tensor.clone() for name, tensor in official_tensors(model)}, whole


@pytest.mark.slow
def test_two_updates_on_two_pairs_of_ranks_equal_those_of_one_process(tmp_path):
    found, model = on_ranks(4, train_on_each, 2, folder=tmp_path), build()
    norms, optimizer = train(model, range(len(TOKENS)), ALONE)
    whole, state = to_official(model), optimizer.state_tensors()
    for own_norms, tensors, made in found:
        for mine, expected in zip(own_norms, norms):
            assert mine == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert list(tensors) == list(whole) and made.keys() == state.keys()
        # In some directions the gradient of a hyper-connection is rounding, brought to any size by Muon.
        for name in (name for name in whole if not re.search(r"hc_\w+_fn$", name)):
            expected = whole[name]
            torch.testing.assert_close(tensors[name], expected, rtol=1e-9, atol=1e-9)
            keep(off(tensors[name], expected))
        for name, tensor in made.items():
            torch.testing.assert_close(tensor, state[name], rtol=1e-9, atol=1e-9)


def test_a_whole_model_sums_and_measures_as_it_did():
    grads = {"a": torch.ones(3), "b": torch.full((2,), 2.0)}
    sum_gradients(grads, ALONE, {})
    assert grads["a"].tolist() == [1, 1, 1] and whole_norms({"a": 3.0, "b": math.inf}, {}) == {
        "a": 3.0,
        "b": math.inf,
    }


class Two(Ranks):
    """Two ranks, of which the other has the same numbers."""

    def sums(self, values):
        return {name: 2 * value for name, value in values.items()}


def test_the_norm_of_a_split_stack_is_that_of_all_its_experts():
    shards = {"experts": Shard(Two(0, 2), num_experts=4, num_waves=1)}
    assert whole_norms({"experts": 3.0, "router": 4.0}, shards) == {"experts": math.sqrt(18), "router": 4.0}


def cut_on_each(ranks):
    """Whole gradients of a loss with all but the experts cut over the ranks by FSDP2."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    model = build()
    shard_experts(model, ranks, waves=2)
    shards = sharded_names(model)
    kept = {p for name, p in model.named_parameters() if name in shards or not p.requires_grad or p.ndim < 2}
    mesh = DeviceMesh.from_group(ranks.group, "cpu")
    for module in (*model.layers, model):
        part = fully_shard(module, mesh=mesh, ignored_params=kept)
        part.set_force_sum_reduction_for_comms(True)
        part.set_gradient_divide_factor(1.0)
    rows = slice(ranks.rank, ranks.rank + 1)
    logits = model(TOKENS[rows], SEGMENTS[rows])
    (logits[SEGMENTS[rows] >= 0] ** 2).sum().backward()
    grads = {}
    for name, p in model.named_parameters():
        if name in shards:
            grads[name] = torch.stack(list(each_expert(p.grad, shards[name])))
        elif p in kept and p.grad is not None:
            ranks.sum_([p.grad])
            grads[name] = p.grad
        elif p.grad is not None:
            grads[name] = p.grad.full_tensor()
    return grads


@pytest.mark.slow
def test_experts_over_ranks_within_fsdp2_have_the_gradients_of_one_process(tmp_path):
    found, model = on_ranks(2, cut_on_each, folder=tmp_path), build()
    (model(TOKENS[:2], SEGMENTS[:2])[SEGMENTS[:2] >= 0] ** 2).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for grads in found:
        assert expected.keys() <= grads.keys()
        for name, grad in expected.items():
            assert (grads[name] - grad).norm() <= 1e-11 * grad.norm(), name
