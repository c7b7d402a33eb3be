"""Going on from what a request had sampled: the tokens and log-probabilities of an undisturbed run."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.conf.errors import EngineError
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Prefix, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)

MODEL = policy()


def engine(model=MODEL, max_rows=8, max_length=160, **options):
    return NativeEngine(model, max_rows=max_rows, max_length=max_length, **options)


def request(uid, ids, max_tokens=24, seed=None, **fields):
    seed = sum(map(ord, uid)) if seed is None else seed
    return Request(uid, ids, SamplingParams(1.0, max_tokens, fields.pop("stop_ids", ()), seed), **fields)


def drain(e):
    """uid -> Completed, and uid -> the tokens that `new_tokens` told of, step by step."""
    done, told = {}, {}
    while e.state().num_running + e.state().num_waiting:
        completed = e.step()
        new = e.new_tokens()
        for uid, position, token, logprob in zip(new.uids, new.positions, new.token_ids, new.logprobs):
            mine = told.setdefault(uid, [])
            mine.append((position, token, logprob))
        done |= {c.uid: c for c in completed}
    return done, told


def cut(completed, count):
    return Prefix(completed.token_ids[:count], completed.logprobs[:count], completed.weight_version[:count])


REQUESTS = [
    *(request(f"m{i}", prompt(21), group="g") for i in range(3)),
    *(request(f"o{n}", prompt(n, n)) for n in (1, 7, 13, 40)),
]


def test_new_tokens_tell_every_token_once_and_in_order():
    e = engine()
    e.submit(REQUESTS)
    done, told = drain(e)
    for uid, completed in done.items():
        assert [t[0] for t in told[uid]] == list(range(24))
        assert tuple(t[1] for t in told[uid]) == completed.token_ids
        assert tuple(t[2] for t in told[uid]) == completed.logprobs
    assert e.step() == [] and e.new_tokens().uids == []


@pytest.mark.parametrize("counts", [(1, 1, 1, 1, 1, 1, 1), (5, 0, 23, 1, 24, 12, 3), (8, 9, 10, 11, 4, 5, 6)])
def test_a_request_goes_on_from_its_prefix_with_the_tokens_it_would_have_had(counts):
    e = engine()
    e.submit(REQUESTS)
    undisturbed, _ = drain(e)
    again = engine()
    again.submit(
        [replace(r, prefix=cut(undisturbed[r.uid], n) if n else None) for r, n in zip(REQUESTS, counts)]
    )
    found, told = drain(again)
    for r, n in zip(REQUESTS, counts):
        one, two = undisturbed[r.uid], found[r.uid]
        assert two.token_ids == one.token_ids and two.finish == one.finish == "length"
        assert two.logprobs[:n] == one.logprobs[:n]
        # fp64 computed in another order: far below the fp32 in which log-probabilities are handed out.
        assert torch.tensor(two.logprobs).sub(torch.tensor(one.logprobs)).abs().max() < 2e-6
        assert [t[0] for t in told.get(r.uid, [])] == list(range(n, 24))  # nothing is told twice
    assert again.state().sampled_tokens == sum(24 - n for n in counts)


def test_in_exact_mode_and_fp32_the_log_probabilities_are_the_same_bits():
    model = initialize(Transformer(CONFIG), 0)
    e = engine(model, exact=True)
    e.submit(REQUESTS)
    undisturbed, _ = drain(e)
    again = engine(model, exact=True)
    again.submit([replace(r, prefix=cut(undisturbed[r.uid], 3 + i)) for i, r in enumerate(REQUESTS)])
    found, _ = drain(again)
    assert found == undisturbed


def test_weight_versions_of_the_prefix_stay_and_new_tokens_have_the_new_one():
    e = engine()
    e.submit(REQUESTS[:1])
    undisturbed, _ = drain(e)
    again = engine(version=7)
    again.submit([replace(REQUESTS[0], prefix=cut(undisturbed["m0"], 10))])
    found, _ = drain(again)
    assert found["m0"].weight_version == (0,) * 10 + (7,) * 14


def test_a_complete_prefix_completes_at_once_and_can_be_held_and_continued():
    e = engine()
    first = request("t", prompt(9), max_tokens=10, hold=True)
    e.submit([first])
    whole, _ = drain(e)
    more = request("u", prompt(5, 5), parent="t", seed=4)
    e.submit([more])
    continued, _ = drain(e)
    again = engine()
    again.submit([replace(first, prefix=cut(whole["t"], 10))])
    found = again.step()
    assert found == [whole["t"]] and again.new_tokens().uids == [] and again.state().num_held == 1
    again.submit([more])
    assert drain(again)[0]["u"].token_ids == continued["u"].token_ids


def test_a_stop_id_at_the_end_of_the_prefix_stops():
    e = engine()
    e.submit([request("s", prompt(9))])
    whole, _ = drain(e)
    token = whole["s"].token_ids[4]
    again = engine()
    first = whole["s"].token_ids.index(token)
    again.submit([request("s", prompt(9), stop_ids=(token,), prefix=cut(whole["s"], first + 1))])
    (done,) = again.step()
    assert done.finish == "stop" and done.token_ids == whole["s"].token_ids[: first + 1]


def test_more_begun_requests_than_rows_wait_their_turn():
    e = engine()
    e.submit(REQUESTS)
    undisturbed, _ = drain(e)
    small = engine(max_rows=2, prefill_tokens=40)
    small.submit([replace(r, prefix=cut(undisturbed[r.uid], 6)) for r in REQUESTS])
    found, _ = drain(small)
    assert {u: c.token_ids for u, c in found.items()} == {u: c.token_ids for u, c in undisturbed.items()}


@pytest.mark.parametrize(
    "prefix, message",
    [
        (Prefix((), (), ()), "goes on from 0 tokens"),
        (Prefix((1,) * 25, (0.0,) * 25, (0,) * 25), "goes on from 25 tokens"),
        (Prefix((61,), (0.0,), (0,)), "the model has 0 to 60"),
        (Prefix((1, 2), (0.0,), (0, 0)), "1 log-probabilities"),
    ],
)
def test_a_prefix_that_cannot_be_one_is_refused(prefix, message):
    with pytest.raises(EngineError, match=message):
        engine().submit([request("r", prompt(5), prefix=prefix)])


def test_a_prefix_with_a_parent_is_refused():
    e = engine()
    e.submit([request("t", prompt(9), max_tokens=3, hold=True)])
    drain(e)
    with pytest.raises(EngineError, match="no parent"):
        e.submit([request("u", prompt(5), parent="t", prefix=Prefix((1,), (0.0,), (0,)))])


@pytest.fixture(scope="module")
def drafting():
    """A policy with a prediction block, whose drafts stand now and then."""
    model = initialize(Transformer(replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))), 0)
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    return model.double()


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_speculative_decoding_goes_on_at_a_round_s_end_as_if_undisturbed(drafting, steps):
    whole = engine(drafting, speculative=True)
    whole.submit(REQUESTS[2:6])
    undisturbed, _ = drain(whole)
    dies = engine(drafting, speculative=True)
    dies.submit(REQUESTS[2:6])
    told = {r.uid: 0 for r in REQUESTS[2:6]}
    for _ in range(steps):
        dies.step()
        for uid in dies.new_tokens().uids:
            told[uid] += 1
    again = engine(drafting, speculative=True)
    again.submit([replace(r, prefix=cut(undisturbed[r.uid], told[r.uid])) for r in REQUESTS[2:6]])
    found, _ = drain(again)
    assert {u: c.token_ids for u, c in found.items()} == {u: c.token_ids for u, c in undisturbed.items()}
    assert whole.state().accepted_tokens > 0
