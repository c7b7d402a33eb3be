"""The two dialects of `config.json` (specification 1), DeepSeek's and transformers', read.

What V4 has only one value of is checked, never assumed, and a field that decides arithmetic is
never filled in from a default. `config_layouts.py` writes both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consilience.conf.errors import ConfigError

Row = Mapping[str, Any]

# V4 knows one value of each; a file that names another describes another architecture.
FIXED: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
}
QUANTIZATION: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
EXPERT_DTYPES = ("fp4", "fp8", "bf16")
LAYER_TYPES = {0: "sliding_attention", 4: "compressed_sparse_attention"}
HCA_TYPE = "heavily_compressed_attention"
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank",
    "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "hc_mult",
    "hc_sinkhorn_iters", "max_position_embeddings",
)  # fmt: skip
NUMBERS = ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
OPTIONAL = {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 1}
ROPE_KEYS = {
    "rope_factor": "factor",
    "rope_original_length": "original_max_position_embeddings",
    "rope_beta_fast": "beta_fast",
    "rope_beta_slow": "beta_slow",
}


def read_fields(row: Row) -> dict[str, Any]:
    """Fields of `ModelConfig` from a config.json table of either dialect.

    Without `expert_dtype` that field is None: the tensors decide (`released_checkpoint.py`). More MTP
    ratios than `num_nextn_predict_layers` are DSpark's stages, another module under the same names:
    the trunk alone is read (`num_nextn_predict_layers` 0). ConfigError names a missing field, or the
    one with a value V4 does not have.
    """
    if "model_type" not in row:
        raise ConfigError(
            "the field model_type is missing; the file wanted is the config.json beside the weights "
            "(inference/config.json is the release code's own)"
        )
    for name, value in FIXED.items():
        if name in row and row[name] != value:
            raise ConfigError(f"{name} is {row[name]!r}, V4 has only {value!r}: this is another architecture")
    if row.get("mlp_bias", False) is not False:
        raise ConfigError(f"mlp_bias is {row['mlp_bias']!r}, V4 has no biases: this is another architecture")
    values: dict[str, Any] = {name: _integer(row, name) for name in SIZES}
    values |= {name: _number(row, name) for name in NUMBERS}
    values |= {name: _integer({name: row.get(name, default)}, name) for name, default in OPTIONAL.items()}
    values["initializer_range"] = _number({"initializer_range": 0.02} | dict(row), "initializer_range")
    values["qk_rope_head_dim"] = _rope_width(row, values["head_dim"])
    values |= _read_schedule(row, values["num_hidden_layers"])
    values |= _read_rope(row, values["qk_rope_head_dim"] / values["head_dim"])
    values["torch_dtype"] = _read_dtype(row)
    values["expert_dtype"] = read_expert_dtype(row)
    return values


def read_expert_dtype(row: Row) -> str | None:
    """How routed experts are stored: "fp4", "fp8", "bf16", or None where the file does not say.

    The name lies at the top or in `quantization_config`. ConfigError on another type, and on a
    quantisation that is not V4's (e4m3, power-of-two scales, tiles of 128 x 128).
    """
    quantization = row.get("quantization_config") or {}
    for name in ("fmt", "quant_method", "scale_fmt", "weight_block_size"):
        found = quantization.get(name)
        if found is not None and found != QUANTIZATION[name]:
            raise ConfigError(f"quantization_config.{name} is {found!r}, V4 has {QUANTIZATION[name]!r}")
    named = {d for d in (row.get("expert_dtype"), quantization.get("expert_dtype")) if d is not None}
    if len(named) > 1:
        raise ConfigError(
            f"expert_dtype is {sorted(named)} at once; top level and quantization_config differ"
        )
    if not named <= set(EXPERT_DTYPES):
        raise ConfigError(f"expert_dtype is {named.pop()!r}; allowed are {', '.join(EXPERT_DTYPES)}")
    return named.pop() if named else None


def _read_schedule(row: Row, num_layers: int) -> dict[str, Any]:
    """Ratios of the layers and of the MTP blocks, and how many layers route by hash."""
    ratios, mtp_ratios = _ratios(row, num_layers)
    if "num_hash_layers" in row:
        num_hash = _integer(row, "num_hash_layers")
    else:
        kinds = _sequence(row, "mlp_layer_types", "num_hash_layers or mlp_layer_types")
        num_hash = list(kinds).count("hash_moe")
        if list(kinds) != ["hash_moe"] * num_hash + ["moe"] * (num_layers - num_hash):
            raise ConfigError(
                f"mlp_layer_types is {list(kinds)}; V4 has hash_moe in the first layers, moe in the rest, "
                f"{num_layers} in all"
            )
    num_mtp = _integer({"num_nextn_predict_layers": 0} | dict(row), "num_nextn_predict_layers")
    if mtp_ratios and len(mtp_ratios) < num_mtp:
        raise ConfigError(f"compress_ratios has {len(mtp_ratios)} entries for {num_mtp} MTP blocks")
    if len(mtp_ratios) > num_mtp:
        num_mtp, mtp_ratios = 0, ()
    if any(mtp_ratios):
        raise ConfigError(f"compress_ratios gives the MTP block ratio {max(mtp_ratios)}; V4's is 0")
    return {
        "compress_ratios": ratios,
        "num_hash_layers": num_hash,
        "num_nextn_predict_layers": num_mtp,
        "mtp_compress_ratios": (0,) * num_mtp,
    }


def _ratios(row: Row, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """compress_ratios, or layer_types with compress_rates; without either nothing is guessed."""
    given: list[int] = []
    if row.get("compress_ratios") is not None:
        given = [_whole("compress_ratios", r) for r in _sequence(row, "compress_ratios")]
        if len(given) < num_layers:
            raise ConfigError(f"compress_ratios has {len(given)} entries for {num_layers} layers")
    if row.get("layer_types") is None:
        if not given:
            raise ConfigError(
                "compress_ratios (or layer_types) is missing; the layer pattern is never guessed"
            )
        return tuple(given[:num_layers]), tuple(given[num_layers:])
    rates = dict(row.get("compress_rates") or {})
    rates |= {LAYER_TYPES[4]: row["compress_rate_csa"]} if "compress_rate_csa" in row else {}
    rates |= {HCA_TYPE: row["compress_rate_hca"]} if "compress_rate_hca" in row else {}
    names = list(_sequence(row, "layer_types"))
    rates[LAYER_TYPES[0]] = 0
    unknown = [name for name in names if name not in rates]
    if unknown or len(names) != num_layers:
        what = f"names {unknown[0]!r} without a rate" if unknown else f"has {len(names)} entries"
        raise ConfigError(f"layer_types {what}; {num_layers} of {', '.join(sorted(rates))} are needed")
    if rates.get(LAYER_TYPES[4], 4) != 4 or rates.get(HCA_TYPE) == 4:
        raise ConfigError(f"compress_rates is {row.get('compress_rates')}; ratio 4 is CSA's and CSA's alone")
    ratios = [_whole("compress_rates", rates[name]) for name in names]
    if given and given[:num_layers] != ratios:
        raise ConfigError("compress_ratios and layer_types describe different layers")
    return tuple(ratios), tuple(given[num_layers:])


def _read_rope(row: Row, share: float) -> dict[str, Any]:
    """Both thetas and YaRN's four numbers; without a scaling the factor is 1, which is no YaRN."""
    nested = row.get("rope_parameters") or {}
    found = []
    if isinstance(nested.get("main"), Mapping) and isinstance(nested.get("compress"), Mapping):
        main, compress = nested["main"], nested["compress"]
        if main.get("rope_type", "default") != "default":
            raise ConfigError(f"rope_parameters.main is of type {main['rope_type']!r}, V4's is 'default'")
        for table in (main, compress):
            if table.get("partial_rotary_factor", share) != share:
                raise ConfigError(
                    f"rope_parameters.partial_rotary_factor is not {share}, as the heads have it"
                )
        thetas = {
            "rope_theta": _number(main, "rope_theta"),
            "compress_rope_theta": _number(compress, "rope_theta"),
        }
        for name, theta in thetas.items():
            if row.get(name, theta) != theta:
                raise ConfigError(f"{name} is {row[name]} at the top and {theta} in rope_parameters")
        found.append(_yarn(compress))
    else:
        thetas = {name: _number(row, name) for name in ("rope_theta", "compress_rope_theta")}
        if nested:
            found.append(_yarn(nested))
    if row.get("rope_scaling"):
        found.append(_yarn(row["rope_scaling"]))
    if len(found) == 2 and found[0] != found[1]:
        raise ConfigError("rope_scaling and rope_parameters describe different tables")
    return thetas | (found[0] if found else {"rope_factor": 1.0})


