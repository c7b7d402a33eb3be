"""A dense model with random weights that vLLM's CPU build serves, and the engine over it."""

from pathlib import Path

import torch

VOCAB_SIZE = 288
PROBES = [list(range(5 + shift, 45 + shift)) for shift in (0, 60, 120)]


def write_checkpoint(folder: Path, seed: int = 0) -> dict[str, torch.Tensor]:
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
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,  # peaked enough that log-probabilities vary
    )
    model = Qwen3ForCausalLM(config).float()
    model.save_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def other_weights(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Every tensor changed."""
    generator = torch.Generator().manual_seed(seed)
    return {k: v + 0.05 * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
