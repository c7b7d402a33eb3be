"""transformers' DeepseekV4ForCausalLM with the weights of one of our models: an oracle for tests and benches.

Names follow specification 11.1's last column. Only tests and bench/ import transformers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consilience.model.checkpoint import official_name
from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.transformer import Transformer

RENAMES = [
    ("embed.weight", "model.embed_tokens.weight"),
    ("head.weight", "lm_head.weight"),
    ("hc_head_", "model.hc_head.hc_"),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attn.indexer.compressor.wkv", ".attn.compressor.indexer.kv_proj"),
    (".attn.indexer.compressor.wgate", ".attn.compressor.indexer.gate_proj"),
    (".attn.indexer.compressor.ape", ".attn.compressor.indexer.position_bias"),
    (".attn.indexer.compressor.norm", ".attn.compressor.indexer.kv_norm"),
    (".attn.indexer.wq_b", ".attn.compressor.indexer.q_b_proj"),
    (".attn.indexer.weights_proj", ".attn.compressor.indexer.scorer.weights_proj"),
    (".attn.compressor.wkv", ".attn.compressor.kv_proj"),
    (".attn.compressor.wgate", ".attn.compressor.gate_proj"),
    (".attn.compressor.ape", ".attn.compressor.position_bias"),
    (".attn.compressor.norm", ".attn.compressor.kv_norm"),
    (".attn.attn_sink", ".attn.sinks"),
    (".wq_a.", ".q_a_proj."),
    (".q_norm.", ".q_a_norm."),
    (".attn.wq_b.", ".attn.q_b_proj."),
    (".attn.wkv.", ".attn.kv_proj."),
    (".wo_a.", ".o_a_proj."),
    (".wo_b.", ".o_b_proj."),
    (".attn.", ".self_attn."),
    (".gate.bias", ".gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"),
    ("shared_experts.w3", "shared_experts.up_proj"),
    (".ffn.", ".mlp."),
]

SAME = [
    "vocab_size",
    "hidden_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "routed_scaling_factor",
    "rope_theta",
    "compress_rope_theta",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "swiglu_limit",
    "sliding_window",
    "o_groups",
    "o_lora_rank",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "rms_norm_eps",
    "qk_rope_head_dim",
    "num_hash_layers",
    "max_position_embeddings",
]

KINDS = {SLIDING: "sliding_attention", CSA_RATIO: "compressed_sparse_attention"}
HCA = "heavily_compressed_attention"


def hf_name(official: str) -> str:
    """transformers' name of an official one (routed experts are stacked there, see `expert_parts`)."""
    for ours, theirs in RENAMES:
        official = official.replace(ours, theirs)
    return official if official.startswith(("model.", "lm_head.")) else f"model.{official}"


def hf_config(config: ModelConfig):
    """The DeepseekV4Config that says what `config` says."""
    from transformers import DeepseekV4Config, logging

    logging.set_verbosity_error()  # it warns of every YaRN factor that is not the ratio of two lengths
    hca = {ratio for ratio in config.compress_ratios if ratio not in KINDS}
    assert len(hca) <= 1, "transformers has one ratio for all HCA layers"
    yarn = {
        "rope_type": "yarn",
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_length,
        "beta_fast": config.rope_beta_fast,
        "beta_slow": config.rope_beta_slow,
    }
    return DeepseekV4Config(
        **{name: getattr(config, name) for name in SAME},
        layer_types=[KINDS.get(ratio, HCA) for ratio in config.compress_ratios],
        compress_rates={KINDS[CSA_RATIO]: CSA_RATIO, HCA: max(hca, default=128)},
        rope_parameters=yarn,
        attn_implementation="eager",
    )


def hf_state(model: Transformer) -> dict[str, Tensor]:
    """The model's tensors under transformers' names, w1 above w3 in one stack."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if ".experts.w" not in name and not name.startswith("mtp."):
            tensors[hf_name(official_name(name))] = tensor
    for layer, block in enumerate(model.layers):
        experts = block.ffn.experts
        stem = f"model.layers.{layer}.mlp.experts"
        tensors[f"{stem}.gate_up_proj"] = torch.cat((experts.w1, experts.w3), 1).detach()
        tensors[f"{stem}.down_proj"] = experts.w2.detach()
    return tensors


def hf_twin(model: Transformer):
    """DeepseekV4ForCausalLM in fp32 with the model's weights; strict, so every name is accounted for."""
    from transformers import DeepseekV4ForCausalLM

    twin = DeepseekV4ForCausalLM(hf_config(model.config))
    twin.load_state_dict(hf_state(model), strict=True)
    return twin.eval()


def hf_gradients(model: Transformer, twin) -> dict[str, Tensor | None]:
    """The twin's gradients under our parameter names; None where the twin has none."""
    theirs = {name: p.grad for name, p in twin.named_parameters()}
    return under_our_names([name for name, _ in model.named_parameters()], theirs)


def under_our_names(names: Iterable[str], theirs: Mapping[str, Tensor | None]) -> dict[str, Any]:
    """What `theirs` has for each of our parameters or buffers; None where it has nothing."""
    found = {}
    for name in names:
        if ".ffn.experts." in name:
            stem, leaf = f"model.{name.replace('.ffn.', '.mlp.')}".rsplit(".", 1)
            gate, up = theirs[f"{stem}.gate_up_proj"].chunk(2, dim=1)
            found[name] = {"w1": gate, "w3": up, "w2": theirs[f"{stem}.down_proj"]}[leaf]
        else:
            found[name] = theirs.get(hf_name(official_name(name)))
    return found


def take_lowest_of_equals(twin) -> None:
    """Make the twin's top-k take the lowest index of exactly equal index scores.

    torch.topk leaves open which of them it takes, and ReLU makes such ties common where index heads are
    few. The picks are made again, from the twin's own scores, by a stable sort.
    """

    @dataclass
    class Last:
        scores: Tensor | None = None

    for layer in twin.model.layers:
        indexer = getattr(layer.self_attn.compressor, "indexer", None)
        if indexer is None:
            continue
        last = Last()

        def keep(_, __, output, last=last) -> None:
            last.scores = output

        def choose(module, args, output, last=last) -> Tensor:
            position = args[2]
            entry = torch.arange(last.scores.shape[-1], device=last.scores.device)
            hidden = entry >= ((position + 1) // module.compress_rate)[..., None]
            ranked = last.scores.masked_fill(hidden, float("-inf")).sort(dim=-1, descending=True, stable=True)
            picks = ranked.indices[..., : module.index_topk]
            return picks.masked_fill(hidden.expand_as(ranked.values).gather(-1, picks), -1)

        indexer.scorer.register_forward_hook(keep)
        indexer.register_forward_hook(choose)
