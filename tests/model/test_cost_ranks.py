"""What a rank holds by engine, against counts of the models' own parameters."""

import pytest

from consilience.conf.errors import ConfigError
from consilience.model.config import FLASH, TINY
from consilience.model.cost_ranks import EngineLayout, rank_bytes
from consilience.model.transformer import Transformer

P = sum(p.numel() for p in Transformer(TINY).parameters() if p.requires_grad)
STATE = rank_bytes(TINY, EngineLayout("torch", 1))["optimiser state"]


@pytest.mark.parametrize(
    ("layout", "weights", "gradients", "masters", "state"),
    [
        (EngineLayout("torch", 2), 4 * P, 4 * P, 0, STATE),
        (EngineLayout("torch", 2, is_state_divided=True), 4 * P, 4 * P, 0, STATE / 2),
        (EngineLayout("deepspeed", 2, zero_stage=1), 4 * P, 4 * P, 2 * P, STATE / 2),
        (EngineLayout("deepspeed", 4, zero_stage=2), 4 * P, P, P, STATE / 4),
        (EngineLayout("deepspeed", 4, zero_stage=2, is_offloaded=True), 4 * P, P, 0, 0),
        (EngineLayout("fsdp", 4), P, 4 * P, 0, STATE / 4),
    ],
)
def test_each_engine_divides_what_it_says(layout, weights, gradients, masters, state):
    found = rank_bytes(TINY, layout)
    for name, expected in (
        ("weights", weights),
        ("gradients", gradients),
        ("masters", masters),
        ("optimiser state", state),
    ):
        # Weights that nothing trains, as hash tables, are in no count of parameters with gradients.
        assert found[name] == pytest.approx(expected, rel=0.01), name


def test_zero_3_divides_the_trunk_and_keeps_what_is_around_it():
    two, many = (
        rank_bytes(FLASH, EngineLayout("deepspeed", n, zero_stage=3))["weights"] for n in (2, 1 << 20)
    )
    around = 4 * 2 * FLASH.vocab_size * FLASH.hidden_size
    assert around < many < two / 10  # and the prediction block


def test_an_engine_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="torch, deepspeed or fsdp"):
        rank_bytes(TINY, EngineLayout("ray", 2))
