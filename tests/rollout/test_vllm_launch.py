"""What stands around vLLM for a V4 model: the released layout, the reference, the probes. No vLLM in it."""

import shutil

import numpy as np
import pytest
import torch
from small_policy import CONFIG

from consilience.conf.errors import ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.initialize import initialize
from consilience.model.release import from_model, write_release
from consilience.model.released_checkpoint import TensorsOnDisk, open_checkpoint
from consilience.model.shards import read_folder
from consilience.model.transformer import Transformer
from consilience.rollout.vllm_launch import launch, probe_sequences, v4_export
from consilience.rollout.vllm_reference import reference_of


@pytest.fixture
def released(tmp_path):
    """(folder of a V4 model in the released layout, the values that its quantised tensors stand for)."""
    model = initialize(Transformer(CONFIG), seed=1)
    write_release(tmp_path, from_model(model), experts="fp4")
    checkpoint = open_checkpoint(tmp_path)
    stored = TensorsOnDisk(checkpoint)
    return tmp_path, checkpoint.config, {name: stored[name] for name in stored}


def test_an_export_has_the_tensors_of_the_release_and_values_that_it_holds_come_back_bit_for_bit(released):
    folder, config, weights = released
    tensors = v4_export(config)(weights)
    stored = read_folder(folder)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == {
        n: (s.dtype, s.shape) for n, s in stored.items()
    }
    again = write_and_read(folder, tensors)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def write_and_read(folder, tensors):
    from safetensors.torch import save_file

    for index in folder.glob("*.index.json"):
        index.unlink()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    stored = TensorsOnDisk(open_checkpoint(folder))
    return {name: stored[name] for name in stored}


def test_the_reference_of_v4_is_our_own_forward(released):
    folder, _, weights = released
    probes = probe_sequences(CONFIG.vocab_size, 40)
    reference = reference_of(folder)
    model = initialize(Transformer(CONFIG), seed=1)
    scores = reference(to_official(model), probes)
    for tokens, row in zip(probes, scores):
        rows = torch.log_softmax(model(torch.tensor([tokens]))[0].double(), -1)
        wanted = rows[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].detach().numpy()
        np.testing.assert_allclose(
            row, wanted, atol=1e-6
        )  # fp32: the same operations, in another batch at most
    quantised = reference(weights, probes)
    assert np.abs(np.concatenate(quantised) - np.concatenate(scores)).max() > 1e-4


def test_a_reference_needs_its_folder_no_longer_than_the_start_of_an_engine(released):
    folder, _, weights = released
    probes = probe_sequences(CONFIG.vocab_size, 20)
    wanted = reference_of(folder)(weights, probes)
    reference = reference_of(folder)
    shutil.rmtree(folder)  # as random weights to start from are: `launch` has them in a temporary folder
    assert all((a == b).all() for a, b in zip(reference(weights, probes), wanted))


def test_probes_fit_the_engine_and_are_the_same_at_every_call():
    assert [len(p) for p in probe_sequences(61, 1000)] == [12, 60, 140, 300]
    assert [len(p) for p in probe_sequences(61, 100)] == [12, 60, 99]
    assert probe_sequences(61, 100) == probe_sequences(61, 100)
    assert max(max(p) for p in probe_sequences(61, 1000)) < 61


def test_routing_of_a_dense_model_is_refused_before_vllm_is_looked_for(tmp_path):
    from transformers import Qwen3Config

    Qwen3Config(architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"set grpo\.replay_routing=false"):
        launch({}, checkpoint=str(tmp_path), max_rows=2, max_length=32, records_routing=True)
