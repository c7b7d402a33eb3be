"""The engine: gradients do not depend on micro-batches, and nothing non-finite reaches a parameter."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from consilience.conf.errors import CheckpointError, EngineError
from consilience.training.packing import pack, split_micro_batches
from consilience.training.tensor_files import read_tensors, write_tensors
from consilience.training.torch_engine import OPTIMIZER_FILE, OptimizerSettings, TorchEngine

torch.set_num_threads(1)


def block(has_bias):
    """A layer of which the router alone is there; a hash router has no bias."""
    layer = nn.Module()
    layer.ffn = nn.Module()
    layer.ffn.gate = nn.Module()
    if has_bias:
        layer.ffn.gate.bias = nn.Parameter(torch.zeros(3), requires_grad=False)
    else:
        layer.ffn.gate.register_buffer("tid2eid", torch.zeros(16, 2, dtype=torch.int64))
    return layer


class Small(nn.Module):
    """Embedding and head, a hash layer, and router biases that only the rule moves, MTP's among them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 16, bias=False)
        self.layers = nn.ModuleList([block(False), block(True)])
        self.mtp = nn.ModuleList([block(True)])

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


def packed_batch(budget):
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 16, n) for n in rng.integers(3, 16, 30)]
    packed = pack(samples, quantum=16, max_row_tokens=16)
    return packed, split_micro_batches(packed, budget)


def token_loss(denominator):
    def loss_fn(model, micro_batch):
        t = micro_batch.to_torch()
        nll = nn.functional.cross_entropy(
            model(t["token_ids"]).flatten(0, 1), t["target_ids"].flatten(), reduction="none"
        )
        loss = (nll * t["loss_mask"].flatten()).sum()
        return loss / denominator, {"tokens": float(loss.detach()), "count": micro_batch.num_loss_tokens}

    return loss_fn


def grads(engine):
    return {n: p.grad.clone() for n, p in engine.model.named_parameters() if p.grad is not None}


def test_the_number_of_micro_batches_does_not_change_a_gradient():
    found = []
    for budget in (16, 64, 4096):
        packed, parts = packed_batch(budget)
        engine = TorchEngine(Small())
        counts = {"tokens": float(packed.num_loss_tokens)}
        metrics = engine.forward_backward(token_loss(counts["tokens"]), parts, counts)
        found.append((len(parts), metrics, grads(engine)))
    assert len({n for n, _, _ in found}) == 3
    for _, metrics, gradient in found[1:]:
        assert metrics == pytest.approx(found[0][1])
        for name, value in gradient.items():
            torch.testing.assert_close(value, found[0][2][name], rtol=0, atol=1e-6)


def test_reported_sums_are_divided_by_the_denominator_of_their_name():
    packed, parts = packed_batch(64)
    denominators = {"tokens": float(packed.num_loss_tokens)}
    metrics = TorchEngine(Small()).forward_backward(token_loss(denominators["tokens"]), parts, denominators)
    assert metrics["tokens"] == pytest.approx(metrics["loss"]) and metrics["count"] == packed.num_loss_tokens


def test_gradients_of_several_calls_add_up_until_the_step():
    packed, parts = packed_batch(64)
    once, twice = TorchEngine(Small()), TorchEngine(Small())
    once.forward_backward(token_loss(1.0), parts, {})
    for part in parts:
        twice.forward_backward(token_loss(1.0), part, {})
    for name, value in grads(once).items():
        torch.testing.assert_close(value, grads(twice)[name], rtol=0, atol=1e-5)
    twice.step()
    assert not grads(twice) and twice.num_steps == 1 and packed.num_tokens > 0


def snapshot(engine):
    return [p.detach().clone() for p in engine.model.parameters()]


def unchanged(engine, before):
    return all(torch.equal(p, b) for p, b in zip(engine.model.parameters(), before))


def test_a_loss_that_is_not_finite_stops_before_any_parameter_changes():
    engine = TorchEngine(Small())
    ids = torch.arange(8)
    engine.forward_backward(lambda m, x: (m(x).square().mean(), {}), ids, {})
    engine.step()
    before = snapshot(engine)

    def bad(model, x):
        return model(x).mean() * (math.nan if int(x[0]) else 1.0), {}

    with pytest.raises(
        EngineError, match=r"step 1: the loss of micro-batch 1 is nan; no parameter was changed"
    ):
        engine.forward_backward(bad, [ids, ids + 1], {})
    assert unchanged(engine, before) and not grads(engine)
    with pytest.raises(EngineError, match="no gradient to apply"):
        engine.step()


def test_a_gradient_that_is_not_finite_stops_the_step_and_names_the_tensor():
    engine = TorchEngine(Small())
    engine.forward_backward(lambda m, x: (m(x).mean(), {}), torch.arange(4), {})
    engine.model.norm.weight.grad[0] = math.inf
    before = snapshot(engine)
    with pytest.raises(EngineError, match=r"step 0: the gradient of norm.weight is not finite \(1 of 3"):
        engine.step()
    assert unchanged(engine, before) and engine.num_steps == 0 and not grads(engine)


