"""Dense models through the trainer: read, trained, saved, resumed."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from consilience.conf.errors import CheckpointError
from consilience.model.dense import DenseModel
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.training.checkpoint import CheckpointMeta, load_checkpoint
from consilience.training.forward import hidden_at_loss
from consilience.training.model_format import format_for
from consilience.training.packing import pack
from consilience.training.stage_checkpoints import StageCheckpoints
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

ROWS = pack([[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]], quantum=16, max_row_tokens=16)


@pytest.fixture(params=[False, True], ids=["own head", "tied head"])
def folder(request, tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=272,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=request.param,
    )
    Qwen3ForCausalLM(config).float().save_pretrained(tmp_path / "init")
    byte_tokenizer().save(tmp_path / "init" / "tokenizer.json")
    return tmp_path / "init"


def train(engine, steps):
    """Losses of plain next-token training on the same rows."""

    def loss_fn(model, rows):
        at = hidden_at_loss(model, rows)
        logits = at.hidden @ model.head.weight.t()
        return torch.nn.functional.cross_entropy(logits, at.target_ids), {}

    losses = []
    for _ in range(steps):
        losses.append(engine.forward_backward(loss_fn, ROWS, {})["loss"])
        engine.step()
    return losses


def stage(folder, model):
    engine = TorchEngine(model, OptimizerSettings(lr=3e-3))
    meta = CheckpointMeta("grpo/mine", seed=0, step=0)
    return engine, StageCheckpoints(folder.parent / "checkpoints", engine, folder / "tokenizer.json", meta)


def test_a_folder_of_transformers_is_trained_saved_and_gone_on_with_to_the_last_bit(folder):
    model, meta = load_checkpoint(folder)
    assert isinstance(model, DenseModel) and (meta.stage, meta.family) == ("released", None)
    engine, checkpoints = stage(folder, model)
    losses = train(engine, 4)
    assert losses[-1] < losses[0] - 0.2
    saved = checkpoints.save(4, {"place": 3})
    wanted = train(engine, 2)

    again, meta = load_checkpoint(saved)
    assert isinstance(again, DenseModel) and meta.digest == load_checkpoint(saved)[1].digest
    fresh, _ = load_checkpoint(folder)
    engine, checkpoints = stage(folder, fresh)
    assert checkpoints.resume() == (4, {"place": 3})
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in fresh.state_dict().items())
    assert train(engine, 2) == wanted


def test_tensors_of_another_model_are_refused(folder):
    model, _ = load_checkpoint(folder)
    model_format = format_for(model)
    tensors = model_format.to_official(model)
    tensors.pop("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        model_format.load_official(model, tensors)
