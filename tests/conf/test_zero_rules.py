"""What ZeRO-3 cannot train is refused before anything is built, and the way out is named."""

import pytest

from consilience.conf.errors import ConfigError
from consilience.conf.load import compose

DIVIDED = [
    "engine=deepspeed",
    "engine.zero_stage=3",
    "engine.ranks=2",
    "optimizer.kind=adamw",
]


def test_adamw_on_two_ranks_is_taken():
    engine = compose(DIVIDED).engine
    assert (engine.kind, engine.zero_stage) == ("deepspeed", 3)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.kind=muon", "take engine.kind=fsdp, or set engine.zero_stage=2, or optimizer.kind=adamw"),
        ("specialist.settings.math.optimizer.kind=muon", "specialist.settings.math.optimizer.kind=adamw"),
        ("engine.context_ranks=2", "set engine.context_ranks=1, or engine.zero_stage=2"),
        ("engine.exact=true", "set engine.exact=false, or"),
        ("engine.quantization=fp4", "set engine.quantization=off, or"),
        ("rollout.quantization=fp8", "set rollout.quantization=off, or"),
        ("base.indexer_warmup=2", "set base.indexer_warmup=0, or"),
        ("specialist.settings.math.sft.indexer_warmup=2", "math.sft.indexer_warmup=0, or"),
        ("engine.zero_stage=4", "engine.zero_stage"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_way_out(override, said):
    with pytest.raises(ConfigError) as refused:
        compose([*DIVIDED, override])
    assert said in str(refused.value)
