"""A dense model with random weights that vLLM's CPU build serves, and the engine over it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from consilience.rollout.vllm_engine import VllmEngine
from consilience.rollout.vllm_reference import reference_of

VOCAB_SIZE = 272  # the ids of `byte_tokenizer`
MAX_LENGTH = 256
PROBES = [list(range(5 + shift, 45 + shift)) for shift in (0, 60, 120)]
# fp32 on both sides, other orders of summation: 7e-6 at most was seen at log-probabilities down to −20
MAX_MISMATCH = 1e-4
SETTINGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 32 << 20}


def write_checkpoint(folder: Path, seed: int = 0, most_tokens: int = 512) -> dict[str, torch.Tensor]:
    """A Qwen3 of two layers into `folder`; its tensors. Heads of 32 channels: fewer are not served."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=most_tokens,
        tie_word_embeddings=False,
        initializer_range=0.3,  # peaked enough that log-probabilities vary
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of such a folder."""
    return load_file(folder / "model.safetensors")


def rewrite_checkpoint(source: Path, folder: Path, architecture: str, weights) -> Path:
    """The same configuration under another architecture's name, with other tensors."""
    folder.mkdir()
    row = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(row | {"architectures": [architecture]}))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def build_engine(folder: Path, reference=None, **options) -> VllmEngine:
    return VllmEngine(
        folder,
        **{
            "max_rows": 8,
            "max_length": MAX_LENGTH,
            "probes": PROBES,
            "reference": reference or reference_of(folder),
            "max_mismatch": MAX_MISMATCH,
            "settings": SETTINGS,
            **options,
        },
    )


def other_weights(weights, seed):
    """Every tensor changed."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
