"""What does not go with a cut model is refused before anything is built, and the way out is named."""

import pytest

from consilience.conf.errors import ConfigError
from consilience.conf.load import compose

CUT = ["engine.kind=fsdp", "engine.ranks=2"]


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["engine.context_ranks=2"],
        ["engine.exact=true"],
        ["engine.quantization=fp4"],
        ["engine.quantization=fp8", "rollout.quantization=fp8"],
        ["sft.indexer_warmup=2"],
    ],
)
def test_a_cut_model_on_two_ranks_is_taken(given):
    engine = compose([*CUT, *given]).engine
    assert (engine.kind, engine.ranks) == ("fsdp", 2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("engine.ranks=1", "set engine.ranks to 2 or more, or engine.kind=torch"),
        ("rollout.quantization=fp8", "set rollout.quantization=off, or"),
        ("engine.shard_state=true", "set engine.shard_state=false"),
        ("cluster.placement=colocated", "not there for engine.kind=fsdp; set engine.kind=torch"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_way_out(override, said):
    with pytest.raises(ConfigError) as refused:
        compose([*CUT, override])
    assert said in str(refused.value)
