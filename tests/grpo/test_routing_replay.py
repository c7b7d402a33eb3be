"""Replayed routing: the recorded experts are visited, weighted by the trainer's own scores, in every pass."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_trainer import AHEAD, CONFIG, GradientKeeper, small_model

from consilience.conf.errors import EngineError
from consilience.grpo.advantage import group_advantages
from consilience.grpo.corrections import Corrections
from consilience.grpo.mini_batch import pack_records
from consilience.grpo.routing_replay import RoutingReplay
from consilience.grpo.train import GrpoSettings, train_phase
from consilience.model.initialize import initialize
from consilience.model.moe import MoE
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.routing import Routing
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord
from consilience.rollout.token_routing import TokenRouting
from consilience.training.packing import split_micro_batches

torch.set_num_threads(1)

# Two learned layers behind a hash layer; scores that differ, so that rounding does not choose.
LEARNED = replace(CONFIG, num_hidden_layers=3, compress_ratios=(0, 4, 0), num_hash_layers=1)
PROMPT = (3, 9, 17, 18)


def model_of(seed=0, config=LEARNED, spread=30.0):
    model = small_model(seed, config)
    with torch.no_grad():
        for block in model.layers:
            block.ffn.gate.weight.mul_(spread)
    return model


@torch.no_grad()
def sampled(model, uid, tokens, reward, *, other=None, missing=()):
    """A record with the log-probs of `model`, and the routing of `other` (itself) but for some tokens."""
    ids = torch.tensor([[*PROMPT, *tokens]])
    logp = torch.log_softmax(model.head(model.hidden(ids))[0].float(), -1)
    own = [float(logp[len(PROMPT) + i - 1, t]) for i, t in enumerate(tokens)]
    taken = Routing()
    (other or model).hidden(ids, routing=taken)
    chosen = torch.stack([taken.experts[n] for n in (1, 2)], 1).numpy().astype(np.uint8)
    chosen[[*missing, -1]] = 255
    n = len(tokens)
    return RolloutRecord(
        uid, "g", "math", "chat", None, PROMPT, tuple(tokens), tuple(own), (1,) * n, (0,) * n,
        FinishReason.STOP, Outcome(OutcomeKind.GRADED), reward, routing=TokenRouting.of((1, 2), chosen),
    )  # fmt: skip


def four(model, **options):
    tokens = ((5, 6, 1), (7, 8, 9, 1), (20, 21, 22, 23, 1), (30, 1))
    return [sampled(model, f"r{i}", t, float(i % 2), **options) for i, t in enumerate(tokens)]


def gradients(model, records, **settings):
    engine = GradientKeeper(model)
    advantages = group_advantages([r.reward for r in records], [r.group for r in records])
    given = GrpoSettings(10, mini_batches=1, **settings)
    report = train_phase(engine, model_of(), records, advantages, given, 5)
    return engine.steps[0], report


def test_places_of_a_packing_get_the_experts_of_their_tokens_and_padding_none():
    model = model_of()
    records = four(model, missing=(2,))
    packed = pack_records(records, [1.0] * 4, 32)
    replay = RoutingReplay(records, model.config)
    for micro in split_micro_batches(packed, 32):
        found = replay.of(micro).experts[2].reshape(*micro.token_ids.shape, -1)
        for row, column in np.ndindex(micro.token_ids.shape):
            s, t = micro.sample_index[row, column], micro.position_ids[row, column]
            expected = [-1, -1] if s < 0 else records[s].routing.experts()[t, 1].tolist()
            assert found[row, column].tolist() == expected
    assert (packed.sample_index < 0).any()


def test_the_routing_that_would_be_chosen_anyway_changes_no_bit_of_a_gradient():
    free, report = gradients(model_of(), four(model_of()))
    replayed, with_it = gradients(model_of(), four(model_of()), replay_routing=True)
    assert len(free) > 20 and all(torch.equal(free[n], replayed[n]) for n in free)
    assert "routing_differs" not in report and with_it["routing_differs"] == 0.0
    tokens = sum(len(PROMPT) + n for n in (3, 4, 5, 2))
    assert with_it["routing_replayed"] == pytest.approx((tokens - 4) / tokens)


def test_another_routing_is_followed_counted_and_gives_the_routers_a_gradient():
    records = four(model_of(), other=model_of(7))
    free, _ = gradients(model_of(), records)
    replayed, report = gradients(model_of(), records, replay_routing=True)
    assert 0.2 < report["routing_differs"] <= 1.0
    name = "layers.2.ffn.gate.weight"
    assert replayed[name].abs().max() > 0 and not torch.allclose(free[name], replayed[name], rtol=1e-2)


@pytest.mark.parametrize("policy", ["cheap", "experts", "block"])
def test_a_block_that_runs_again_in_the_backward_follows_the_same_routing(policy):
    records = four(model_of(), other=model_of(7), missing=(1, 3))
    kept, report = gradients(model_of(), records, replay_routing=True)
    model = model_of()
    set_recompute(model, recompute_policy(policy))
    again, same = gradients(model, records, replay_routing=True)
    assert same["routing_differs"] == report["routing_differs"] > 0
    assert all(torch.equal(kept[n], again[n]) for n in kept)


def test_samples_without_a_record_and_prediction_blocks_route_freely():
    config = replace(LEARNED, num_nextn_predict_layers=1, mtp_compress_ratios=AHEAD.mtp_compress_ratios)
    records = [replace(r, routing=None) for r in four(model_of())]
    free, _ = gradients(model_of(0, config), records)
    replayed, report = gradients(model_of(0, config), records, replay_routing=True)
    assert any(n.startswith("mtp.") for n in free) and report["routing_replayed"] == 0.0
    assert all(torch.equal(free[n], replayed[n]) for n in free)


def test_a_record_of_other_layers_is_refused():
    (record, *_) = four(model_of())
    with pytest.raises(EngineError, match=r"r0: routing of layers \(1, 2\) with 2 experts each"):
        RoutingReplay([record], replace(LEARNED, num_hash_layers=2))


def test_gradients_at_prescribed_experts_are_those_of_the_formula_in_fp64():
    """y = Σ_k g_k E_k(h) + S(h), g = scaling · s / Σ_k s over the prescribed experts, s = √softplus(W h).

    fp32 against fp64: sums of 16 and 8 terms, so a relative error of some 1e-6 of the largest gradient.
    """
    moe = MoE(LEARNED, 2, torch.float32)
    holder = initialize(small_model(3, LEARNED), 3)
    moe.load_state_dict(holder.layers[2].ffn.state_dict())
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, LEARNED.hidden_size, generator=g)
    upstream = torch.randn(9, LEARNED.hidden_size, generator=g)
    fixed = torch.stack([torch.randperm(LEARNED.n_routed_experts, generator=g)[:2] for _ in range(9)])
    x = hidden.clone().requires_grad_()
    routing = Routing.fixed({2: fixed.to(torch.int16)})
    (moe(x, torch.zeros(9, dtype=torch.long), routing=routing) * upstream).sum().backward()

    twin = {n: p.detach().double().requires_grad_() for n, p in moe.named_parameters()}
    wide = hidden.double().requires_grad_()
    limit = LEARNED.swiglu_limit

    def swiglu(rows, w1, w2, w3):
        gate = torch.nn.functional.silu((rows @ w1.t()).clamp(max=limit))
        return (gate * (rows @ w3.t()).clamp(-limit, limit)) @ w2.t()

    scores = torch.nn.functional.softplus(wide @ twin["gate.weight"].t()).sqrt().gather(1, fixed)
    shares = LEARNED.routed_scaling_factor * scores / scores.sum(1, keepdim=True)
    outs = []
    for row in range(9):
        own = [swiglu(wide[row], *(twin[f"experts.{w}"][e] for w in ("w1", "w2", "w3"))) for e in fixed[row]]
        outs.append(sum(share * out for share, out in zip(shares[row], own)))
    shared = swiglu(wide, *(twin[f"shared_experts.{w}.weight"] for w in ("w1", "w2", "w3")))
    ((torch.stack(outs) + shared) * upstream.double()).sum().backward()

    for name, p in [("hidden", x), *moe.named_parameters()]:
        expected = wide.grad if name == "hidden" else twin[name].grad
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad.double(), expected, rtol=0, atol=5e-6 * float(expected.abs().max())
            )
    assert twin["gate.weight"].grad.abs().max() > 0


def test_a_sampler_that_disagrees_is_corrected_and_its_weight_reaches_the_gradient():
    """Log-probs shifted by log 2: every ratio is 1/2, so the weight is 1/2 and a mask drops all."""
    exact = four(model_of())
    off = [replace(r, logprobs=tuple(x + float(np.log(2)) for x in r.logprobs)) for r in exact]
    base, _ = gradients(model_of(), exact, kl_beta=0.0)
    half, report = gradients(
        model_of(), off, kl_beta=0.0, corrections=Corrections(token_truncate=1.0), mask_delta=9.0
    )
    name = "layers.1.attn.wq_a.weight"
    torch.testing.assert_close(half[name], base[name] / 2, rtol=1e-3, atol=1e-8)  # log-probs rounded to fp32
    assert report["mismatch_max"] == report["sampler_gap_max"] == pytest.approx(np.log(2), abs=1e-5)
    assert (
        report["sampler_kl_k1"] == pytest.approx(np.log(2), abs=1e-5) and report["max_abs_log_ratio"] < 1e-5
    )
    none, _ = gradients(model_of(), off, kl_beta=0.0, corrections=Corrections(sequence_mask=(0.9, 1.1)))
    assert none[name].abs().max() == 0.0
