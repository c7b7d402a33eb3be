"""The native engine against the full forward of the same model: tokens, log-probs, forks, turns, errors."""

from dataclasses import replace

import pytest
import torch
from native_oracle import MODEL, check, drain, engine, greedy, logprobs_of, request, run
from small_policy import CONFIG, policy, prompt

from consilience.conf.errors import EngineError
from consilience.model.transformer import Transformer
from consilience.rollout.prefill import MIN_SHARED_PREFIX

torch.set_num_threads(1)


def test_greedy_tokens_and_their_logprobs_equal_those_of_the_full_forward():
    prompts = {f"r{n}": prompt(n, n) for n in (1, 2, 7, 8, 13, 40)}
    done = run(engine(), *(request(u, p, temperature=0.0, max_tokens=13) for u, p in prompts.items()))
    for uid, ids in prompts.items():
        assert done[uid].token_ids == greedy(MODEL, ids, 13), uid
        assert done[uid].finish == "length"
        check(MODEL, ids, done[uid])


def test_in_fp32_logprobs_are_those_of_the_full_forward_to_1e_5():
    model = policy(gain=1.0).float()
    members = [request(f"m{i}", prompt(40), group="g", max_tokens=30) for i in range(3)]
    others = [request(f"o{n}", prompt(n, n), max_tokens=30) for n in (1, 5, 12, 23)]
    done = run(engine(model), *members, *others)
    for r in (*members, *others):
        check(model, r.prompt_ids, done[r.uid], bound=1e-5)


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_sampled_logprobs_are_those_of_the_tempered_distribution(temperature):
    done = run(
        engine(), *(request(f"r{n}", prompt(n), temperature=temperature, max_tokens=20) for n in (3, 11, 30))
    )
    for n in (3, 11, 30):
        check(MODEL, prompt(n), done[f"r{n}"], temperature)
    assert done["r3"].token_ids != greedy(MODEL, prompt(3), 20)


def test_samples_follow_the_model_s_distribution():
    with torch.no_grad():
        p = MODEL(torch.tensor([prompt(5)]))[0, -1].softmax(-1)
    requests = [request(f"r{i}", prompt(5), group="g", max_tokens=1, seed=i) for i in range(1500)]
    done = run(engine(max_rows=300), *requests)
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in done.values()]), minlength=CONFIG.vocab_size
    )
    likely = p > 0.01
    # Each count lies within five standard deviations of its mean.
    assert ((counts - 1500 * p).abs()[likely] < 5 * (1500 * p * (1 - p)).sqrt()[likely]).all()


def test_equal_seeds_give_equal_tokens_whatever_the_batch_is():
    mine = request("mine", prompt(17), max_tokens=18, seed=5)
    alone = run(engine(), mine)["mine"]
    others = [request(f"o{n}", prompt(n, n), max_tokens=n) for n in (3, 9, 20)]
    crowd = run(engine(), *others[:2], mine, others[2])["mine"]
    late = engine(max_rows=2)
    late.submit(others[:2])
    late.step()
    late.submit([mine, others[2]])
    tokens = [alone.token_ids, crowd.token_ids, drain(late)["mine"].token_ids]
    assert tokens[0] == tokens[1] == tokens[2]
    assert (
        run(engine(), replace(mine, sampling=replace(mine.sampling, seed=6)))["mine"].token_ids
        != alone.token_ids
    )


def test_a_longer_limit_only_appends():
    short, long = (
        run(engine(), request("r", prompt(9), max_tokens=n, seed=3))["r"].token_ids for n in (5, 20)
    )
    assert long[:5] == short


