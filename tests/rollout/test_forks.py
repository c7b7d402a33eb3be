"""Branches of a running or held stream: quick instructions that decode beside their parent."""

from dataclasses import replace

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.conf.errors import EngineError
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.engine import Fork, Prefix, Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)

EXACT = initialize(Transformer(CONFIG), 0)  # fp32
DRAFTING = initialize(Transformer(replace(CONFIG, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))), 0)
# What a quick instruction appends: a task token, or a few.
ACTION, QUERY, URL = (60,), (59,), (58, 3, 4, 57)


def engine(model=EXACT, max_rows=8, exact=True, **options):
    return NativeEngine(model, max_rows=max_rows, max_length=160, exact=exact, **options)


def request(uid, ids, max_tokens=24, **fields):
    return Request(uid, ids, SamplingParams(1.0, max_tokens, (), sum(map(ord, uid))), **fields)


def drain(e):
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
    return done


def alone(ids, branch, model=EXACT, exact=True):
    """What the branch samples as a request of its own, with the whole stream as its prompt."""
    e = engine(model, exact=exact)
    e.submit([replace(branch, prompt_ids=(*ids, *branch.prompt_ids))])
    return drain(e)[branch.uid]


PARENTS = [request("p", prompt(17)), request("other", prompt(30, 1))]
BRANCHES = [request("action", ACTION, 9), request("query", QUERY, 40), request("url", URL, 5)]


@pytest.mark.parametrize("steps", [1, 6, 12])
def test_branches_of_a_running_stream_leave_it_as_it_was_and_sample_what_they_would_alone(steps):
    e = engine()
    e.submit(PARENTS)
    undisturbed = drain(e)
    e = engine()
    e.submit(PARENTS)
    for _ in range(steps):
        e.step()
    forks = e.fork("p", BRANCHES)
    assert forks == [Fork(b.uid, "p", 17 + steps + 1) for b in BRANCHES]
    before = e.state().prefill_tokens
    done = {c.uid: c for c in e.step()}
    state = e.state()
    # One prefill of the parent's last token and the instruction each; all run beside the parents.
    assert state.prefill_tokens - before == sum(1 + len(b.prompt_ids) for b in BRANCHES)
    assert state.num_running == 5 and not done
    done = drain(e)
    assert {uid: done[uid] for uid in ("p", "other")} == undisturbed
    stream = PARENTS[0].prompt_ids + undisturbed["p"].token_ids[: steps + 1]
    for branch in BRANCHES:
        assert done[branch.uid] == alone(stream, branch)


def test_a_prompt_is_computed_once_and_its_instructions_and_answer_decode_in_parallel():
    """Task tokens stand right behind the user's text, the answer behind a few tokens more (report 5.1.2)."""
    e, text, hand_over = engine(), prompt(33), (7, 8)
    e.submit([request("text", text, 0, hold=True)])
    (done,) = e.step()
    assert (done.token_ids, done.finish) == ((), "length") and e.state().num_held == 1
    assert e.state().prefill_tokens == 32 and e.new_tokens().uids == []
    assert e.fork("text", BRANCHES)[0] == Fork("action", "text", 33)
    answer = request("answer", hand_over, parent="text")
    e.submit([answer])
    found = drain(e)
    for branch in (*BRANCHES, replace(answer, parent=None)):
        assert found[branch.uid] == alone(text, branch)
    assert e.state().prefill_tokens == 32 + sum(1 + len(b.prompt_ids) for b in (*BRANCHES, answer))


