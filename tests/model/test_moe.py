"""Routing by hand, experts against a loop, the clamp's gradient and the balance loss."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import silu

from consilience.model.config import TINY
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.moe import (
    FEW,
    Experts,
    Gate,
    MoE,
    SharedExperts,
    balance_loss,
    gated,
    grouped_linear,
    top_experts,
)
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.training.optimizers import update_gate_bias

torch.set_num_threads(1)

CONFIG = replace(
    TINY, hidden_size=8, vocab_size=11, n_routed_experts=5, num_experts_per_tok=2, moe_intermediate_size=12
)


def filled(module, seed=0, std=0.5):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g))
        for b in module.buffers():
            b.copy_(torch.rand(b.shape[0], CONFIG.n_routed_experts, generator=g).argsort(1)[:, :2])
    return module


def test_weights_are_roots_of_softplus_normalised_over_the_chosen_and_scaled():
    gate = Gate(
        replace(CONFIG, hidden_size=1, n_routed_experts=3, routed_scaling_factor=2.5),
        is_hash=False,
        dtype=None,
    )
    # softplus(log(e^s - 1)) = s: scores 2, 1, 3 for an input of 1.
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[4.0], [1.0], [9.0]]).expm1().log())
    weights, experts, scores = gate(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(scores, torch.tensor([[2.0, 1.0, 3.0]]))
    by_expert = dict(zip(experts[0].tolist(), weights[0].tolist()))
    assert by_expert == pytest.approx({2: 2.5 * 3 / 5, 0: 2.5 * 2 / 5})


def test_the_bias_selects_but_neither_weighs_nor_learns():
    gate = filled(Gate(CONFIG, is_hash=False, dtype=None))
    hidden, ids = torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    with torch.no_grad():
        gate.bias.zero_()[3] = 100.0
        gate.bias[1] = 50.0
    weights, experts, scores = gate(hidden, ids)
    assert (experts.sort(1).values == torch.tensor([1, 3])).all()
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, 1.5 * chosen / chosen.sum(1, keepdim=True))
    weights.square().sum().backward()
    assert gate.bias.grad is None and not gate.bias.requires_grad and gate.weight.grad[[1, 3]].any()


def test_hash_layers_take_experts_from_the_table_and_weights_from_the_gate():
    gate = filled(Gate(CONFIG, is_hash=True, dtype=None))
    hidden, ids = torch.randn(6, 8), torch.tensor([3, 3, 0, 10, 7, 1])
    weights, experts, scores = gate(hidden, ids)
    assert torch.equal(experts, gate.tid2eid[ids]) and gate.tid2eid.dtype == torch.int64
    assert {n for n, _ in gate.named_parameters()} == {"weight"}  # no bias tensor in hash layers
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, 1.5 * chosen / chosen.sum(1, keepdim=True))
    assert not torch.equal(weights[0], weights[1])  # same token, other hidden state


def test_the_router_is_fp32_in_a_bf16_model():
    gate = filled(Gate(CONFIG, is_hash=False, dtype=torch.bfloat16))
    hidden = torch.randn(6, 8).bfloat16()
    weights, _, scores = gate(hidden, torch.zeros(6, dtype=torch.long))
    assert weights.dtype == scores.dtype == torch.float32
    exact = torch.nn.functional.softplus(hidden.double() @ gate.weight.double().T).sqrt()
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-6)


def test_a_router_logit_far_below_zero_gives_no_nan_gradient():
    gate = filled(Gate(CONFIG, is_hash=False, dtype=None))
    with torch.no_grad():
        gate.weight[2] = -1000.0
    weights, _, scores = gate(torch.ones(1, 8), torch.zeros(1, dtype=torch.long))
    (weights.square().sum() + scores.sum()).backward()
    assert scores[0, 2].item() < 1e-15 and gate.weight.grad.isfinite().all() and gate.weight.grad.any()


def loop(experts, hidden, weights, chosen):
    out = torch.zeros_like(hidden)
    for r in range(hidden.shape[0]):
        for share, e in zip(weights[r], chosen[r].tolist()):
            gate, up = experts.w1[e] @ hidden[r], experts.w3[e] @ hidden[r]
            out[r] += share * (experts.w2[e] @ (silu(gate.clamp(max=10)) * up.clamp(-10, 10)))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [8, 6])  # 6 floats are no multiple of 16 bytes: the other path
def test_experts_equal_a_loop_forward_and_backward_also_where_some_get_no_token(width, dtype):
    config, g = replace(CONFIG, hidden_size=width), torch.Generator().manual_seed(0)
    experts = filled(Experts(config, dtype))
    hidden = torch.randn(7, width, dtype=dtype, generator=g).requires_grad_()
    weights = torch.rand(7, 2, dtype=dtype, generator=g).requires_grad_()
    chosen = torch.tensor([[0, 3], [3, 4], [0, 4], [3, 0], [4, 3], [0, 3], [4, 0]])  # 1 and 2 stay empty
    out, counts = experts(hidden, weights, chosen)
    assert counts.tolist() == [5, 0, 0, 5, 4]
    expected = loop(experts, hidden, weights, chosen)
    leaves = [hidden, weights, experts.w1, experts.w2, experts.w3]
    close = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out, expected, rtol=0, atol=close)
    found, wanted = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 4], [0, 0, 7], [7, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize(("inner", "outer"), [(8, 16), (6, 10)])
def test_grouped_linear_equals_one_linear_an_expert(counts, inner, outer, dtype):
    rows = torch.randn(sum(counts), inner).to(dtype)
    weight = torch.randn(3, outer, inner).to(dtype)
    out = grouped_linear(rows, weight, torch.tensor(counts))
    expected = torch.cat([piece @ w.T for piece, w in zip(rows.split(counts), weight)])
    assert out.shape == (sum(counts), outer) and out.dtype == dtype
    bound = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.1}[dtype]  # bf16: 8 bits of ~10
    torch.testing.assert_close(out, expected, rtol=0, atol=bound)


def test_gate_is_clamped_from_above_only_and_up_on_both_sides():
    gate, up = torch.tensor([30.0, -30.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 30.0, -30.0])
    one = 1 / (1 + math.exp(-1))
    expected = torch.tensor([10 / (1 + math.exp(-10)), -30 / (1 + math.exp(30)), 10 * one, -10 * one])
    torch.testing.assert_close(gated(gate, up, 10.0), expected)


def test_the_clamp_passes_no_gradient_strictly_beyond_the_limit_and_all_at_it():
    gate = torch.tensor([10.5, 10.0, -30.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64, requires_grad=True)
    up = torch.tensor([2.0, 2.0, 2.0, 10.5, 10.0, -10.0, -10.5], dtype=torch.float64, requires_grad=True)
    gated(gate, up, 10.0).sum().backward()
    assert (gate.grad != 0).tolist() == [False, True, True, True, True, True, True]
    assert (up.grad != 0).tolist() == [True, True, True, False, True, True, False]


def test_gated_gradcheck_away_from_the_limits():
    g = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2, 30, dtype=torch.float64, generator=g)).requires_grad_().unbind(0)
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, 2.5), (gate, up))


def test_the_shared_expert_has_the_same_form_clamp_included():
    shared = filled(SharedExperts(replace(CONFIG, swiglu_limit=0.1, n_shared_experts=2), None))
    hidden = torch.randn(4, 8)
    gate, up = hidden @ shared.w1.weight.T, hidden @ shared.w3.weight.T
    assert (gate > 0.1).any() and (up.abs() > 0.1).any() and shared.w1.weight.shape == (24, 8)
    expected = (silu(gate.clamp(max=0.1)) * up.clamp(-0.1, 0.1)) @ shared.w2.weight.T
    torch.testing.assert_close(shared(hidden), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_block_adds_the_shared_expert_once_and_counts_only_valid_tokens(layer):
    moe = filled(MoE(CONFIG, layer, None))
    hidden, ids = torch.randn(6, 8), torch.tensor([3, 3, 0, 10, 7, 1])
    sample = torch.tensor([0, 0, -1, 1, -1, 1])
    trace = Trace(wants_losses=True)
    out = moe(hidden, ids, sample, trace)
    weights, chosen, _ = moe.gate(hidden, ids)
    torch.testing.assert_close(out, loop(moe.experts, hidden, weights, chosen) + moe.shared_experts(hidden))
    load = torch.bincount(chosen[sample >= 0].flatten(), minlength=5)
    assert torch.equal(trace.expert_load[layer], load)
    assert trace.is_hash == {layer: layer == 0} and len(trace.balance_loss) == layer
    assert torch.equal(out, moe(hidden, ids))


TIES = [
    ([1.0, 3.0, 3.0, 2.0, 3.0], [1, 2, 4, 3, 0]),  # a tie among the chosen, at the border, beyond it
    ([0.0, -0.0, 0.0, -0.0, 0.0], [0, 1, 2, 3, 4]),
    ([2.0, 1.0, 2.0, 1.0, 2.0], [0, 2, 4, 1, 3]),
    ([float("-inf")] * 3 + [1.0, 1.0], [3, 4, 0, 1, 2]),
    ([5.0, 4.0, 3.0, 2.0, 1.0], [0, 1, 2, 3, 4]),
]


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_rows", [1, FEW])  # the sort, and the check of torch.topk
@pytest.mark.parametrize("topk", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("scores", "order"), TIES)
def test_of_equal_scores_the_lowest_index_is_taken_first(scores, order, topk, num_rows, dtype, device):
    selection = torch.tensor([scores], dtype=dtype, device=device).expand(num_rows, -1)
    assert top_experts(selection, topk).tolist() == [order[:topk]] * num_rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_experts", "topk"), [(5, 2), (256, 6)])
def test_both_ways_to_the_top_agree_with_a_sort_of_pairs_among_many_ties(num_experts, topk, device):
    g = torch.Generator().manual_seed(0)
    rows = FEW // num_experts + 40
    coarse = torch.randint(12, (rows, num_experts), generator=g) / 4 - 1  # 12 values: every row has ties
    fine = torch.rand(rows, num_experts, generator=g, dtype=torch.float64)  # 2^-53 apart: none has
    for selection in (coarse.to(device), fine.to(device)):
        expected = [
            sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:topk]
            for row in selection.tolist()
        ]
        assert selection.numel() > FEW and top_experts(selection, topk).tolist() == expected
        one_by_one = torch.cat([top_experts(row[None], topk) for row in selection])
        assert one_by_one.tolist() == expected
    assert torch.equal(top_experts(fine, topk), fine.topk(topk).indices)


def test_a_router_whose_scores_are_all_equal_takes_the_first_experts():
    gate = filled(Gate(CONFIG, is_hash=False, dtype=None))
    with torch.no_grad():
        gate.weight.zero_()
        gate.bias.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]))
    for num_tokens in (1, FEW):
        ids = torch.zeros(num_tokens, dtype=torch.long)
        _, experts, _ = gate(torch.randn(num_tokens, 8), ids)
        assert experts.tolist() == [[1, 3]] * num_tokens


def test_prescribed_experts_are_taken_where_given_and_weighted_by_the_scores_of_now():
    gate = filled(Gate(CONFIG, is_hash=False, dtype=None))
    hidden, ids = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    _, own, scores = gate(hidden, ids)
    fixed = torch.tensor([[4, 0], [-1, -1], [2, 3], [-1, -1]])
    weights, experts, again = gate(hidden, ids, fixed)
    assert torch.equal(experts, torch.stack([fixed[0], own[1], fixed[2], own[3]]))
    assert torch.equal(again, scores)
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, 1.5 * chosen / chosen.sum(1, keepdim=True))


def test_balance_loss_worked_by_hand():
    # Two tokens, E = 2, K = 1, both to expert 0: f = (2/1 · 2/2, 0) = (2, 0); P_0 = (3/4 + 1/2) / 2.
    scores = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
    first, each = torch.tensor([[0], [0]]), torch.tensor([[0], [1]])
    together, apart, padded = torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0, -1])
    assert balance_loss(scores, first, together).item() == pytest.approx(2 * 0.625)
    # One each: f = (1, 1), and the shares sum to 1.
    assert balance_loss(scores, each, together).item() == pytest.approx(1.0)
    # As two samples: f = (2, 0) · (3/4, 1/4) and (0, 2) · (1/2, 1/2), summed.
    assert balance_loss(scores, each, apart).item() == pytest.approx(1.5 + 1)
    # The second token is padding; then both are.
    assert balance_loss(scores, each, padded).item() == pytest.approx(1.5)
    assert balance_loss(scores, each, torch.tensor([-1, -1])).item() == 0


def test_balance_loss_of_packed_samples_is_the_sum_over_samples_alone_whatever_lies_between():
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 4, generator=g, dtype=torch.float64).requires_grad_()
    experts = scores.detach().topk(2).indices
    sample = torch.tensor([0] * 7 + [1] * 12 + [-1] * 6 + [4] * 1 + [5] * 11 + [-1] * 3)  # 2, 3: no tokens
    packed = balance_loss(scores, experts, sample)
    (gradient,) = torch.autograd.grad(packed, scores)
    alone = [
        balance_loss(scores[sample == s], experts[sample == s], sample.new_zeros(int((sample == s).sum())))
        for s in (0, 1, 4, 5)
    ]
    torch.testing.assert_close(packed, sum(alone), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, torch.autograd.grad(sum(alone), scores)[0], rtol=1e-12, atol=1e-15)
    assert not gradient[sample < 0].any()


def test_every_token_knows_its_sample_in_packed_rows_and_on_a_decode_state(smallest):
    model = initialize(Transformer(smallest), 0)
    seen = []
    model.layers[2].ffn.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[2]))
    segments = torch.tensor([[0, 0, 0, 1, 1, -1], [3, 3, 4, 5, 5, 5]])
    with torch.no_grad():
        model.hidden(torch.zeros(2, 6, dtype=torch.long), segments, trace=Trace())
        assert seen.pop().tolist() == [0, 0, 0, 1, 1, -1, 2, 2, 3, 4, 4, 4]
        state = DecodeState.allocate(smallest, 2, 24)
        for lengths in ([3, 4], [4, 2]):
            chunk = torch.zeros(2, 4, dtype=torch.long)
            model.hidden(chunk, state=state, lengths=torch.tensor(lengths), trace=Trace())
        assert seen[0].tolist() == [0, 0, 0, -1, 1, 1, 1, 1] and seen[1].tolist() == [
            0,
            0,
            0,
            0,
            1,
            1,
            -1,
            -1,
        ]
        model.hidden(chunk[:, :2], state=state)
        assert seen[2] is None  # nobody counts


def test_the_models_balance_loss_of_a_packed_row_is_that_of_its_samples_alone(smallest):
    model = initialize(Transformer(smallest), 0).double()
    g = torch.Generator().manual_seed(0)
    samples = [torch.randint(53, (n,), generator=g) for n in (9, 1, 14)]
    ids = torch.cat([*samples, torch.zeros(4, dtype=torch.long)])[None]
    segments = torch.tensor([[0] * 9 + [1] * 1 + [2] * 14 + [-1] * 4])

    def losses(token_ids, segment_ids=None):
        trace = Trace(wants_losses=True)
        model.hidden(token_ids, segment_ids, trace=trace)
        return torch.stack(trace.balance_loss)

    packed = losses(ids, segments)
    assert packed.shape == (3,)  # the learned routers of four layers
    alone = sum(losses(sample[None]) for sample in samples)
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=0)
    whole = losses(ids[:, :24])
    assert ((whole - packed / 3).abs() > 1e-3).all()  # one sequence instead of three: another number


def test_balance_loss_falls_towards_one_as_routing_evens_out():
    g = torch.Generator().manual_seed(0)
    uneven = torch.rand(400, 4, generator=g) + torch.tensor([1.0, 0, 0, 0])
    even = torch.rand(400, 4, generator=g)
    one = torch.zeros(400, dtype=torch.long)
    losses = [balance_loss(s, s.topk(2).indices, one) for s in (uneven, even)]
    assert losses[0] > 1.1 and abs(losses[1] - 1) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_the_bias_rule_drives_a_lopsided_router_to_balance_without_touching_its_scores(seed):
    """Only the rule moves anything: V3's speed 0.001, the load of one batch a step."""
    g = torch.Generator().manual_seed(seed)
    gate = Gate(replace(CONFIG, n_routed_experts=8), is_hash=False, dtype=None)
    with torch.no_grad():
        gate.weight.copy_(0.2 * torch.randn(8, 8, generator=g))
        gate.weight[:, 0] += torch.linspace(-0.4, 0.4, 8)
    ids = torch.zeros(512, dtype=torch.long)

    def load():
        hidden = torch.randn(512, 8, generator=g)
        hidden[:, 0] = 1.0
        with torch.no_grad():
            return torch.bincount(gate(hidden, ids)[1].flatten(), minlength=8)

    def excess(steps):
        """The fullest expert's load over the mean, less 1, averaged over steps."""
        found = []
        for _ in range(steps):
            counts = load()
            found.append(float(counts.max() / counts.float().mean()) - 1)
            update_gate_bias(gate.bias, counts)
        return sum(found) / steps

    before = excess(20)
    excess(600)
    after = excess(20)
    # 512 · 2 / 8 = 128 a mean expert: chance alone puts the fullest of 8 about 1.4 · 10 / 128 = 0.11 above.
    assert before > 0.5 and after < 0.2
