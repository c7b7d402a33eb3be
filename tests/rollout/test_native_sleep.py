"""An engine that slept samples what one does that never did, to the bit."""

import pytest
import torch
from small_policy import CONFIG, policy, prompt

from consilience.conf.errors import EngineError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.native_engine import NativeEngine

torch.set_num_threads(1)


def engine(**options):
    return NativeEngine(policy(), max_rows=4, max_length=160, **options)


def sample(e, name):
    e.submit([Request(f"{name}{n}", prompt(n, n), SamplingParams(1.0, 12, (), n)) for n in (1, 9, 40)])
    done = {}
    while e.state().num_running + e.state().num_waiting:
        done |= {c.uid[len(name) :]: (c.token_ids, c.logprobs) for c in e.step()}
    return done


@pytest.mark.parametrize("level", [0, 1, 2])
def test_after_its_sleep_an_engine_samples_the_same_bits(level):
    e = engine()
    before = sample(e, "before")
    weight = e.model.head.weight
    e.sleep(level)
    assert (weight.untyped_storage().nbytes() == 0) == (level > 0)
    assert all(page.untyped_storage().nbytes() == 0 for layer in e._state.layers for page in layer.pages())
    e.wake()
    if level == 2:
        with pytest.raises(EngineError, match="dropped at sleep; publish some"):
            sample(e, "early")
        weights = to_official(policy())
        e.publish(weights, weights_digest(weights), 1)
    assert sample(e, "after") == before
    assert sample(e, "again") == before


def test_an_engine_that_sleeps_takes_nothing_and_one_with_streams_does_not_sleep():
    e = engine()
    request = Request("a", prompt(5), SamplingParams(1.0, 4, (), 1))
    e.submit([request])
    with pytest.raises(EngineError, match="1 requests run or are held"):
        e.sleep()
    e.clear()
    e.sleep()
    e.sleep(2)  # it sleeps already
    weights = to_official(policy())
    for ask in (lambda: e.submit([request]), lambda: e.publish(weights, weights_digest(weights), 1)):
        with pytest.raises(EngineError, match="sleeps; wake it"):
            ask()
    e.wake()
    e.wake()
    e.submit([request])
    assert CONFIG.vocab_size > max(sample(e, "b")["1"][0])
