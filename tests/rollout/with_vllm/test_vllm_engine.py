"""The adapter over a real vLLM, against transformers on the same weights.

T tokens of a stream. fp32 on both sides: `TOLERANCE` is a hundred times what rounding was seen to do.
"""

import numpy as np
import pytest
import torch
from tiny_qwen import MAX_LENGTH, PROBES, VOCAB_SIZE, build_engine, other_weights, write_checkpoint

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout.engine import Prefix, Request, SamplingParams

TOLERANCE = 1e-4
PROMPT = tuple(range(7, 40))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, write_checkpoint(folder)


@pytest.fixture(scope="module")
def running(checkpoint):
    engine = build_engine(checkpoint[0], max_rows=32)
    yield engine
    engine.close()


@pytest.fixture
def engine(running, checkpoint):
    """The engine with the checkpoint's weights, whatever a test before published."""
    running.publish(checkpoint[1], weights_digest(checkpoint[1]), 1)
    running.mismatches.clear()
    return running


def request(uid, prompt=PROMPT, **fields):
    own = {name: fields.pop(name) for name in ("parent", "hold", "prefix") if name in fields}
    return Request(uid, prompt, SamplingParams(**{"max_tokens": 12, "seed": 3, **fields}), **own)


def run(engine, *requests):
    """uid -> Completed, and what `new_tokens` said: uid -> [(position, token, logprob, version)]."""
    engine.submit(requests)
    done, seen = {}, {r.uid: [] for r in requests}
    while len(done) < len(requests):
        done |= {c.uid: c for c in engine.step()}
        new = engine.new_tokens()
        for uid, *what in zip(new.uids, new.positions, new.token_ids, new.logprobs):
            seen[uid].append((*what, new.weight_version))
    return done, seen


