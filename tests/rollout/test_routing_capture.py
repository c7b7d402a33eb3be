"""The experts that an engine records are those of one full forward of the finished stream, however it was
decoded: in groups, behind a shared prefix, over turns, after a death, with drafts, in buckets, compiled."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.model.initialize import initialize
from consilience.model.routing import Routing
from consilience.model.transformer import Transformer
from consilience.rollout import captured_decode
from consilience.rollout.captured_decode import Decoder
from consilience.rollout.engine import Prefix, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prefill import MIN_SHARED_PREFIX

torch.set_num_threads(1)

MODEL = policy()  # fp64: no two scores are near enough for rounding to choose


def engine(model=MODEL, **options):
    given = {"max_rows": 6, "max_length": 96, "records_routing": True} | options
    return NativeEngine(model, **given)


def request(uid, ids, max_tokens=9, **options):
    return Request(uid, ids, SamplingParams(1.0, max_tokens, (), sum(map(ord, uid))), **options)


def run(e, *requests):
    e.submit(requests)
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


@torch.no_grad()
def experts_of(model, ids):
    """[n, L, K] of one forward over a whole stream."""
    routing = Routing()
    model.hidden(torch.tensor([ids]), routing=routing)
    return torch.stack([routing.experts[layer] for layer in sorted(routing.experts)], 1)


def check(completed, before, model=MODEL):
    """Experts of all tokens but the last, which is not fed; `before` = ids before the first one sampled."""
    ids = (*before, *completed.token_ids)
    found = torch.from_numpy(completed.routing.experts())
    assert completed.routing.layers == tuple(range(CONFIG.num_hash_layers, CONFIG.num_hidden_layers))
    assert found.shape[0] <= len(ids) - 1
    assert torch.equal(found, experts_of(model, ids)[len(ids) - 1 - len(found) : -1])
    return len(ids) - 1 - len(found)


def test_prompts_of_all_lengths_groups_and_shared_prefixes():
    shared = prompt(MIN_SHARED_PREFIX + 3)
    prompts = {"a": prompt(1), "b": prompt(13, 1), "c": (*shared, 5), "d": (*shared, 7, 9)}
    requests = [request(u, p) for u, p in prompts.items() if u in "ab"]
    requests += [request(f"b{i}", prompts["b"], group="b", max_tokens=5 + i) for i in range(3)]
    requests += [request("one", prompt(4, 2), max_tokens=1)]
    done = run(engine(), *requests)
    assert [check(done[r.uid], r.prompt_ids) for r in requests] == [0] * 6
    e = engine()
    for _ in range(2):  # the second time the prefix lies there already
        done = run(e, request("c", prompts["c"]), request("d", prompts["d"]))
        assert e._prefill.shared and [check(done[u], prompts[u]) for u in "cd"] == [0, 0]


def test_turns_hand_out_what_each_of_them_fed():
    e, first = engine(), prompt(10, 3)
    before = (*first, *run(e, request("t#0", first, hold=True))["t#0"].token_ids)
    observation = prompt(6, 4)
    done = run(e, request("t#1", observation, parent="t#0"), request("other", prompt(3)))
    # The last token of the turn before is fed first.
    assert check(done["t#1"], before + observation) == len(before) - 1
    assert check(done["other"], prompt(3)) == 0


def test_a_prefix_that_another_engine_sampled_is_recorded_again_as_it_is_fed():
    ids = prompt(11, 5)
    whole = run(engine(), request("p", ids, max_tokens=12))["p"]
    begun = Prefix(whole.token_ids[:5], whole.logprobs[:5], whole.weight_version[:5])
    again = run(engine(), request("p", ids, max_tokens=12, prefix=begun))["p"]
    assert again.token_ids == whole.token_ids and again.routing == whole.routing
    assert check(again, ids) == 0


def test_drafts_that_fell_leave_no_trace():
    config = replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))
    model = initialize(Transformer(config), 0).double()
    with torch.no_grad():
        model.head.weight.mul_(3.0)
    e = engine(model, speculative=True)
    requests = [request(f"s{i}", prompt(3 + 5 * i, i), max_tokens=20 - i) for i in range(4)]
    done = run(e, *requests)
    assert 0 < e.state().accepted_tokens < e.state().drafted_tokens
    assert [check(done[r.uid], r.prompt_ids, model) for r in requests] == [0] * 4


def test_buckets_with_idle_rows_record_the_same(monkeypatch):
    monkeypatch.setattr(captured_decode, "runs_without_host", lambda model: True)
    monkeypatch.setattr(Decoder, "_capture", lambda decoder, work: work)
    requests = [request(f"r{i}", prompt(3 + 4 * i, i), max_tokens=6 + i) for i in range(5)]
    done = run(engine(), *requests)
    assert [check(done[r.uid], r.prompt_ids) for r in requests] == [0] * 5


def test_the_compiled_step_records_what_it_chose():
    """In fp32; the two forwards' scores differ by 1e-6, and none here are so near each other."""
    model = policy().float()
    done = run(engine(model), *(request(f"f{i}", prompt(2 + i, i)) for i in range(6)))
    for i in range(6):
        assert check(done[f"f{i}"], prompt(2 + i, i), model) == 0


def test_recording_changes_no_token_and_no_bit_of_a_log_probability():
    model = policy().float()
    requests = [request(f"f{i}", prompt(2 + i, i), max_tokens=20) for i in range(6)]
    with_it, without = run(engine(model), *requests), run(engine(model, records_routing=False), *requests)
    assert {u: replace(c, routing=None) for u, c in with_it.items()} == without


@pytest.mark.parametrize(("num_experts", "size"), [(4, 2 * 2), (300, 2 * 2 * 2)])
def test_a_token_takes_a_byte_or_two_for_each_expert_of_a_learned_layer(num_experts, size):
    model = initialize(Transformer(replace(CONFIG, n_routed_experts=num_experts)), 0).double()
    done = run(engine(model), request("n", prompt(5), max_tokens=3))["n"]
    assert done.routing.bytes_per_token == size and done.routing.num_tokens == 5 + 3 - 1
    assert check(done, prompt(5), model) == 0