def test_branches_of_a_held_stream_and_of_a_branch_and_the_stream_goes_on():
    e = engine()
    e.submit([request("p", prompt(17), 10, hold=True)])
    turn = drain(e)["p"]
    stream = prompt(17) + turn.token_ids
    title = request("title", ACTION, 8, hold=True)
    e.fork("p", [title])
    e.fork("p", [request("again", QUERY, 8)])
    found = drain(e)
    assert found["title"] == alone(stream, replace(title, hold=False))
    assert found["again"] == alone(stream, request("again", QUERY, 8))
    deeper = request("deeper", URL, 6)
    e.fork("title", [deeper])
    more = request("more", prompt(5, 5), 12, parent="p")
    e.submit([more])
    found |= drain(e)
    assert found["deeper"] == alone((*stream, *ACTION, *found["title"].token_ids), deeper)
    assert found["more"] == alone(stream, replace(more, parent=None))
    e.release(["title"])
    assert e.state().num_held == 0 and e._state.pool.holders.count(0) == len(e._state.pool.holders)


def test_a_parent_that_ends_first_takes_nothing_from_its_branches():
    e = engine()
    e.submit([request("p", prompt(17), 3)])
    e.step()
    e.fork("p", BRANCHES)
    done = drain(e)
    for branch in BRANCHES:
        assert done[branch.uid] == alone(prompt(17) + done["p"].token_ids[:2], branch)


def test_in_fast_mode_too_the_tokens_are_those_of_the_stream():
    model = policy()
    e = engine(model, exact=False)
    e.submit(PARENTS)
    undisturbed = drain(e)
    e.submit(PARENTS)
    e.step()
    e.fork("p", BRANCHES)
    done = drain(e)
    stream = PARENTS[0].prompt_ids + undisturbed["p"].token_ids[:2]
    expected = {b.uid: alone(stream, b, model, exact=False) for b in BRANCHES} | undisturbed
    assert {uid: c.token_ids for uid, c in done.items()} == {uid: c.token_ids for uid, c in expected.items()}


def test_a_drafting_engine_forks_too():
    model = DRAFTING.double()
    e = engine(model, exact=False, speculative=True)
    e.submit(PARENTS)
    undisturbed = drain(e)
    e.submit(PARENTS)
    e.step()
    e.step()
    (fork, *_) = e.fork("p", BRANCHES[:2])
    done = drain(e)
    assert all(done[uid].token_ids == undisturbed[uid].token_ids for uid in ("p", "other"))
    stream = (PARENTS[0].prompt_ids + undisturbed["p"].token_ids)[: fork.num_tokens]
    for branch in BRANCHES[:2]:
        lone = engine(model, exact=False, speculative=True)
        lone.submit([replace(branch, prompt_ids=(*stream, *branch.prompt_ids))])
        assert drain(lone)[branch.uid].token_ids == done[branch.uid].token_ids


@pytest.mark.parametrize(
    ("parent", "branches", "message"),
    [
        ("nobody", BRANCHES, "nobody neither runs nor is held"),
        ("p", [request("p", ACTION)], "p is already in the engine"),
        ("p", [BRANCHES[0], BRANCHES[0]], "action is already in the engine"),
        ("p", [replace(BRANCHES[0], parent="other")], "branch action of p continues other"),
        ("p", [replace(BRANCHES[0], prefix=Prefix((1,), (0.0,), (0,)))], "no parent"),
        ("p", [request("x", (61,))], "the model has 0 to 60"),
        ("p", [request("x", ())], "empty prompt"),
        ("p", [request("x", prompt(150))], "the engine holds 160"),
        ("p", [request("x", ACTION, 0, hold=True)], "asks for no tokens"),
        ("p", [request(f"x{n}", ACTION) for n in range(7)], "7 branches of p: 6 rows are free"),
    ],
)
def test_forks_that_cannot_be_are_refused_and_change_nothing(parent, branches, message):
    e = engine()
    e.submit(PARENTS)
    e.step()
    before = e.state()
    with pytest.raises(EngineError, match=message):
        e.fork(parent, branches)
    assert replace(e.state(), prefill_s=0, decode_s=0) == replace(before, prefill_s=0, decode_s=0)
    e.fork("p", BRANCHES)
    assert len(drain(e)) == 5