def logprobs_of(folder, weights, prompt, tokens, temperature=1.0):
    """[T] of `tokens` behind `prompt`, by transformers; their greedy choice, [T]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].double()
    rows = torch.log_softmax(logits / temperature, -1)
    return rows.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy(), logits.argmax(-1).tolist()


def test_logprobs_are_those_of_the_sampled_distribution_at_each_temperature(engine, checkpoint):
    heats = (1.0, 0.6, 1.7, 0.0)
    done, seen = run(engine, *(request(f"t/{t}", temperature=t) for t in heats))
    for heat in heats:
        turn = done[f"t/{heat}"]
        wanted, greedy = logprobs_of(*checkpoint, PROMPT, turn.token_ids, heat or 1.0)
        np.testing.assert_allclose(turn.logprobs, wanted, atol=TOLERANCE)
        assert heat or list(turn.token_ids) == greedy
        assert [s[:3] for s in seen[turn.uid]] == list(zip(range(12), turn.token_ids, turn.logprobs))
        assert (turn.finish, turn.weight_version) == ("length", (1,) * 12)
        assert all(x == float(np.float32(x)) for x in turn.logprobs)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd_and_another_seed_others(engine):
    alone = [run(engine, request(f"alone/{seed}", seed=seed))[0][f"alone/{seed}"] for seed in range(3)]
    crowd, _ = run(engine, *(request(f"crowd/{seed}", seed=seed) for seed in range(30)))
    assert [a.token_ids for a in alone] == [crowd[f"crowd/{seed}"].token_ids for seed in range(3)]
    assert len({c.token_ids for c in crowd.values()}) == 30


def test_prompts_that_no_step_holds_together_wait_and_are_not_cut(engine, checkpoint):
    """With a seed a cut one would end this vLLM: "CPU Generator does not use offset"."""
    long = tuple(i % 250 + 5 for i in range(240))  # 32 of them: 7,680 tokens, a step holds 4,096
    done, _ = run(engine, *(request(f"long/{i}", long, seed=i, max_tokens=5) for i in range(32)))
    for turn in (done["long/0"], done["long/31"]):
        wanted, _ = logprobs_of(*checkpoint, long, turn.token_ids)
        np.testing.assert_allclose(turn.logprobs, wanted, atol=TOLERANCE)


def test_a_stop_id_ends_the_turn_and_is_its_last_token(engine):
    (free,) = run(engine, request("free", max_tokens=20))[0].values()
    stop = free.token_ids[9]
    first = free.token_ids.index(stop)
    (stopped,) = run(engine, request("stopped", max_tokens=20, stop_ids=(stop, 270)))[0].values()
    assert stopped.finish == "stop" and stopped.token_ids == free.token_ids[: first + 1]
    assert stopped.logprobs == pytest.approx(free.logprobs[: first + 1], abs=TOLERANCE)


def test_a_prefix_comes_first_as_it_was_and_the_rest_follows_the_models_law(engine, checkpoint):
    begun = Prefix((50, 60, 70), (-1.5, -2.5, -3.5), (0, 0, 1))
    done, seen = run(engine, request("p", prefix=begun))
    turn = done["p"]
    assert turn.token_ids[:3] == begun.token_ids and turn.logprobs[:3] == begun.logprobs
    assert turn.weight_version == (0, 0, 1) + (1,) * 9 and [s[0] for s in seen["p"]] == list(range(3, 12))
    wanted, _ = logprobs_of(*checkpoint, (*PROMPT, 50, 60, 70), turn.token_ids[3:])
    np.testing.assert_allclose(turn.logprobs[3:], wanted, atol=TOLERANCE)
    (done, seen) = run(
        engine, request("whole", prefix=begun, max_tokens=3), request("ended", prefix=begun, stop_ids=(70,))
    )
    assert {uid: c.finish for uid, c in done.items()} == {"whole": "length", "ended": "stop"}
    assert seen == {"whole": [], "ended": []}


def test_a_held_stream_is_continued_behind_a_tools_answer(engine, checkpoint):
    first = run(engine, request("turn#0", hold=True))[0]["turn#0"]
    assert engine.state().num_held == 1
    answer = (90, 91, 92)
    second = run(engine, request("turn#1", answer, parent="turn#0", hold=True))[0]["turn#1"]
    wanted, _ = logprobs_of(*checkpoint, (*PROMPT, *first.token_ids, *answer), second.token_ids)
    np.testing.assert_allclose(second.logprobs, wanted, atol=TOLERANCE)
    with pytest.raises(EngineError, match="not held"):
        engine.submit([request("turn#2", answer, parent="turn#0")])
    engine.release(["turn#1"])
    assert engine.state().num_held == 0
    long = run(engine, request("full#0", hold=True, max_tokens=MAX_LENGTH - len(PROMPT) - 5))[0]["full#0"]
    last = run(engine, request("full#1", answer, parent="full#0"))[0]["full#1"]
    assert len(long.token_ids) == MAX_LENGTH - len(PROMPT) - 5 and len(last.token_ids) == 2


def test_weights_change_between_two_steps_of_a_running_stream(engine, checkpoint):
    folder, weights = checkpoint
    new = other_weights(weights, 5)
    engine.submit([request("r", max_tokens=20), request("other", max_tokens=20, seed=4)])
    seen = []
    for _ in range(6):
        assert engine.step() == []
        seen.append(engine.new_tokens())
    engine.publish(new, weights_digest(new), 2)
    done = []
    while len(done) < 2:
        done += engine.step()
        seen.append(engine.new_tokens())
    turn = next(c for c in done if c.uid == "r")
    versions = turn.weight_version
    assert versions == tuple(sorted(versions)) and versions.count(1) == 6
    logged = [
        (p, t, n.weight_version)
        for n in seen
        for u, p, t in zip(n.uids, n.positions, n.token_ids)
        if u == "r"
    ]
    assert logged == list(zip(range(20), turn.token_ids, versions))
    old, _ = logprobs_of(folder, weights, PROMPT, turn.token_ids)
    changed, _ = logprobs_of(folder, new, PROMPT, turn.token_ids)
    np.testing.assert_allclose(turn.logprobs[:6], old[:6], atol=TOLERANCE)
    np.testing.assert_allclose(turn.logprobs[6:], changed[6:], atol=TOLERANCE)
    assert np.abs(old - changed).max() > 0.1  # or the line above could not fail


def test_what_was_cleared_goes_on_from_its_prefix_as_if_it_had_never_stopped(engine, checkpoint):
    engine.submit([request("a"), request("b", hold=True, max_tokens=2), request("c", max_tokens=20)])
    done = {}
    while "b" not in done:
        done |= {c.uid: c for c in engine.step()}
    (first, second), held = engine.clear()
    assert (first.uid, second.uid, held) == ("a", "c", ["b"])
    assert len(first.prefix.token_ids) == len(second.prefix.token_ids) > 0
    state = engine.state()
    assert (state.num_waiting, state.num_running, state.num_held) == (0, 0, 0)
    done, _ = run(engine, first, second)
    for given in (first, second):
        turn = done[given.uid]
        assert turn.token_ids[: len(given.prefix.token_ids)] == given.prefix.token_ids
        wanted, _ = logprobs_of(*checkpoint, PROMPT, turn.token_ids)
        np.testing.assert_allclose(turn.logprobs, wanted, atol=TOLERANCE)


def test_every_update_is_held_against_the_reference_under_changed_weights(engine, checkpoint):
    for version in (2, 3):
        new = other_weights(checkpoint[1], version)
        engine.publish(new, weights_digest(new), version)
    assert [m.version for m in engine.mismatches] == [2, 3]
    assert all(m.largest < TOLERANCE and m.correlation > 0.9999 and m.moved > 0.1 for m in engine.mismatches)
    proofs = engine.prove(new)
    assert len(proofs) == 14 and all(p.expected > 0.1 and abs(p.followed - 1) < 1e-2 for p in proofs)
    state = engine.state()
    assert (state.weight_version, state.digest) == (3, weights_digest(new))


def test_damaged_or_partial_weights_are_refused_and_the_old_ones_stay(engine, checkpoint):
    before = engine.score(PROBES)
    new = other_weights(checkpoint[1], 7)
    digest = weights_digest(new)
    name = "model.layers.1.mlp.up_proj.weight"
    new[name].view(torch.uint8)[3, 3] ^= 1
    with pytest.raises(WeightsRefused, match="digest"):
        engine.publish(new, digest, 2)
    partial = {k: v for k, v in new.items() if k != name}
    with pytest.raises(WeightsRefused, match=f"1 of 25 tensors.*{name}"):
        engine.publish(partial, weights_digest(partial), 2)
    with pytest.raises(WeightsRefused, match="another digest"):  # damaged on the way to vLLM's workers
        engine._llm.collective_rpc("receive_weights", args=(new, dict.fromkeys(new, "0" * 64)))
    assert engine.state().weight_version == 1
    assert all((a == b).all() for a, b in zip(before, engine.score(PROBES)))


def test_sleep_refuses_work_and_waking_brings_everything_back(engine, checkpoint):
    engine.submit([request("busy")])
    with pytest.raises(EngineError, match="1 requests run"):
        engine.sleep()
    while not engine.step():
        pass
    before = engine.score(PROBES)
    engine.sleep()
    with pytest.raises(EngineError, match="sleeps"):
        engine.submit([request("asleep")])
    engine.wake()
    assert all((a == b).all() for a, b in zip(before, engine.score(PROBES)))
    engine.wake()  # awake already: nothing happens
    engine.sleep(level=2)
    engine.wake()
    engine.wake()
    with pytest.raises(EngineError, match="publish"):
        engine.step()
    engine.publish(checkpoint[1], weights_digest(checkpoint[1]), 2)
    assert run(engine, request("awake"))[0]["awake"].weight_version == (2,) * 12


def test_what_cannot_run_is_refused_whole(engine):
    for bad, why in (
        ([request("x"), request("x")], "unique"),
        ([request("y", max_tokens=MAX_LENGTH)], "holds 256"),
        ([request("z", (VOCAB_SIZE,))], "token ids"),
    ):
        with pytest.raises(EngineError, match=why):
            engine.submit(bad)
    assert engine.state().num_waiting == 0
