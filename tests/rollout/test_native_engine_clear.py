"""New weights under running requests: their state is kept, or computed again as if always theirs."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)


def engine(seed=0, **options):
    return NativeEngine(policy(seed), max_rows=8, max_length=160, **options)


def request(uid, ids, max_tokens=24, **fields):
    return Request(uid, ids, SamplingParams(1.0, max_tokens, (), sum(map(ord, uid))), **fields)


REQUESTS = [
    *(request(f"m{i}", prompt(21), group="g") for i in range(3)),
    *(request(f"o{n}", prompt(n, n)) for n in (1, 7, 13, 40)),
]


def drain(e):
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


def publish(e, model, version):
    weights = to_official(model)
    e.publish(weights, weights_digest(weights), version)


@torch.no_grad()
def scored(model, ids, count):
    """[count] log-probabilities of the last tokens of `ids`, all of them by one model."""
    logits = model.head(model.hidden(torch.tensor([ids])))[0]
    places = torch.arange(len(ids) - count - 1, len(ids) - 1)
    return torch.log_softmax(logits.double(), -1)[places, ids[-count:]]


def test_cleared_requests_go_on_as_if_nothing_had_been():
    e, undisturbed = engine(), engine()
    for each in (e, undisturbed):
        each.submit(REQUESTS)
    for _ in range(9):
        e.step()
        if e.state().num_running > 4:
            unfinished, held = e.clear()
            assert held == [] and (e.state().num_running, e.state().num_waiting) == (0, 0)
            e.submit(unfinished)
    done, expected = drain(e), drain(undisturbed)
    assert {uid: c.token_ids for uid, c in done.items()} == {uid: c.token_ids for uid, c in expected.items()}
    for uid, completed in expected.items():  # fp64, and a prefill adds up in another order than decoding
        torch.testing.assert_close(
            torch.tensor(done[uid].logprobs), torch.tensor(completed.logprobs), rtol=0, atol=1e-5
        )


def test_clearing_forgets_held_and_waiting_streams_and_gives_their_rows_back():
    e = engine()
    e.submit([replace(request(f"h{i}", prompt(9, i), 3), hold=True) for i in range(5)])
    drain(e)
    e.submit([request("next", (4, 5), parent="h0"), *(request(f"w{i}", prompt(30, i)) for i in range(9))])
    unfinished, held = e.clear()
    assert held == ["h1", "h2", "h3", "h4"] and e.state().num_held == 0
    assert [r.uid for r in unfinished] == ["next", *(f"w{i}" for i in range(9))]
    assert unfinished[0].parent == "h0"
    e.submit([*(request(f"h{i}", prompt(40, i)) for i in range(8)), *unfinished[1:]])
    assert len(drain(e)) == 17 and e.state().num_held == 0


@pytest.mark.parametrize("recompute", [False, True])
def test_after_new_weights_the_log_probabilities_are_those_weights_own_where_the_state_was_recomputed(
    recompute,
):
    """A token's log-probability against a forward pass of its version's weights over all that came before."""
    models = [policy(0), policy(1)]
    e = engine(0)
    e.submit(REQUESTS)
    for _ in range(8):
        e.step()
    publish(e, models[1], 1)
    if recompute:
        e.submit(e.clear()[0])
    done = drain(e)
    worst = 0.0
    for r in REQUESTS:
        completed = done[r.uid]
        before = completed.weight_version.index(1)
        assert 0 < before < 24 and completed.weight_version == (0,) * before + (1,) * (24 - before)
        ids = [*r.prompt_ids, *completed.token_ids]
        first = scored(models[0], ids[: len(r.prompt_ids) + before], before)
        torch.testing.assert_close(
            torch.tensor(completed.logprobs[:before]).double(), first, rtol=0, atol=1e-5
        )
        later = torch.tensor(completed.logprobs[before:]).double() - scored(models[1], ids, 24 - before)
        worst = max(worst, float(later.abs().max()))
    assert worst < 1e-5 if recompute else worst > 1e-2  # 1e-5: log-probabilities are handed out in fp32


def test_clearing_works_with_drafts_ahead():
    from consilience.model.initialize import initialize
    from consilience.model.transformer import Transformer

    config = replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))
    model = initialize(Transformer(config), 0).double()
    e, undisturbed = (NativeEngine(model, max_rows=8, max_length=160, speculative=True) for _ in range(2))
    for each in (e, undisturbed):
        each.submit(REQUESTS)
    for _ in range(4):
        e.step()
    e.submit(e.clear()[0])
    done, expected = drain(e), drain(undisturbed)
    assert {uid: len(c.token_ids) for uid, c in done.items()} == {
        u: len(c.token_ids) for u, c in expected.items()
    }
    assert e.state().num_running == e.state().num_waiting == 0
