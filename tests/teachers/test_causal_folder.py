"""What a folder of another model than V4 says without its model: head, digest, and what is refused."""

import json

import pytest
import torch
from causal_models import build, write
from safetensors.torch import load_file, save_file

from consilience.conf.errors import CheckpointError
from consilience.teachers.causal_folder import (
    causal_config,
    find_head,
    folder_digest,
    is_other_model,
    read_causal_head,
)


def test_other_models_are_told_from_v4_by_their_configuration(tmp_path):
    assert not is_other_model(tmp_path)
    for row, expected in (
        ({"model_type": "qwen3"}, True),
        ({"model_type": "deepseek_v4"}, False),
        ({"vocab_size": 3}, False),
        ([], False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(row))
        assert is_other_model(tmp_path) is expected


@pytest.mark.parametrize(
    ("kind", "name"), [("GPTNeoX", "embed_out.weight"), ("GPT2", "transformer.wte.weight")]
)
def test_a_head_is_found_under_the_name_that_the_files_have(kind, name, tmp_path):
    made = build(kind)
    folder = write(tmp_path, made)
    assert find_head(folder).name == name
    assert torch.equal(read_causal_head(folder), made.get_output_embeddings().weight)


def test_a_head_stored_without_the_models_prefix_is_found(tmp_path):
    folder = write(tmp_path, build("GPT2"))
    file = folder / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert find_head(folder).name == "wte.weight"


def test_one_changed_number_is_another_digest(tmp_path):
    folder = write(tmp_path, build("Llama"))
    before = folder_digest(folder)
    assert before == folder_digest(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert folder_digest(folder) != before


def change_config(folder, **changes):
    row = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(row | changes))


def test_models_that_cannot_teach_are_refused(tmp_path):
    folder = write(tmp_path, build("Llama"))
    change_config(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match="its weights are quantised"):
        causal_config(folder)
    change_config(folder, quantization_config=None, model_type="no_such_model")
    with pytest.raises(CheckpointError, match="cannot be read by transformers"):
        causal_config(folder)
    change_config(folder, model_type="llama")
    tensors = load_file(folder / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no file has its head, looked for as lm_head\.weight"):
        find_head(folder)
    save_file(tensors | {"lm_head.weight": head.to(torch.float8_e4m3fn)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"of type torch.float8_e4m3fn, a floating one is needed"):
        find_head(folder)
