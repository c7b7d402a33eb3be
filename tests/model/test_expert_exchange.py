"""Experts over ranks against one process: to the bit where the order of sums is one process's own."""

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.expert_exchange import Shard, _order
from consilience.model.expert_parallel import shard_experts
from consilience.model.forward_trace import Trace
from consilience.model.moe import routed
from consilience.model.quantization import Quantization
from consilience.model.ranks import Ranks
from tests.model.expert_cases import BATCHES, CONFIG, ROUTERS, joined, layer, tokens
from tests.rank_processes import on_ranks

torch.set_num_threads(1)

WAVES = (1, 2, 3)
SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-13}  # a few dozen terms of about 1, added in parts


def sums_and_gradients(moe, hidden, weights, experts, grad):
    """What the routed experts give for choices, and gradients of all they depend on."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    own, limit = moe.experts.weights(), moe.experts.limit
    shard = moe.experts.shard
    run = routed if shard is None else shard.run
    output = run(hidden, weights, experts, own, limit)
    output = output[0] if shard is None else output
    output.backward(grad)
    found = {"output": output.detach(), "d_hidden": hidden.grad, "d_weights": weights.grad}
    return found | {name: getattr(moe.experts, name).grad for name in ("w1", "w2", "w3")}


def experts_on_each(ranks, dtype, waves):
    found = {}
    for number in waves:
        for seed, counts in enumerate(BATCHES[ranks.size]):
            moe = layer("learned", dtype)
            shard_experts(moe, ranks, waves=number)
            hidden, _, grad, _, weights, experts = tokens(counts, dtype, seed)[ranks.rank]
            found[number, seed] = sums_and_gradients(moe, hidden, weights, experts, grad)
    return found, moe.experts.shard.own


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_sums_and_gradients_have_the_bits_of_one_process_whatever_the_waves(size, dtype, tmp_path):
    found = on_ranks(size, experts_on_each, dtype, WAVES, folder=tmp_path)
    for seed, counts in enumerate(BATCHES[size]):
        hidden, _, grad, _, weights, experts = joined(counts, dtype, seed)
        whole = sums_and_gradients(layer("learned", dtype), hidden, weights, experts, grad)
        for number in WAVES:
            for rank, (results, own) in enumerate(found):
                for name, value in results[number, seed].items():
                    is_stack = name in ("w1", "w2", "w3")
                    expected = whole[name][own.start : own.stop] if is_stack else None
                    expected = whole[name].split(list(counts))[rank] if expected is None else expected
                    assert torch.equal(value, expected), (name, number, counts, rank)


def train(moe, batches):
    """Outputs, traces, and gradients of tokens and parameters; those of parameters add up over the batches."""
    found = {"output": [], "d_hidden": [], "load": 0, "balance": 0.0}
    for hidden, ids, grad, sample, *_ in batches:
        hidden, trace = hidden.clone().requires_grad_(), Trace(wants_losses=True)
        output = moe(hidden, ids, sample, trace)
        balance = sum(trace.balance_loss, torch.zeros((), dtype=hidden.dtype))
        ((output * grad).sum() + 0.5 * balance).backward()
        found["output"].append(output.detach())
        found["d_hidden"].append(hidden.grad)
        found["load"] = found["load"] + trace.expert_load[moe.layer]
        found["balance"] = found["balance"] + balance.detach()
    return found | {"grads": {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}}


def layers_on_each(ranks, dtype, quantization):
    found = {}
    for router in ROUTERS:
        moe = layer(router, dtype)
        moe.experts.quantization = quantization
        shard_experts(moe, ranks, waves=2)
        mine = [tokens(c, dtype, seed)[ranks.rank] for seed, c in enumerate(BATCHES[ranks.size])]
        found[router] = train(moe, mine), moe.experts.shard.own
    return found


@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [(torch.float32, Quantization()), (torch.float64, Quantization()), (torch.float32, Quantization(experts=True))],
)
@pytest.mark.parametrize("size", SIZES)
def test_a_layer_of_either_router_trains_as_in_one_process(size, dtype, quantization, tmp_path):
    found, bound = on_ranks(size, layers_on_each, dtype, quantization, folder=tmp_path), BOUNDS[dtype]
    for router in ROUTERS:
        moe = layer(router, dtype)
        moe.experts.quantization = quantization
        whole = train(moe, [joined(c, dtype, seed) for seed, c in enumerate(BATCHES[size])])
        results = [each[router] for each in found]
        for name in ("output", "d_hidden"):
            for batch, counts in enumerate(BATCHES[size]):
                for rank, expected in enumerate(whole[name][batch].split(list(counts))):
                    torch.testing.assert_close(results[rank][0][name][batch], expected, rtol=bound, atol=bound)
        assert torch.equal(sum(result["load"] for result, _ in results), whole["load"])
        balance = sum(result["balance"] for result, _ in results)
        torch.testing.assert_close(balance, whole["balance"], rtol=bound, atol=bound)
        for name, expected in whole["grads"].items():
            if name.startswith("experts."):
                parts = [result["grads"][name] for result, _ in results]
                assert [len(part) for part in parts] == [len(own) for _, own in results]
                torch.testing.assert_close(torch.cat(parts), expected, rtol=bound, atol=bound)
            else:
                total = sum(result["grads"][name] for result, _ in results)
                torch.testing.assert_close(total, expected, rtol=bound, atol=bound)