def test_a_group_shares_one_prefill_and_equals_cold_prefills():
    members = [request(f"m{i}", prompt(21), group="g", max_tokens=10, seed=i) for i in range(5)]
    others = [request(f"x{i}", prompt(14, 2), group="h", max_tokens=10) for i in range(2)]
    e = engine()
    done = run(e, *members[:3], others[0], *members[3:], others[1])
    assert e.state().prefill_tokens == 21 + 14
    for member in (*members, *others):
        cold = engine()
        expected = run(cold, replace(member, group=None))[member.uid]
        assert done[member.uid].token_ids == expected.token_ids
        check(MODEL, member.prompt_ids, done[member.uid])
    assert len({done[m.uid].token_ids for m in members}) == 5


def test_one_group_name_with_two_prompts_is_two_prefills():
    e = engine()
    done = run(e, request("a", prompt(9), group="g"), request("b", prompt(9, 1), group="g"))
    assert e.state().prefill_tokens == 18
    check(MODEL, prompt(9), done["a"])
    check(MODEL, prompt(9, 1), done["b"])


def test_a_held_stream_goes_on_as_if_it_had_been_one():
    e = engine()
    streams = {f"s{n}": list(prompt(n, n)) for n in (4, 11, 19)}
    last: dict[str, str] = {}
    for turn in range(3):
        requests = []
        for name, ids in streams.items():
            observed = prompt(1 + 5 * turn, 50 + turn) if turn else tuple(ids)
            if turn:
                ids += observed
            uid = f"{name}#{turn}"
            requests.append(
                request(
                    uid,
                    observed,
                    parent=last.get(name),
                    hold=turn < 2,
                    temperature=float(turn % 2),
                    max_tokens=7,
                )
            )
            last[name] = uid
        noise = request(f"noise{turn}", prompt(6 + turn, 90), max_tokens=9)
        done = run(e, *requests, noise)
        for (name, ids), uid in zip(streams.items(), (r.uid for r in requests)):
            check(MODEL, ids, done[uid])
            if turn % 2 == 0:
                assert done[uid].token_ids == greedy(MODEL, ids, 7), name
            ids += done[uid].token_ids
    assert e.state().num_held == 0


def test_streams_wait_while_others_go_on_and_finish_in_any_order():
    e = engine(max_rows=4)
    e.submit(
        [
            request("a", prompt(9), hold=True, max_tokens=2, temperature=0.0),
            request("long", prompt(5), max_tokens=30),
        ]
    )
    first = {}
    while "a" not in first:
        first |= {c.uid: c for c in e.step()}
    state = e.state()
    assert (state.num_running, state.num_held, state.num_waiting) == (1, 1, 0)
    for _ in range(3):
        e.step()
    ids = prompt(9) + first["a"].token_ids + prompt(6, 3)
    done = run(e, request("b", prompt(6, 3), parent="a", temperature=0.0, max_tokens=6))
    assert done["b"].token_ids == greedy(MODEL, ids, 6)
    check(MODEL, prompt(5), done["long"])


@pytest.mark.parametrize("tail", [1, 9])
def test_a_shared_prefix_is_computed_once_and_changes_no_token(tail):
    shared = prompt(MIN_SHARED_PREFIX + 5)
    tails = [(i, *prompt(tail, i))[:tail] for i in range(3)]
    requests = [request(f"r{i}", shared + t, max_tokens=10) for i, t in enumerate(tails)]
    e = engine()
    done = run(e, *requests)
    assert e.state().prefill_tokens == len(shared) + 3 * tail
    for r in requests:
        assert done[r.uid].token_ids == run(engine(), r)[r.uid].token_ids
        check(MODEL, r.prompt_ids, done[r.uid])
    again = run(e, request("later", (*shared, 3), max_tokens=10))  # a lone prompt uses the cache too
    assert e.state().prefill_tokens == len(shared) + 3 * tail + 1
    check(MODEL, (*shared, 3), again["later"])
    cold = run(e, request("exact", shared, max_tokens=4))  # the prefix itself leaves nothing to extend: cold
    assert e.state().prefill_tokens == 2 * len(shared) + 3 * tail + 1
    check(MODEL, shared, cold["exact"])