def test_an_interrupted_batch_leaves_no_gradient_behind():
    engine = TorchEngine(Small())

    def interrupted(model, x):
        if int(x[0]) == 1:
            raise KeyboardInterrupt
        return model(x).mean(), {}

    with pytest.raises(KeyboardInterrupt):
        engine.forward_backward(
            interrupted, [torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64)], {}
        )
    assert not grads(engine)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_denominator_that_is_no_positive_number_is_refused(value):
    with pytest.raises(EngineError, match=r"step 0: denominator tokens is"):
        TorchEngine(Small()).forward_backward(
            lambda m, x: (m(x).mean(), {}), torch.arange(4), {"tokens": value}
        )


def test_gradients_are_clipped_to_the_global_norm_and_the_full_norm_is_reported():
    def applied(clip):
        engine = TorchEngine(Small(), OptimizerSettings(grad_clip=clip))
        engine.forward_backward(lambda m, x: (m(x).sum() * 100, {}), torch.arange(8), {})
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads(engine).values()))
        assert engine.step()["grad_norm"] == pytest.approx(norm)
        moments = [t for n, t in engine.optimizer.state_tensors().items() if n.startswith("adamw.exp_avg.")]
        return math.sqrt(sum(float(t.double().square().sum()) for t in moments)) / 0.1, norm

    clipped, full = applied(0.5)
    assert clipped == pytest.approx(0.5, rel=1e-4) and full > 100
    unclipped, full = applied(0.0)
    assert unclipped == pytest.approx(full, rel=1e-4)


def test_expert_loads_by_layer_move_the_router_bias_and_hash_layers_are_passed_over():
    engine = TorchEngine(Small(), OptimizerSettings(bias_speed=0.5))
    engine.forward_backward(lambda m, x: (m(x).mean(), {}), torch.arange(4), {})
    loads = {0: torch.tensor([1, 1]), 1: torch.tensor([9, 0, 3]), 2: torch.tensor([4, 4, 4])}
    engine.step(expert_load=loads)
    assert engine.model.layers[1].ffn.gate.bias.tolist() == [-0.5, 0.5, 0.5]
    assert engine.model.mtp[0].ffn.gate.bias.tolist() == [0, 0, 0]
    engine.forward_backward(lambda m, x: (m(x).mean(), {}), torch.arange(4), {})
    engine.step(expert_load={2: torch.tensor([0, 1, 5])})  # layer 2 of a trunk of two is mtp.0
    assert engine.model.layers[1].ffn.gate.bias.tolist() == [-0.5, 0.5, 0.5]
    assert engine.model.mtp[0].ffn.gate.bias.tolist() == [0.5, 0.5, -0.5]


def test_the_learning_rate_returned_is_the_scaled_one():
    engine = TorchEngine(Small(), OptimizerSettings(lr=0.2))
    engine.forward_backward(lambda m, x: (m(x).mean(), {}), torch.arange(4), {})
    assert engine.step(0.25)["lr"] == pytest.approx(0.05)


def test_a_few_steps_learn_a_fixed_mapping():
    engine = TorchEngine(Small(), OptimizerSettings(lr=0.05, weight_decay=0.0))
    ids = torch.arange(16)

    def loss_fn(model, x):
        return nn.functional.cross_entropy(model(x), (x + 1) % 16), {}

    first = engine.forward_backward(loss_fn, ids, {})["loss"]
    engine.step()
    for _ in range(60):
        last = engine.forward_backward(loss_fn, ids, {})["loss"]
        engine.step()
    assert last < 0.1 < first


def test_state_of_another_model_names_the_file_and_the_tensor(tmp_path):
    engine = TorchEngine(Small())
    engine.save(tmp_path)
    tensors = read_tensors(tmp_path / OPTIMIZER_FILE)
    write_tensors(
        tmp_path / OPTIMIZER_FILE, {k: v for k, v in tensors.items() if k != "adamw.step.norm.weight"}
    )
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors: .*adamw.step.norm.weight is missing"):
        engine.load(tmp_path)
    write_tensors(tmp_path / OPTIMIZER_FILE, {k: v for k, v in tensors.items() if k != "num_steps"})
    with pytest.raises(CheckpointError, match="tensor num_steps is missing"):
        engine.load(tmp_path)
    (tmp_path / "random.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"random.safetensors is missing"):
        engine.load(tmp_path)


def test_prediction_blocks_are_clipped_apart_from_the_rest():
    class Ahead(Small):
        def __init__(self):
            super().__init__()
            block = nn.Module()
            block.e_proj = nn.Linear(8, 8, bias=False)
            self.mtp = nn.ModuleList([block])

    steps = {}
    for size in (0.0, 1000.0):
        engine = TorchEngine(Ahead(), OptimizerSettings(grad_clip=1.0, kind="adamw", eps=1.0))
        before = engine.model.state_dict()["embed.weight"].clone()

        def loss_fn(model, _, size=size):
            loss = 3 * model.embed.weight.sum() + size * model.mtp[0].e_proj.weight.sum()
            return loss, {}

        engine.forward_backward(loss_fn, None, {})
        engine.step()
        steps[size] = engine.model.state_dict()["embed.weight"] - before
    assert torch.equal(steps[0.0], steps[1000.0]) and steps[0.0].any()
