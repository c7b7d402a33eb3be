"""Speculative decoding: the model's joint distribution, greedy tokens exactly, every turn of a stream."""

import itertools
from dataclasses import replace

import pytest
import torch

from consilience.conf.errors import ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.config import TINY
from consilience.model.digest import weights_digest
from consilience.model.exact import exact_mode, log_softmax
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout import speculative
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prefill import MIN_SHARED_PREFIX
from consilience.rollout.sampling import accept, draw

torch.set_num_threads(1)

CONFIG = replace(
    TINY,
    vocab_size=31,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    head_dim=8,
    qk_rope_head_dim=4,
    q_lora_rank=12,
    o_groups=1,
    o_lora_rank=12,
    sliding_window=5,
    compress_ratios=(0, 4, 12),
    index_n_heads=2,
    index_head_dim=8,
    index_topk=3,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=12,
    num_hash_layers=1,
    hc_sinkhorn_iters=3,
    num_nextn_predict_layers=1,
    mtp_compress_ratios=(0,),
)


def policy(config=CONFIG, seed=0, loudness=1.0, gain=2.0):
    """fp64. Quiet layers leave the last token alone to decide, and the block then sees what the trunk sees.

    loudness 0: q = p; 1: a random model, whose block knows nothing.
    """
    model = initialize(Transformer(config), seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("wo_b.weight", "experts.w2", "shared_experts.w2.weight")):
                parameter.mul_(loudness)
        model.mtp[0].h_proj.weight.mul_(loudness)
        model.mtp[0].e_proj.weight.lerp_(torch.eye(config.hidden_size), 1 - loudness)
        model.head.weight.mul_(gain)
    return model.double().requires_grad_(False)


MODEL = policy(loudness=0.3)


def engine(model=MODEL, max_rows=8, max_length=120, is_speculative=True, **options):
    return NativeEngine(
        model, max_rows=max_rows, max_length=max_length, speculative=is_speculative, **options
    )


def prompt(length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(CONFIG.vocab_size, (length,), generator=g).tolist())


def request(
    uid, ids, *, parent=None, group=None, hold=False, temperature=1.0, max_tokens=12, stop_ids=(), seed=None
):
    seed = sum(map(ord, uid)) if seed is None else seed
    return Request(uid, ids, SamplingParams(temperature, max_tokens, stop_ids, seed), parent, group, hold)


def run(e, *requests):
    e.submit(requests)
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


def check(before, completed, model=MODEL, temperature=1.0):
    """Log-probs are those of one full forward; the sampler rounds logits of size about 10 to fp32."""
    ids = completed.token_ids
    logits = model(torch.tensor([[*before, *ids]]))[0, len(before) - 1 : -1] / temperature
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (torch.tensor(completed.logprobs) - expected).abs().max() < 2e-6
    assert len(completed.weight_version) == len(ids)


def greedy(ids, count, model=MODEL):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tuple(ids[-count:])


# ---- the distribution ----

FEW = replace(CONFIG, vocab_size=4, num_hidden_layers=2, compress_ratios=(0, 4), sliding_window=3, head_dim=4)
START = (0, 3, 1, 1, 2, 0, 3)
NUM_SAMPLES, NUM_TOKENS = 24_000, 4


def exact_joint(model):
    """[V, V, V, V] probability of the first four tokens, by full forwards."""
    all_tokens = list(itertools.product(range(4), repeat=NUM_TOKENS))
    logits = model(torch.tensor([START + tokens for tokens in all_tokens]))
    logp = logits[:, len(START) - 1 : -1].log_softmax(-1)
    chosen = logp.gather(2, torch.tensor(all_tokens)[:, :, None])[:, :, 0]
    return chosen.sum(1).exp().view(4, 4, 4, 4)


def counts_of(model, num_samples=NUM_SAMPLES):
    """[V, V, V, V] how often the engine samples each four tokens; acceptance rate."""
    e = engine(model, max_rows=3000, max_length=12)
    requests = [request(f"r{i}", START, group="g", max_tokens=NUM_TOKENS, seed=i) for i in range(num_samples)]
    found = torch.tensor([c.token_ids for c in run(e, *requests).values()])
    place = (found * torch.tensor([64, 16, 4, 1])).sum(1)
    state = e.state()
    return place.bincount(minlength=256).view(4, 4, 4, 4), state.accepted_tokens / state.drafted_tokens


