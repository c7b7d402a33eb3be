"""V3.2's side of the comparison: the specification's figures, and sizes as `transformers` has them."""

import dataclasses

from transformers import DeepseekV32Config

from consilience.model.cost import equivalent_flops
from consilience.model.cost_v32 import V32, v32_state_bytes, v32_work


def test_flops_at_a_million_tokens_are_those_of_the_specification():
    linear_low, linear_high, core, index = v32_work(10**6)
    groups = ([linear_low, linear_high], [core], [index], [linear_low, linear_high, core, index])
    shown = [f"{equivalent_flops(rows) / 1e12:.3f}" for rows in groups]
    assert shown == ["0.077", "0.070", "0.999", "1.146"]


def test_a_short_context_is_attended_whole():
    assert v32_work(100)[2].flops == 61 * 2 * 128 * (576 + 512) * 100
    assert v32_work(5000)[2].flops == v32_work(2048)[2].flops


def test_active_parameters_are_the_published_37_billion():
    low, high, *_ = v32_work(1)
    assert 36.5e9 < (low.flops + high.flops) / 2 < 37.6e9


def test_the_cache_is_that_of_the_specification():
    assert v32_state_bytes(1) == 61 * (656 + 132) == 48_068
    assert v32_state_bytes(1, has_scales=False) == 61 * 768


def test_every_size_is_that_of_transformers():
    theirs = DeepseekV32Config()
    assert {f.name: getattr(theirs, f.name) for f in dataclasses.fields(V32)} == dataclasses.asdict(V32)
