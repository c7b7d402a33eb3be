import pytest

from consilience.conf.errors import CheckpointError
from consilience.rollout import protocol as p
from consilience.rollout.prompts import checkpoint_family


@pytest.mark.parametrize(
    "source, family",
    [
        ('"""Encoding."""\nREASONING_EFFORT_MAX = (\n    "x"\n)\n', "preview"),
        ('REASONING_EFFORT_PROMPTS: Dict[str, str] = {"low": ""}\n', "official"),
    ],
)
def test_a_checkpoints_own_encoder_tells_its_family(tmp_path, source, family):
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text(source)
    assert checkpoint_family(tmp_path) == family and family in p.EFFORT_PREFIXES


def test_a_checkpoint_that_does_not_tell_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"task\.family=preview or task\.family=official"):
        checkpoint_family(tmp_path)
    (tmp_path / "encoding").mkdir()
    (tmp_path / "encoding" / "encoding_dsv4.py").write_text("# REASONING_EFFORT_MAX was here\n")
    with pytest.raises(CheckpointError, match="no reasoning effort"):
        checkpoint_family(tmp_path)
