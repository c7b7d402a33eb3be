"""What does not go with divided experts is refused before anything is built, and the way out is named."""

import pytest

from consilience.conf.errors import ConfigError
from consilience.conf.load import compose

DIVIDED = ["engine.expert_ranks=2", "engine.ranks=4"]


def test_divided_experts_are_taken_with_rows_cut_and_with_divided_state():
    engine = compose([*DIVIDED, "engine.context_ranks=2", "engine.shard_state=true"]).engine
    assert (engine.expert_ranks, engine.context_ranks, engine.shard_state) == (2, 2, True)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.ranks=3", "does not divide engine.ranks=3; set it to a divisor of engine.ranks"),
        ("model.n_routed_experts=9", "does not divide model.n_routed_experts=9; set it to a divisor of both"),
        ("engine=deepspeed", "set engine.kind=torch, with engine.shard_state=true"),
        ("engine.kind=fsdp", "set engine.kind=torch, with engine.shard_state=true"),
        ("rollout.quantization=fp4", "set rollout.quantization=off, or engine.expert_ranks=1"),
    ],
)
def test_what_does_not_go_with_them_is_refused_with_the_way_out(override, said):
    with pytest.raises(ConfigError) as refused:
        compose([*DIVIDED, override])
    assert said in str(refused.value)
