import numpy as np
import pytest
import torch

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.digest import weights_digest
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.fake_engine import FakeRolloutEngine


def engine(**options):
    return FakeRolloutEngine(lambda request, context: [len(context), 7, 1], **options)


def request(uid, **fields):
    sampling = SamplingParams(max_tokens=fields.pop("max_tokens", 9), stop_ids=(1,))
    return Request(uid, fields.pop("prompt_ids", (5, 6)), sampling, **fields)


def drain(e):
    done = []
    while e.state().num_running + e.state().num_waiting:
        done += e.step()
    return done


def test_a_turn_takes_one_step_a_token_and_stops_at_the_stop_id():
    e = engine(max_running=1)
    e.submit([request("a"), request("b", max_tokens=2)])
    assert e.step() == e.step() == [] and e.state().num_waiting == 1
    (a,), (b,) = e.step(), drain(e)
    assert (a.token_ids, a.finish, a.weight_version) == ((2, 7, 1), "stop", (0, 0, 0))
    assert (b.token_ids, b.finish, b.logprobs) == (
        (2, 7),
        "length",
        tuple(np.float32([-0.01, -0.02]).tolist()),
    )


def test_a_held_stream_is_continued_once_and_dropped_by_release():
    e = engine()
    e.submit([request("a", hold=True), request("b", hold=True)])
    drain(e)
    assert e.state().num_held == 2
    e.submit([request("a2", parent="a", prompt_ids=(9,))])
    assert drain(e)[0].token_ids[0] == 2 + 3 + 1  # prompt, reply and observation
    e.release(["b", "unknown"])
    assert e.state().num_held == 0
    for parent in ("a", "b"):
        with pytest.raises(EngineError, match="not held"):
            e.submit([request("c", parent=parent)])


def test_what_a_real_engine_refuses_is_refused():
    e = engine(max_context=10)
    e.submit([request("a")])
    with pytest.raises(EngineError, match="unique"):
        e.submit([request("a")])
    with pytest.raises(EngineError, match="empty prompt"):
        e.submit([request("b", prompt_ids=())])
    with pytest.raises(EngineError, match="context holds 10"):
        e.submit([request("b", prompt_ids=(5,) * 10)])


def test_weights_with_a_wrong_digest_leave_the_old_version():
    e = engine()
    weights = {"w": torch.ones(2)}
    e.publish(weights, weights_digest(weights), 3)
    with pytest.raises(WeightsRefused):
        e.publish({"w": torch.zeros(2)}, weights_digest(weights), 4)
    assert (e.state().weight_version, e.state().digest) == (3, weights_digest(weights))


def test_it_dies_when_told_to():
    e = engine(die_after=1)
    e.submit([request("a")])
    e.step()
    with pytest.raises(EngineError, match="died after 1"):
        e.step()
