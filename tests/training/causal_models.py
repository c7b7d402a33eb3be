"""Tiny causal models of transformers as checkpoint folders, made from nothing that is downloaded."""

import json

import torch

VOCAB_SIZE = 40
TOKENIZER = {"added_tokens": [{"id": 1, "content": "<eos>", "special": True}], "model": {}}
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
KINDS = {
    "Llama": {"num_key_value_heads": 1},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
    "GPTNeoX": {},
    "GPT2": {},
    "Mixtral": {"num_key_value_heads": 1, "num_local_experts": 4},
}


def build(kind, seed=0, **changes):
    """A model with random weights, norms included."""
    import transformers

    torch.manual_seed(seed)
    settings = SIZES | KINDS.get(kind, {}) | changes
    if kind == "GPT2":
        settings["n_inner"] = settings.pop("intermediate_size")
    model = getattr(transformers, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
        getattr(transformers, f"{kind}Config")(**settings)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def write(folder, model, dtype=torch.float32):
    """The folder as a release has it: config, weights, tokenizer, no card."""
    model.to(dtype).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder
