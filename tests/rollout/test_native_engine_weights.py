"""New weights in a native engine: taken whole or refused whole, and named by version in every token."""

import pytest
import torch
from native_oracle import MODEL, check, drain, engine, request, run
from small_policy import policy, prompt

from consilience.conf.errors import EngineError, WeightsRefused
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest

torch.set_num_threads(1)


def published(model):
    weights = {n: t.clone() for n, t in to_official(model).items()}
    return weights, weights_digest(weights)


def test_publishing_replaces_the_weights_and_forgets_the_prefix():
    shared, other = prompt(40), policy(seed=9)
    e = engine(policy())
    before = run(e, *(request(f"a{i}", (*shared, i)) for i in range(2)))
    check(MODEL, (*shared, 0), before["a0"])
    weights, digest = published(other)
    e.publish(weights, digest, 7)
    assert (e.state().digest, e.state().weight_version) == (digest, 7)
    after = run(e, *(request(f"b{i}", (*shared, i)) for i in range(2)), request("c", (*shared, 5)))
    for uid, last in (("b0", 0), ("b1", 1), ("c", 5)):
        check(other, (*shared, last), after[uid])
        assert set(after[uid].weight_version) == {7}
    assert set(before["a0"].weight_version) == {0}


def test_a_running_stream_records_the_version_of_every_token():
    e = engine(policy(), version=3)
    e.submit([request("r", prompt(9), max_tokens=6)])
    e.step()
    weights, digest = published(policy(seed=9))
    e.publish(weights, digest, 4)
    versions = drain(e)["r"].weight_version
    assert versions == (3,) * 2 + (4,) * 4


def test_refused_weights_leave_the_old_ones_in_place():
    model = policy()
    e = engine(model)
    old = {n: t.clone() for n, t in model.state_dict().items()}
    weights, digest = published(policy(seed=9))
    with pytest.raises(WeightsRefused, match="digest"):
        weights["norm.weight"].view(torch.uint8)[5] ^= 4
        e.publish(weights, digest, 1)
    weights.pop("norm.weight")
    with pytest.raises(WeightsRefused, match=r"misses norm\.weight"):
        e.publish(weights, weights_digest(weights), 1)
    weights["norm.weight"] = torch.ones(3)
    with pytest.raises(WeightsRefused, match=r"norm.weight: found shape \(3,\)"):
        e.publish(weights, weights_digest(weights), 1)
    assert all(torch.equal(old[n], t) for n, t in model.state_dict().items())
    assert (e.state().weight_version, e.state().digest) == (0, "")


def test_weights_that_are_not_finite_stop_the_engine_with_their_version():
    e = engine(policy())
    weights, _ = published(MODEL)
    weights["head.weight"][0, 0] = float("nan")
    e.publish(weights, weights_digest(weights), 12)
    with pytest.raises(EngineError, match=r"version 12 .* not finite"):
        run(e, request("r", prompt(4)))