@pytest.mark.parametrize(("max_rows", "prefill_tokens"), [(1, 8192), (3, 30), (64, 1)])
def test_more_requests_than_rows_queue_and_none_is_lost_or_changed(max_rows, prefill_tokens):
    requests = [
        request(f"r{i}", prompt(3 + 5 * (i % 4), i // 3), group=f"g{i // 3}", max_tokens=1 + 4 * (i % 3))
        for i in range(10)
    ]
    e = engine(max_rows=max_rows, prefill_tokens=prefill_tokens)
    e.submit(requests)
    assert e.state().num_waiting == 10
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid: c for c in e.step()}
        assert e.state().num_running <= max_rows
    assert len(done) == 10
    for r in requests:
        assert done[r.uid].finish == "length" and len(done[r.uid].token_ids) == r.sampling.max_tokens
        check(MODEL, r.prompt_ids, done[r.uid])
    assert e.state().sampled_tokens == sum(r.sampling.max_tokens for r in requests)


def test_held_streams_take_up_rows_until_continued_or_released():
    e = engine(max_rows=2)
    run(e, *(request(u, prompt(5), hold=True, max_tokens=2) for u in "ab"))
    e.submit([request("c", prompt(6))])
    assert e.step() == [] and e.state().num_waiting == 1
    e.release(["b", "unknown"])
    assert "c" in drain(e) and e.state().num_held == 1
    done = run(e, request("a2", prompt(3), parent="a"), request("d", prompt(4)))
    assert set(done) == {"a2", "d"} and e.state().num_held == 0


def test_many_turns_on_few_rows_stay_exact():
    e = engine(max_rows=3, prefill_tokens=25)
    streams = {i: list(prompt(6 + i, i)) for i in range(3)}
    e.submit([request(f"{i}#0", tuple(ids), hold=True, max_tokens=3 + i) for i, ids in streams.items()])
    turns, finished = dict.fromkeys(streams, 0), 0
    for _ in range(200):
        for c in e.step():
            i = int(c.uid[0])
            check(MODEL, streams[i], c)
            streams[i] += c.token_ids
            turns[i] += 1
            if turns[i] == 4:
                finished += 1
                continue
            observed = prompt(2 + turns[i] + i, 70 + turns[i])
            streams[i] += observed
            uid = f"{i}#{turns[i]}"
            e.submit([request(uid, observed, parent=c.uid, hold=turns[i] < 3, max_tokens=3 + i)])
    assert finished == 3 and e.state().num_held == 0


def test_a_stop_id_ends_a_turn_and_is_its_last_token():
    free = run(engine(), request("r", prompt(9), max_tokens=20, seed=4))["r"].token_ids
    stop = free[6]
    done = run(engine(), request("r", prompt(9), max_tokens=20, seed=4, stop_ids=(60, stop)))["r"]
    assert done.finish == "stop" and done.token_ids == free[: free.index(stop) + 1]
    at_the_limit = request("r", prompt(9), max_tokens=free.index(stop) + 1, seed=4, stop_ids=(stop,))
    assert run(engine(), at_the_limit)["r"].finish == "stop"


def test_one_token_turns_finish_with_their_prefill():
    e = engine(max_rows=2)
    e.submit([request(f"r{i}", prompt(4 + i), max_tokens=1) for i in range(5)])
    done = e.step()
    assert sorted(c.uid for c in done) == [f"r{i}" for i in range(5)]  # rows free up at once
    assert all(len(c.token_ids) == 1 and c.finish == "length" for c in done)
    assert e.state().num_running == e.state().num_waiting == 0 and e.step() == []


def test_a_stream_may_fill_the_engine_s_length_to_the_last_token():
    e = engine(max_length=40)
    done = run(e, request("r", prompt(30), max_tokens=10))["r"]
    assert len(done.token_ids) == 10
    check(MODEL, prompt(30), done)


def test_a_continuation_samples_as_far_as_its_stream_has_room():
    e = engine(max_length=40)
    first = run(e, request("a", prompt(20), hold=True, max_tokens=5))["a"]
    other = request("o", prompt(10), max_tokens=30)
    done = run(e, request("b", prompt(6, 1), parent="a", max_tokens=100, hold=True), other)
    assert len(done["b"].token_ids) == 40 - 31 and done["b"].finish == "length"
    assert len(done["o"].token_ids) == 30
    check(MODEL, prompt(20) + first.token_ids + prompt(6, 1), done["b"])
    with pytest.raises(EngineError, match="needs 42 tokens, the engine holds 40"):
        e.submit([request("c", prompt(1), parent="b")])
    assert e.state().num_held == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("x", ()), "empty prompt"),
        (request("x", prompt(4), max_tokens=0), "asks for no tokens"),
        (request("r0", prompt(4)), "already in the engine"),
        (request("held", prompt(4)), "already in the engine"),
        (request("good", prompt(4)), "already in the engine"),
        (request("x", prompt(4), parent="nobody"), "continues nobody, which is not held"),
        (request("x", prompt(4), parent="r0"), "continues r0, which is not held"),
        (request("x", prompt(4), parent="held"), "continues held, which is not held"),  # `good2` took it
        (request("x", prompt(155), max_tokens=6), "needs 161 tokens, the engine holds 160; raise"),
        (request("x", (3, CONFIG.vocab_size)), "token ids run from 3 to 61, the model has 0 to 60"),
        (request("x", (3, -1)), "token ids run from -1"),
        (request("x", prompt(4), temperature=float("nan")), "temperature nan"),
        (request("x", prompt(4), temperature=-1.0), "temperature -1.0"),
        (request("x", prompt(4), seed=-3), "seed -3"),
    ],
)
def test_a_request_that_cannot_run_is_refused_with_all_of_its_submission_and_hurts_nobody(bad, message):
    e = engine()
    run(e, request("held", prompt(5), hold=True, max_tokens=2))
    e.submit([request("r0", prompt(6))])
    e.step()
    with pytest.raises(EngineError, match=message):
        e.submit([request("good", prompt(3)), request("good2", prompt(3), parent="held"), bad])
    state = e.state()
    assert (state.num_waiting, state.num_running, state.num_held) == (0, 1, 1)
    done = run(e, request("good", prompt(3)), request("good2", prompt(3), parent="held"))
    assert set(done) == {"r0", "good", "good2"}
    check(MODEL, prompt(6), done["r0"])


