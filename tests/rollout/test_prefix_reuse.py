"""An engine with a prefix store: what a hit gives is what a cold prefill computes, to the bit."""

import os
from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, prompt

from consilience.conf.errors import ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.initialize import initialize
from consilience.model.prefix_state import block_of, rest_of
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.prefix_reuse import WINDOWS, PrefixCaching

torch.set_num_threads(1)

# fp32: only exact mode gives the same bits. Blocks hold 12 tokens; windows come back from 21.
MODEL = initialize(Transformer(CONFIG), 0)


def engine(folder=None, window="whole", *, period=24, max_rows=8, exact=True, model=MODEL, **options):
    prefixes = folder and PrefixCaching(folder, window, period, options.pop("limit_bytes", 1 << 30))
    return NativeEngine(model, max_rows=max_rows, max_length=160, exact=exact, prefixes=prefixes, **options)


def request(uid, ids, max_tokens=10, **fields):
    return Request(uid, ids, SamplingParams(1.0, max_tokens, (), sum(map(ord, uid))), **fields)


def run(e, *requests):
    e.submit(requests)
    return drain(e)


def drain(e):
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


def counts(e):
    state = e.state()
    return state.prefix_hits, state.prefix_misses, state.prefix_tokens


def held_state(e, uid):
    """Live content of a held stream's state."""
    slot, _ = e._parked.held[uid]
    state = e._state
    pieces = [block_of(state, slot, n) for n in range(int(state.position[slot]) // 12)]
    return [*pieces, rest_of(state, slot)]


def same(one, two):
    return len(one) == len(two) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(one, two)
    )


REQUESTS = [
    *(request(f"m{i}", prompt(50), group="g", hold=True) for i in range(2)),
    request("same", prompt(50)[:41] + prompt(30, 5), hold=True),
    *(request(f"o{n}", prompt(n, n), hold=True) for n in (1, 11, 12, 13, 37, 74)),
]


@pytest.fixture(scope="module")
def cold():
    e = engine(max_rows=len(REQUESTS))
    return e, run(e, *REQUESTS)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_hit_equals_a_cold_prefill_bit_for_bit_in_tokens_logprobs_and_state(window, cold, tmp_path):
    bare, expected = cold
    first = engine(tmp_path, window, max_rows=len(REQUESTS))
    assert run(first, *REQUESTS) == expected and counts(first)[0] == 0
    again = engine(tmp_path, window, max_rows=len(REQUESTS), prefill_tokens=8)  # one prompt a prefill
    assert run(again, *REQUESTS) == expected
    for r in REQUESTS:
        assert same(held_state(again, r.uid), held_state(bare, r.uid)), r.uid
        assert same(held_state(first, r.uid), held_state(bare, r.uid)), r.uid
    # Borders at or below the length less one: o13 12, o37 36, m 48, o74 72, same 60 (and 36 of it are m's).
    tokens = {
        "whole": 12 + 36 + 2 * 48 + 72 + 60,
        "checkpointed": 24 + 2 * 48 + 72 + 48,  # every 24
        "recomputed": (36 - 21) + 2 * (48 - 21) + (72 - 21) + (60 - 21),
    }
    assert counts(again)[2] == tokens[window]
    fed = sum(len(r.prompt_ids) for r in REQUESTS)
    assert again.state().prefill_tokens == fed - counts(again)[2]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_batch_that_shares_a_prefix_is_found_too(window, tmp_path):
    ids = [prompt(45) + prompt(20, n) for n in range(1, 4)]
    requests = [request(f"r{n}", each) for n, each in enumerate(ids)]
    expected = run(engine(), *requests)
    assert run(engine(tmp_path, window), *requests) == expected
    again = engine(tmp_path, window)
    assert run(again, *requests) == expected
    # The shared prefix, then each rest; 21 tokens before 60 are not worth it where there are 45.
    assert counts(again)[0] == (1 if window == "recomputed" else 4)


def test_a_longer_prompt_goes_on_where_a_shorter_one_was_stored(tmp_path):
    short, long = prompt(30), prompt(30) + prompt(40, 1)
    run(engine(tmp_path), request("a", short))
    e = engine(tmp_path)
    assert run(e, request("b", long)) == run(engine(), request("b", long))
    assert counts(e) == (1, 0, 24)
    other = engine(tmp_path)
    run(other, request("c", ((short[0] + 1) % 61, *short[1:])))
    assert counts(other) == (0, 1, 0)


@pytest.mark.parametrize("what", ["weights", "exact", "model", "quantization"])
def test_states_of_other_weights_or_another_arithmetic_are_not_found(what, tmp_path):
    ids = prompt(30)
    run(engine(tmp_path), request("a", ids))
    model = MODEL
    if what == "weights":
        model = initialize(Transformer(CONFIG), 1)
    if what == "model":
        model = initialize(Transformer(replace(CONFIG, index_topk=5)), 0)
    if what == "quantization":
        from consilience.model.quantization import Quantization

        model = initialize(Transformer(CONFIG), 0)
        model.quantize(Quantization(experts=False, index_scores=True))
    e = engine(tmp_path, exact=what != "exact", model=model)
    run(e, request("a", ids))
    assert counts(e) == (0, 1, 0)


def test_after_a_publication_only_states_of_the_new_weights_are_found(tmp_path):
    ids, first, second = prompt(30), initialize(Transformer(CONFIG), 0), initialize(Transformer(CONFIG), 1)
    e = engine(tmp_path, model=first)
    run(e, request("a", ids))
    weights = {name: t.clone() for name, t in to_official(second).items()}
    e.publish(weights, weights_digest(weights), 1)
    assert counts(e) == (0, 1, 0)
    found = run(e, request("b", ids))
    assert counts(e) == (0, 2, 0)
    assert found["b"].token_ids == run(engine(model=second), request("b", ids))["b"].token_ids
    run(e, request("c", ids))
    assert counts(e) == (1, 2, 24)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_damaged_entry_is_a_shorter_hit_that_is_counted_and_replaced(window, tmp_path):
    ids = prompt(100)
    expected = run(engine(), request("a", ids))
    run(engine(tmp_path, window), request("a", ids))
    probe = engine(tmp_path, window)
    victim = probe._reuse.store._path(f"{probe._reuse._keys.of_blocks(ids)[5]}.block")
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    e = engine(tmp_path, window)
    assert run(e, request("a", ids)) == expected
    assert e.state().prefix_corrupted == 1 and victim.exists()  # written again
    # Five blocks are left: 60 tokens, two periods, or 60 less 21.
    assert counts(e) == (1, 0, {"whole": 60, "checkpointed": 48, "recomputed": 39}[window])
    whole = engine(tmp_path, window)
    assert run(whole, request("a", ids)) == expected and whole.state().prefix_corrupted == 0
    assert counts(whole)[2] == {"whole": 96, "checkpointed": 96, "recomputed": 75}[window]


def test_a_small_budget_evicts_and_the_tokens_stay_the_same(tmp_path):
    requests = [request(f"r{n}", prompt(60, n)) for n in range(6)]
    expected = run(engine(), *requests)
    for _ in range(2):
        e = engine(tmp_path, limit_bytes=30_000)
        assert run(e, *requests) == expected
        assert e._reuse.store.num_bytes() <= 30_000 and e._reuse.store.num_evicted > 0


def test_without_a_store_nothing_is_counted():
    e = engine()
    run(e, request("a", prompt(30)))
    assert counts(e) == (0, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "half"}, "window is 'half'; allowed: whole, checkpointed, recomputed"),
        ({"window": "checkpointed", "period": 30}, "blocks have 12, so a multiple of 12"),
        ({"window": "checkpointed", "period": 0}, "every 0 tokens"),
    ],
)
def test_policies_that_are_none_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        engine(tmp_path, **options)