def p_value(counts, probabilities):
    """Pearson's chi-square; cells that expect fewer than 5 counts are one."""
    expected = (probabilities * counts.sum()).flatten()
    is_rare = expected < 5
    seen = torch.cat((counts.flatten()[~is_rare], counts.flatten()[is_rare].sum()[None])).double()
    wanted = torch.cat((expected[~is_rare], expected[is_rare].sum()[None]))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = ((seen - wanted) ** 2 / wanted).sum()
    half_freedom = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, statistic / 2))


def margins(joint):
    """What is tested: each token, each two neighbours, and all four."""
    keep = [(i,) for i in range(4)] + [(i, i + 1) for i in range(3)] + [(0, 1, 2, 3)]
    return {
        axes: joint.sum([a for a in range(4) if a not in axes]) if len(axes) < 4 else joint for axes in keep
    }


@pytest.mark.parametrize(("loudness", "low", "high"), [(1.0, 0.4, 0.6), (0.1, 0.7, 0.9)])
def test_samples_follow_the_model_s_joint_distribution(loudness, low, high):
    model = policy(FEW, seed=1, loudness=loudness, gain=1.0)
    counts, acceptance = counts_of(model)
    assert low < acceptance < high  # both ways of finding a token are taken
    exact = margins(exact_joint(model))
    found = {axes: p_value(own, exact[axes]) for axes, own in margins(counts).items()}
    # The seeds are fixed: of the 8 values, none is below 1 % here. Wrong rules give less than 1e-6.
    assert min(found.values()) > 0.01, found


def always(p, q, draft, uniform):
    return draft, torch.ones_like(draft, dtype=torch.bool)


def from_all_of_p(p, q, draft, uniform):
    """After a refusal the whole of p instead of its rest."""
    _, is_accepted = accept(p, q, draft, uniform)
    return torch.where(is_accepted, draft, draw(p, uniform[:, 1])), is_accepted


def one_number(p, q, draft, uniform):
    """The same random number for the verdict and the draw after it."""
    return accept(p, q, draft, uniform[:, :1].expand(-1, 2))


@pytest.mark.parametrize("wrong", [always, from_all_of_p, one_number])
def test_the_same_test_rejects_wrong_rules(wrong, monkeypatch):
    """A mutation: what stands in for `accept` is what the test is about."""
    model = policy(FEW, seed=1, gain=1.0)
    monkeypatch.setattr(speculative, "accept", wrong)
    counts, _ = counts_of(model, 12_000)
    exact = margins(exact_joint(model))
    assert p_value(margins(counts)[0, 1, 2, 3], exact[0, 1, 2, 3]) < 1e-6


# ---- tokens ----


@pytest.mark.parametrize("loudness", [0.1, 1.0])
def test_greedy_tokens_are_exactly_the_greedy_ones(loudness):
    model = policy(loudness=loudness)
    prompts = {f"r{n}": prompt(n, n) for n in (1, 2, 3, 5, 8, 13, 40)}
    e = engine(model)
    done = run(e, *(request(u, ids, temperature=0.0, max_tokens=30) for u, ids in prompts.items()))
    for uid, ids in prompts.items():
        assert done[uid].token_ids == greedy(ids, 30, model), uid
        check(ids, done[uid], model)
    state = e.state()
    if loudness < 1:  # drafts that stand, and drafts that do not, among 7 · 29 tokens
        assert 0.3 * state.drafted_tokens < state.accepted_tokens < state.drafted_tokens


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_log_probs_are_the_trunk_s_at_the_sampled_tokens(temperature):
    e = engine()
    requests = [request(f"r{n}", prompt(n, n), temperature=temperature, max_tokens=40) for n in (1, 4, 17)]
    done = run(e, *requests)
    for r in requests:
        check(r.prompt_ids, done[r.uid], temperature=temperature)
    assert 0 < e.state().accepted_tokens < e.state().drafted_tokens
    assert e.state().sampled_tokens == 3 * 40