def test_releasing_a_stream_that_is_being_continued_changes_nothing():
    e = engine()
    first = run(e, request("a", prompt(5), hold=True, max_tokens=2))["a"]
    e.submit([request("b", prompt(3), parent="a", max_tokens=4)])
    e.release(["a"])
    check(MODEL, prompt(5) + first.token_ids + prompt(3), drain(e)["b"])
    e.submit([request("a", prompt(5))])  # the name is free again


def test_state_counts_tokens_and_time():
    e = engine()
    run(e, request("a", prompt(9), max_tokens=5), request("b", prompt(4), max_tokens=2))
    state = e.state()
    assert (state.prefill_tokens, state.sampled_tokens) == (13, 7)
    assert state.prefill_s > 0 and state.decode_s > 0


def test_a_bf16_model_decodes_on_a_bf16_state():
    model = Transformer(CONFIG, torch.bfloat16)
    model.load_state_dict(policy(gain=1.0).state_dict())
    done = run(engine(model), request("r", prompt(20), max_tokens=10))["r"]
    expected = logprobs_of(model, prompt(20), done.token_ids)
    # bf16 logits of size about 5 carry 2^-6 each, and their rounding differs between the two ways.
    assert (torch.tensor(done.logprobs) - expected.float()).abs().max() < 0.3
