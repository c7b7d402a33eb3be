"""What a released folder becomes in memory, and its digest without the memory."""

import pytest
import torch
from synthetic_release import dspark, hf_model, write_official

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.training.released_weights import read_released, released_digest

torch.set_num_threads(1)

FOLDERS = {
    "FP4 experts": write_official,
    "FP8 experts": lambda folder: write_official(folder, experts="fp8"),
    "DSpark": dspark,
    "transformers, fp32": lambda folder: hf_model().save_pretrained(folder),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_digest_alone_is_that_of_the_model_in_memory(kind, tmp_path):
    FOLDERS[kind](tmp_path / "released")
    model, digest = read_released(tmp_path / "released")
    assert digest == weights_digest(to_official(model)) == released_digest(tmp_path / "released")
    wide = kind == "transformers, fp32"
    assert model.embed.weight.dtype == (torch.float32 if wide else torch.bfloat16)
    assert model.config.expert_dtype is None and model.norm.weight.requires_grad


def test_other_weights_have_another_digest_and_damaged_ones_none(tmp_path):
    one, two = (write_official(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert released_digest(one) != released_digest(two)
    again = write_official(tmp_path / "again", num_shards=1)
    assert released_digest(one) == released_digest(again), "shards are no part of it"
    shard = sorted(one.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        released_digest(one)