def test_in_fp32_log_probs_are_those_of_the_full_forward_to_1e_5():
    model = policy(loudness=0.3, gain=1.0).float()
    requests = [request(f"r{n}", prompt(n, n), max_tokens=60) for n in (1, 7, 30)]
    done = run(engine(model), *requests)
    for r in requests:
        ids = done[r.uid].token_ids
        logp = model(torch.tensor([[*r.prompt_ids, *ids]]))[0, len(r.prompt_ids) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert (torch.tensor(done[r.uid].logprobs) - expected).abs().max() < 1e-5


def test_in_exact_mode_log_probs_are_those_of_the_full_forward_bit_for_bit():
    model = policy(loudness=0.3, gain=1.0).float()
    requests = [request(f"r{n}", prompt(n, n), max_tokens=25) for n in (1, 7, 30)]
    e = engine(model, exact=True)
    done = run(e, *requests)
    for r in requests:
        ids = done[r.uid].token_ids
        with exact_mode():
            logits = model(torch.tensor([[*r.prompt_ids, *ids]]))[0, len(r.prompt_ids) - 1 : -1]
            expected = log_softmax(logits).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert done[r.uid].logprobs == tuple(expected.tolist())
        assert (
            done[r.uid] == run(engine(model, exact=True), r)[r.uid]
        )  # alone: the same tokens, the same bits
    assert 0 < e.state().accepted_tokens < e.state().drafted_tokens


def test_tokens_depend_on_the_seed_and_not_on_the_batch():
    mine = request("mine", prompt(17), max_tokens=25, seed=5)
    alone = run(engine(), mine)["mine"]
    others = [request(f"o{n}", prompt(n, n), max_tokens=3 * n, temperature=n % 2) for n in (3, 6, 9)]
    crowd = run(engine(), *others[:2], mine, others[2])["mine"]
    late = engine(max_rows=2)
    late.submit(others[:2])
    late.step()
    tokens = [alone.token_ids, crowd.token_ids, run(late, mine, others[2])["mine"].token_ids]
    assert tokens[0] == tokens[1] == tokens[2]
    other = replace(mine, sampling=replace(mine.sampling, seed=6))
    assert run(engine(), other)["mine"].token_ids != alone.token_ids


def test_a_longer_limit_only_appends_at_every_border():
    """Wherever the limit falls, between a draft and its successor too."""
    whole = run(engine(), request("r", prompt(9), max_tokens=14, seed=3))["r"]
    for limit in range(1, 14):
        e = engine(max_length=9 + limit)
        short = run(e, request("r", prompt(9), max_tokens=limit, seed=3))["r"]
        assert short.token_ids == whole.token_ids[:limit] and short.finish == "length"
        assert e.state().sampled_tokens == limit
        check(prompt(9), short)


def test_a_stop_id_ends_a_turn_wherever_it_falls_in_a_round():
    free = run(engine(), request("r", prompt(9), max_tokens=20, seed=4))["r"].token_ids
    for stop in set(free):
        e = engine()
        first = run(e, request("r", prompt(9), max_tokens=20, seed=4, stop_ids=(stop,), hold=True))["r"]
        assert first.finish == "stop" and first.token_ids == free[: free.index(stop) + 1]
        before = prompt(9) + first.token_ids + prompt(3, 8)
        done = run(e, request("s", prompt(3, 8), parent="r", temperature=0.0, max_tokens=6))["s"]
        assert done.token_ids == greedy(before, 6)  # the state ends with the stop token, no draft after it
        check(before, done)


# ---- streams ----


def test_held_streams_go_on_exactly_whatever_waited_when_they_ended():
    e = engine(max_rows=4)
    streams = {f"s{n}": list(prompt(n, n)) for n in (1, 4, 11)}
    last: dict[str, str] = {}
    for turn in range(5):
        requests = []
        for name, ids in streams.items():
            observed = prompt(1 + 3 * (turn % 3), 50 + turn) if turn else tuple(ids)
            ids += observed if turn else ()
            uid = f"{name}#{turn}"
            options = {"parent": last.get(name), "hold": turn < 4, "temperature": float(turn % 2)}
            requests.append(request(uid, observed, max_tokens=4 + len(ids) % 3, **options))
            last[name] = uid
        done = run(e, *requests, request(f"noise{turn}", prompt(6 + turn, 90), max_tokens=9))
        for (name, ids), r in zip(streams.items(), requests):
            check(ids, done[r.uid])
            if turn % 2 == 0:
                assert done[r.uid].token_ids == greedy(ids, r.sampling.max_tokens), name
            ids += done[r.uid].token_ids
    assert e.state().num_held == 0


def test_a_group_shares_one_prefill_and_equals_cold_prefills():
    members = [request(f"m{i}", prompt(21), group="g", max_tokens=10, seed=i) for i in range(5)]
    single = [request(f"s{i}", prompt(1, i), group="h", max_tokens=10, seed=i) for i in range(2)]
    e = engine()
    done = run(e, *members, *single)
    assert e.state().prefill_tokens == 21 + 2  # one-token prompts leave no pair to read
    for r in (*members, *single):
        assert done[r.uid].token_ids == run(engine(), replace(r, group=None))[r.uid].token_ids
        check(r.prompt_ids, done[r.uid])
    assert len({done[m.uid].token_ids for m in members}) == 5


@pytest.mark.parametrize("tail", [1, 9])
def test_a_shared_prefix_is_computed_once_and_changes_no_token(tail):
    shared = prompt(MIN_SHARED_PREFIX + 5)
    requests = [request(f"r{i}", shared + (i, *prompt(tail, i))[:tail], max_tokens=10) for i in range(3)]
    e = engine()
    done = run(e, *requests, request("short", prompt(3), max_tokens=5, seed=1))
    done |= run(e, *(replace(r, uid=f"again {r.uid}") for r in requests))
    for r in requests:
        expected = run(engine(), r)[r.uid].token_ids
        assert done[r.uid].token_ids == done[f"again {r.uid}"].token_ids == expected
        check(r.prompt_ids, done[r.uid])
    check(prompt(3), done["short"])


@pytest.mark.parametrize(("max_rows", "prefill_tokens"), [(1, 8192), (3, 30)])
def test_more_requests_than_rows_queue_and_none_is_lost_or_changed(max_rows, prefill_tokens):
    requests = [
        request(f"r{i}", prompt(3 + 5 * (i % 4), i // 3), group=f"g{i // 3}", max_tokens=1 + 4 * (i % 3))
        for i in range(10)
    ]
    done = run(engine(max_rows=max_rows, prefill_tokens=prefill_tokens), *requests)
    wide = run(engine(max_rows=16), *requests)
    for r in requests:
        assert done[r.uid].token_ids == wide[r.uid].token_ids
        assert len(done[r.uid].token_ids) == r.sampling.max_tokens
        check(r.prompt_ids, done[r.uid])


def test_weights_published_between_rounds_draft_and_verify_from_then_on():
    model, other = policy(loudness=0.3), policy(seed=9, loudness=0.3)
    weights = {n: t.clone() for n, t in to_official(other).items()}
    e = engine(model, version=3)
    e.submit([request("r", prompt(9), max_tokens=12)])
    e.step()
    e.publish(weights, weights_digest(weights), 4)
    versions = run(e)["r"].weight_version
    assert 1 < versions.count(3) < 4 and versions == (3,) * versions.count(3) + (4,) * versions.count(4)
    done = run(e, request("a", prompt(9), temperature=0.0), request("b", prompt(40), max_tokens=20))
    assert done["a"].token_ids == greedy(prompt(9), 12, other)
    check(prompt(40), done["b"], other)


def test_a_block_that_is_not_finite_is_never_believed():
    model = policy()
    model.mtp[0].norm.weight[3] = float("nan")
    e = engine(model)
    done = run(e, request("r", prompt(4)), request("s", prompt(4), temperature=0.0))
    check(prompt(4), done["r"], model)
    assert done["s"].token_ids == greedy(prompt(4), 12, model)
    assert e.state().accepted_tokens == 0 < e.state().drafted_tokens


def test_a_block_with_compressed_entries_of_its_own_drafts_too():
    model = policy(replace(CONFIG, mtp_compress_ratios=(4,)), loudness=0.3)
    e = engine(model)
    requests = [request(f"r{n}", prompt(n, n), max_tokens=30) for n in (1, 6, 23)]
    done = run(e, *requests)
    for r in requests:
        check(r.prompt_ids, done[r.uid], model)
    assert e.state().accepted_tokens > 0


def test_a_model_without_a_block_is_refused():
    without = replace(CONFIG, num_nextn_predict_layers=0, mtp_compress_ratios=())
    with pytest.raises(ConfigError, match=r"has none .* set rollout\.speculative=false"):
        engine(initialize(Transformer(without), 0))
    e = engine(is_speculative=False)
    run(e, request("r", prompt(4)))
    assert (e.state().drafted_tokens, e.state().accepted_tokens) == (0, 0)
