"""The layouts of `config.json`, written: DeepSeek's and transformers' (specification 1, 11.3)."""

from __future__ import annotations

from typing import Any

from consilience.conf.errors import ConfigError
from consilience.model.config_json import (
    FIXED,
    HCA_TYPE,
    LAYER_TYPES,
    QUANTIZATION,
    ROPE_KEYS,
    Row,
    read_fields,
)

# What a dialect says in its own words: gone when a table is rewritten in the other.
DEEPSEEK_WORDS = ("compress_ratios", "num_hash_layers", "rope_scaling", "torch_dtype", "topk_method")
TRANSFORMERS_WORDS = (
    "layer_types", "mlp_layer_types", "compress_rates", "compress_rate_csa", "compress_rate_hca",
    "rope_parameters", "partial_rotary_factor", "dtype", "mlp_bias",
)  # fmt: skip
STORAGE_WORDS = ("torch_dtype", "dtype", "expert_dtype", "quantization_config")


def write_official(values: Row) -> dict[str, Any]:
    """The released layout: `rope_scaling` as a table, the ratios of the MTP blocks appended."""
    row = {name: value for name, value in values.items() if name not in ROPE_KEYS}
    row["compress_ratios"] = [*row["compress_ratios"], *row.pop("mtp_compress_ratios")]
    if row["expert_dtype"] is None:
        row.pop("expert_dtype")
    scaling = {"type": "yarn"} | {theirs: values[ours] for ours, theirs in ROPE_KEYS.items()}
    head = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": FIXED["model_type"]}
    return head | row | {"rope_scaling": scaling} | {k: v for k, v in FIXED.items() if k != "model_type"}


def write_transformers(values: Row) -> dict[str, Any]:
    """The layout `transformers` saves: layer kinds by name, RoPE tables by use, nothing quantised.

    ConfigError if layers of two different HCA ratios make that impossible.
    """
    wide = sorted({r for r in values["compress_ratios"] if r not in LAYER_TYPES})
    if len(wide) > 1:
        raise ConfigError(f"transformers has one HCA ratio a model, this one has {wide}")
    share = values["qk_rope_head_dim"] / values["head_dim"]
    main = {"partial_rotary_factor": share, "rope_theta": values["rope_theta"], "rope_type": "default"}
    compress = {"partial_rotary_factor": share, "rope_theta": values["compress_rope_theta"]}
    compress |= {"rope_type": "yarn", "attention_factor": 1.0}
    compress |= {theirs: values[ours] for ours, theirs in ROPE_KEYS.items()}
    official = write_official(values)
    kept = {k: v for k, v in official.items() if k not in (*DEEPSEEK_WORDS, "expert_dtype")}
    num_layers = values["num_hidden_layers"]
    num_hash = min(values["num_hash_layers"], num_layers)
    return kept | {
        "layer_types": [LAYER_TYPES.get(r, HCA_TYPE) for r in values["compress_ratios"]],
        "compress_rates": {LAYER_TYPES[4]: 4, HCA_TYPE: wide[0] if wide else 128},
        "mlp_layer_types": ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash),
        "partial_rotary_factor": share,
        "rope_parameters": {"compress": compress, "main": main},
        "dtype": values["torch_dtype"],
    }


def rewrite(row: Row, layout: str, experts: str, dtype: str, num_mtp: int) -> dict[str, Any]:
    """The table `row` for weights stored anew; what a reader need not know stays as it was.

    layout   "official" (quantised), "native" (official names, nothing quantised) or "transformers"
    experts  how routed experts are stored: "fp4", "fp8" or "bf16"
    dtype    of everything that is not quantised
    num_mtp  MTP blocks that are stored with it
    """
    values = read_fields(row) | {"torch_dtype": dtype, "expert_dtype": None}
    values |= {"num_nextn_predict_layers": num_mtp, "mtp_compress_ratios": (0,) * num_mtp}
    renewed = {*STORAGE_WORDS, "compress_ratios", "num_nextn_predict_layers"}
    if layout == "transformers":
        fresh, foreign = write_transformers(values), DEEPSEEK_WORDS
    else:
        fresh, foreign = write_official(values), TRANSFORMERS_WORDS
    if layout == "official":
        quantization = dict(row.get("quantization_config") or QUANTIZATION)
        if "expert_dtype" in quantization:
            quantization["expert_dtype"] = experts
        fresh |= {"quantization_config": quantization, "expert_dtype": experts}
    gone = {*foreign, *(renewed - fresh.keys())}
    kept = {k: fresh[k] if k in renewed else v for k, v in row.items() if k not in gone}
    return kept | {k: v for k, v in fresh.items() if k not in kept}