def _yarn(table: Row) -> dict[str, Any]:
    kind = table.get("rope_type", table.get("type", "default"))
    if kind == "default":
        return {"rope_factor": 1.0}
    if kind != "yarn":
        raise ConfigError(f"the RoPE scaling is of type {kind!r}; V4 has 'yarn' or none")
    for name in ("attention_factor", "mscale", "mscale_all_dim"):
        if table.get(name) not in (None, 1):
            raise ConfigError(f"the RoPE scaling has {name} {table[name]}; V4 does not scale cos and sin")
    whole = {"beta_fast": 32.0, "beta_slow": 1.0} | dict(table)  # YaRN's own, as its paper states them
    values: dict[str, Any] = {ours: _number(whole, theirs) for ours, theirs in ROPE_KEYS.items()}
    return values | {"rope_original_length": _integer(whole, "original_max_position_embeddings")}


def _rope_width(row: Row, head_dim: int) -> int:
    share = row.get("partial_rotary_factor")
    if row.get("qk_rope_head_dim") is None:
        if share is None:
            raise ConfigError("qk_rope_head_dim (or partial_rotary_factor) is missing")
        return _whole("head_dim · partial_rotary_factor", head_dim * _number(row, "partial_rotary_factor"))
    width = _integer(row, "qk_rope_head_dim")
    if share is not None and head_dim * share != width:
        raise ConfigError(f"qk_rope_head_dim is {width}, partial_rotary_factor makes it {head_dim * share:g}")
    return width


def _read_dtype(row: Row) -> str:
    named = row.get("torch_dtype") or row.get("dtype") or "bfloat16"
    if named not in ("bfloat16", "float32", "float16", "float64"):
        raise ConfigError(f"torch_dtype is {named!r}; allowed are bfloat16, float32, float16, float64")
    return named


def _sequence(row: Row, name: str, wanted: str = "") -> Sequence[Any]:
    if not isinstance(row.get(name), list | tuple):
        raise ConfigError(f"{wanted or name} is missing" if name not in row else f"{name} must be a list")
    return row[name]


def _integer(row: Row, name: str) -> int:
    if row.get(name) is None:
        raise ConfigError(f"{name} is missing")
    return _whole(name, row[name])


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ConfigError(f"{name} is {value!r}, a whole number is needed")
    return int(value)


def _number(row: Row, name: str) -> float:
    value = row.get(name)
    if value is None:
        raise ConfigError(f"{name} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}, a number is needed")
    return float(value)