def test_a_drafting_engine_has_no_store(tmp_path):
    model = initialize(Transformer(replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))), 0)
    with pytest.raises(ConfigError, match=r"rollout\.speculative=false"):
        engine(tmp_path, model=model, speculative=True)


def test_in_fast_mode_a_hit_is_the_cold_prefill_up_to_rounding(tmp_path):
    model = initialize(Transformer(CONFIG), 0).double()
    requests = [request(f"r{n}", prompt(n, n)) for n in (13, 37, 74)]
    expected = run(engine(exact=False, model=model), *requests)
    for window in WINDOWS:
        for _ in range(2):
            e = engine(tmp_path / window, window, exact=False, model=model)
            found = run(e, *requests)
            assert {u: c.token_ids for u, c in found.items()} == {u: c.token_ids for u, c in expected.items()}
            for uid, one in expected.items():
                # fp64 computed in another order, handed out in fp32.
                gap = torch.tensor(found[uid].logprobs).sub(torch.tensor(one.logprobs)).abs().max()
                assert gap < 2e-6
        assert counts(e)[0] >= 2


def test_another_process_uses_the_same_folder(tmp_path):
    run(engine(tmp_path), request("a", prompt(60)))
    child = os.fork()
    if child == 0:
        e = engine(tmp_path)
        run(e, request("b", prompt(60)))
        os._exit(0 if counts(e) == (1, 0, 48) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_recorded_routing_is_that_of_the_newest_tokens_whatever_came_from_the_store(tmp_path):
    """Shared prefixes, borders and hits leave no gap inside what a stream is said to have been fed."""
    shared = [request(f"r{n}", prompt(45) + prompt(20, n)) for n in range(1, 4)]

    def routing(e):
        done = run(e, *shared) | run(e, request("s", prompt(30, 8)))
        return {uid: c.routing.experts() for uid, c in done.items()}

    lengths, whole = [], routing(engine(records_routing=True))
    for _ in range(2):
        for uid, experts in routing(engine(tmp_path, records_routing=True)).items():
            assert (experts == whole[uid][len(whole[uid]) - len(experts) :]).all()
            lengths.append(len(experts))
    # First everything: 65 + 9 tokens, 30 + 9. Then 60 of these and 24 of those came from the store.
    assert lengths == [74, 74, 74, 39, 14, 14, 14, 15]
