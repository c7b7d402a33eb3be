"""Supervised training of a dense model: the step that V4 takes, without what a dense model lacks."""

import pytest
import torch
from transformers import LlamaConfig

from consilience.grpo.sft import SupervisedSettings, supervised_step
from consilience.model.dense import DenseModel
from consilience.training.packing import pack
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)
CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)


def test_a_step_is_that_of_plain_cross_entropy_and_learns():
    torch.manual_seed(0)
    model = DenseModel(CONFIG.to_dict())
    samples = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    packed = pack(samples, quantum=16, max_row_tokens=16)
    with torch.no_grad():
        alone = [
            torch.nn.functional.cross_entropy(
                model(torch.tensor([s]))[0, :-1], torch.tensor(s[1:]), reduction="sum"
            )
            for s in samples
        ]
    wanted = float(sum(alone)) / sum(len(s) - 1 for s in samples)
    engine = TorchEngine(model, OptimizerSettings(lr=5e-3))
    settings = SupervisedSettings(steps=30, tokens_per_step=16, row_tokens=16, warmup=0)
    found = [supervised_step(engine, packed, settings, step)["nll"] for step in range(10)]
    assert found[0] == pytest.approx(wanted, rel=1e-5)  # fp32, sums in another order
    assert found[-1] < found[0] - 0.5
