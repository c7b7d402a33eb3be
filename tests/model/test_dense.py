"""A dense model of transformers behind the trainer's face, against transformers on each sample alone."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Qwen2Config, Qwen3Config

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.model.checkpoint import to_official
from consilience.model.context_parallel import context_parallel
from consilience.model.dense import DenseModel, build_causal, is_dense
from consilience.model.quantization import Quantization
from consilience.model.ranks import Ranks

# Weights are fp64, but transformers' norms, softmax and rotations are fp32: 5e-7 was seen at logits of 10.
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2 with biases, tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=False),
}


@pytest.fixture(params=CONFIGS)
def row(request):
    return CONFIGS[request.param].to_dict()


@pytest.fixture
def model(row):
    torch.manual_seed(0)
    return DenseModel(row, torch.float64)


def test_packed_rows_are_their_samples_one_by_one(model):
    samples = [torch.randint(61, (n,)) for n in (5, 9, 3)]
    ids, places = torch.zeros(2, 2, 16, dtype=torch.long)
    segments = torch.full((2, 16), -1)
    spots = ((0, 0, 0), (0, 5, 1), (1, 0, 0))  # row, first column, segment
    for sample, (row, first, segment) in zip(samples, spots):
        where = slice(first, first + len(sample))
        ids[row, where], segments[row, where] = sample, segment
        places[row, where] = torch.arange(len(sample))
    logits = model(ids, segments, position_ids=places)
    assert torch.isfinite(logits).all()
    whole = model._whole[0]
    for sample, (row, first, _) in zip(samples, spots):
        alone = whole(sample[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[row, first : first + len(sample)], alone, rtol=0, atol=TOLERANCE)


def test_its_tensors_have_the_names_and_values_of_the_files_that_transformers_writes(model, tmp_path):
    from consilience.model.shards import read_folder, read_rows

    model._whole[0].save_pretrained(tmp_path)
    stored = read_folder(tmp_path)
    tensors = to_official(model)  # what a publication has
    assert stored.keys() == tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(read_rows(stored[name]), tensor) for name, tensor in tensors.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.arange(10)[None]
    torch.testing.assert_close(again(ids).logits, model(ids), rtol=0, atol=TOLERANCE)


def test_a_gradient_reaches_every_parameter_of_the_trainers_path(model):
    ids = torch.arange(12)[None]
    streams, layout = model.streams(ids, torch.zeros_like(ids), ids)
    assert layout is None and model.mtp_hidden(streams, ids, layout) == []
    hidden = model.norm(model.hc_head(streams))
    assert hidden.shape == (12, 24)
    torch.logsumexp(hidden @ model.head.weight.t(), -1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for name, p in model.named_parameters()
               if not name.endswith("k_proj.bias"))  # fmt: skip  # it moves all scores of a query alike


def test_logits_that_are_no_product_of_the_head_are_found_out(model):
    model.check()
    with pytest.raises(CheckpointError, match="GraniteForCausalLM makes other logits"):
        DenseModel(GraniteConfig(**SIZES, logits_scaling=4.0).to_dict()).check()
    DenseModel(GraniteConfig(**SIZES, logits_scaling=1.0).to_dict()).check()


def test_what_could_not_be_trained_as_it_is_sampled_is_refused(row, model):
    for other in (
        {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2, "sliding_window": 4},
        {"model_type": "mistral", "sliding_window": 4},
        {"model_type": "mixtral", "num_local_experts": 2},
        {"model_type": "gpt2"},
        {"model_type": "no such model"},
    ):
        with pytest.raises(CheckpointError):
            build_causal({**SIZES, **other})
    model.quantize(Quantization())
    with pytest.raises(ConfigError, match="needs off"):
        model.quantize(Quantization.from_name("fp4"))
    with pytest.raises(ConfigError, match="experts"):
        model.streams(*[torch.zeros(1, 4).long()] * 3, routing=object())
    with pytest.raises(ConfigError, match="context_ranks"), context_parallel(Ranks(0, 2)):
        model.streams(*[torch.zeros(1, 4).long()] * 3)


def test_v4_is_not_dense_whichever_layout_its_config_has():
    assert not is_dense({"model_type": "deepseek_v4"}) and not is_dense({})
    assert is_dense({"model_type": "qwen3"})
    assert DenseModel(CONFIGS["qwen3"].to_dict()).config.vocab_size == 61
