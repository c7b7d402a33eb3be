"""What vLLM hands out of its routers, as records: arrays made as vLLM 0.32 makes them.

n tokens fed, M layers, L with a learned router, K experts a token.
"""

from dataclasses import replace

import numpy as np
import pytest

from consilience.conf.errors import ConfigError, EngineError
from consilience.model.config import TINY
from consilience.rollout.token_routing import MISSING, stitched
from consilience.rollout.vllm_routing import CapturedRouting
from consilience.rollout.vllm_settings import V4

CONFIG = replace(TINY, num_hash_layers=1)
ROW = {**CONFIG.to_json_dict(), "architectures": [V4]}
M, E, K = CONFIG.num_hidden_layers, CONFIG.n_routed_experts, CONFIG.num_experts_per_tok


def captured(num_tokens, dtype: type = np.uint8, seed=0):
    """[n, M, K], every choice of K different experts, in no order."""
    drawn = np.random.default_rng(seed).random((num_tokens, M, E))
    return np.argsort(drawn, -1)[..., :K].astype(dtype)


def test_each_fed_token_has_the_experts_of_the_learned_layers_in_their_order():
    given = captured(9)
    routing = CapturedRouting.of(ROW).record("a", given, 10)
    assert routing.layers == tuple(range(1, M)) and routing.num_tokens == 9
    np.testing.assert_array_equal(routing.experts(), given[:, 1:])


def test_tokens_that_vllm_left_out_and_layers_that_captured_nothing_are_missing():
    given = captured(6)
    given[2, 1] = 0  # what a buffer began with: one expert K times
    found = CapturedRouting.of(ROW).record("a", given, 10).experts()
    assert (found[6:] == MISSING).all() and (found[2, 0] == MISSING).all()
    given[2, 1] = found[2, 0]
    expected = given[:, 1:].astype(np.int16)
    expected[2, 0] = MISSING
    np.testing.assert_array_equal(found[:6], expected)


def test_a_turn_behind_a_held_one_records_from_the_token_that_it_was_the_first_to_feed():
    whole, of = captured(19), CapturedRouting.of(ROW)
    first = of.record("a", whole[:9], 10)
    again = captured(19, seed=1)  # the prefill of the second turn chose otherwise
    again[9:] = whole[9:]
    second = of.record("b", again, 20, held=10)
    stream = stitched(20, [(9, first), (19, second)])
    assert stream is not None
    np.testing.assert_array_equal(stream.experts()[:19], whole[:, 1:])
    assert (stream.experts()[19] == MISSING).all()


def test_many_experts_are_kept_in_sixteen_bits():
    row = {**ROW, "n_routed_experts": 384}
    given = captured(5, np.uint16)
    given[0, 1, 0] = 383
    routing = CapturedRouting.of(row).record("a", given, 6)
    assert routing.dtype == "i2" and routing.experts()[0, 0, 0] == 383


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "vLLM returned no experts of request a; set grpo.replay_routing=false"),
        (captured(5)[:, 1:], r"returned experts \[5, .*expected are \[tokens"),
        (np.full((5, M, K), E), f"returned expert {E} of request a, the model has {E}"),
    ],
)
def test_what_cannot_be_this_models_routing_is_an_error_that_names_the_request(given, message):
    with pytest.raises(EngineError, match=message):
        CapturedRouting.of(ROW).record("a", given, 6)


def test_a_model_without_routers_is_refused():
    with pytest.raises(
        ConfigError, match=r"grpo\.replay_routing replays the experts of V4, and this is Qwen3"
    ):
        CapturedRouting.of({**ROW, "architectures": ["Qwen3ForCausalLM"]})
