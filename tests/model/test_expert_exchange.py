"""Experts over ranks against one process: to the bit where the order of sums is one process's own."""

import pytest
import torch

from consilience.model.exact import exact_mode
from consilience.model.expert_exchange import Shard, _order, _Plan
from consilience.model.expert_parallel import shard_experts
from consilience.model.forward_trace import Trace
from consilience.model.kernels import experts as by_pieces
from consilience.model.moe import routed
from consilience.model.quantization import Quantization
from consilience.model.ranks import Ranks
from tests.model.expert_cases import BATCHES, ROUTERS, joined, layer, tokens
from tests.rank_processes import on_ranks
from tests.ranks_table import keep, off

pytestmark = pytest.mark.row("experts over ranks: exchange, a layer", "library")

torch.set_num_threads(1)

WAVES = (1, 2, 3)
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-13}  # a few dozen terms of about 1, added in parts


def bound_of_experts(dtype):
    """None where the bits are one process's. Elsewhere vector and scalar code give a function's last bit, and
    which of them meets a row depends on the rows around it; bf16 is rounded from such numbers."""
    if dtype == torch.float32 and by_pieces.is_available(torch.zeros(1)):
        return None
    return {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2.0**-7}[dtype]


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


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (2, torch.float32),
        *(pytest.param(2, dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.bfloat16)),
        pytest.param(4, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_sums_and_gradients_have_the_bits_of_one_process_whatever_the_waves(size, dtype, tmp_path):
    found, bound = on_ranks(size, experts_on_each, dtype, WAVES, folder=tmp_path), bound_of_experts(dtype)
    for seed, counts in enumerate(BATCHES[size]):
        hidden, _, grad, _, weights, experts = joined(counts, dtype, seed)
        whole = sums_and_gradients(layer("learned", dtype), hidden, weights, experts, grad)
        for number in WAVES:
            for rank, (results, own) in enumerate(found):
                for name, value in results[number, seed].items():
                    is_stack = name in ("w1", "w2", "w3")
                    expected = whole[name][own.start : own.stop] if is_stack else None
                    expected = whole[name].split(list(counts))[rank] if expected is None else expected
                    if bound is None:
                        assert torch.equal(value, expected), (name, number, counts, rank)
                    else:
                        torch.testing.assert_close(value, expected, rtol=bound, atol=bound)
                    keep(off(value, expected))


def train(moe, batches):
    """Outputs, traces, and gradients of tokens and parameters, the latter summed over the batches."""
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


PLAIN, FP4 = Quantization(), Quantization(experts=True)


@pytest.mark.parametrize(
    ("size", "dtype", "quantization"),
    [
        (2, torch.float64, PLAIN),
        pytest.param(4, torch.float32, FP4, marks=pytest.mark.slow),
    ],
)
def test_a_layer_of_either_router_trains_as_in_one_process(size, dtype, quantization, tmp_path):
    found, bound = on_ranks(size, layers_on_each, dtype, quantization, folder=tmp_path), BOUNDS[dtype]
    for router in ROUTERS:
        moe = layer(router, dtype)
        moe.experts.quantization = quantization
        whole = train(moe, [joined(c, dtype, seed) for seed, c in enumerate(BATCHES[size])])
        results = [each[router] for each in found]
        for name in ("output", "d_hidden"):
            for batch, counts in enumerate(BATCHES[size]):
                for (result, _), expected in zip(results, whole[name][batch].split(list(counts))):
                    torch.testing.assert_close(result[name][batch], expected, rtol=bound, atol=bound)
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


def exact_on_each(ranks, counts):
    """Outputs of this rank's tokens, in exact mode with and without a gradient, and outside of it without."""
    found = []
    for router in ROUTERS:
        moe = layer(router)
        shard_experts(moe, ranks, waves=2)
        hidden, ids, grad, *_ = tokens(counts)[ranks.rank]
        with exact_mode():
            hidden = hidden.requires_grad_()
            output = moe(hidden, ids)
            with torch.no_grad():
                again = moe(hidden, ids)
        output.backward(grad)
        with torch.no_grad():
            fast = moe(hidden, ids)
        found.append((output.detach(), again, hidden.grad, fast))
    return found


@pytest.mark.slow
def test_in_exact_mode_a_layers_outputs_have_the_bits_of_one_process(tmp_path):
    counts = (13, 6)
    found = on_ranks(2, exact_on_each, counts, folder=tmp_path)
    for number, router in enumerate(ROUTERS):
        moe, (hidden, ids, grad, *_) = layer(router), joined(counts)
        hidden = hidden.requires_grad_()
        with exact_mode():
            whole = moe(hidden, ids)
        whole.backward(grad)
        given = zip((each[number] for each in found), whole.split(counts), hidden.grad.split(counts))
        for (output, again, d_hidden, fast), expected, d_expected in given:
            assert torch.equal(output, expected) and torch.equal(again, expected)
            torch.testing.assert_close(fast, expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(d_hidden, d_expected, rtol=1e-5, atol=1e-5)


def test_experts_stand_by_wave_then_rank_then_number():
    # 7 experts on 3 ranks: 0 1, 2 3, 4 5 6; in 2 waves 0 | 1, 2 | 3, 4 | 5 6.
    keys, edges = _order(7, 3, 2)
    by_key = sorted(range(7), key=keys.__getitem__)
    assert by_key == [0, 2, 4, 1, 3, 5, 6]
    assert edges == [[0, 1, 2, 3], [3, 4, 5, 7]]


def test_a_plan_says_what_travels():
    shard = Shard(Ranks(rank=1, size=2), num_experts=4, num_waves=2)
    # Keys: expert 0, 2 (wave 0), 1, 3 (wave 1). Pairs of rank 0 by key: 5 1 0 2, of rank 1: 3 4 6 0.
    plan = _Plan.of(shard, torch.tensor([[5, 1, 0, 2], [3, 4, 6, 0]]))
    assert plan.given == [[3, 4], [6, 0]] and plan.found == [[1, 4], [2, 0]]
    wide = Shard(Ranks(rank=0, size=2), num_experts=4, num_waves=1)
    plan = _Plan.of(wide, counts := torch.tensor([[2, 1, 0, 1], [0, 3, 1, 1]]))
    assert plan.found == [[3, 3]]
    # From rank 0 experts 0, 0, 1, from rank 1 three times 1.
    assert plan.numbers(counts, 0, 0).tolist() == [0, 0, 1, 1, 1, 1]
