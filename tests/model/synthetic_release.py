"""A released checkpoint in miniature: every name, type and file, random contents, nothing canonical.

Written with the safetensors library from bytes drawn at random, so that neither the number formats nor
the writer under test had a hand in it. `RELEASED` is small enough for seconds and wide enough for more
than one tile; its matrices are whole tiles or less than one, as transformers needs it.
"""

import json
from dataclasses import replace

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from consilience.model.checkpoint import expected_shapes
from consilience.model.config import TINY

RELEASED = replace(
    TINY,
    vocab_size=48,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=128,
    o_groups=2,
    o_lora_rank=64,
    sliding_window=16,
    compress_ratios=(0, 4, 128, 4),
    index_n_heads=3,
    index_head_dim=32,
    index_topk=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    num_hash_layers=1,
    num_nextn_predict_layers=1,
    mtp_compress_ratios=(0,),
    torch_dtype="bfloat16",
)
QUANTIZED = ("wq_a", "wq_b", "wo_a", "wo_b", "e_proj", "h_proj")
QUANTIZATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip


def is_fp8(name):
    """Table 11.1's FP8 rows, said once more: the test's own reading of it."""
    parts = name.split(".")
    if "compressor" in parts or parts[-1] != "weight":
        return False
    return parts[-2] in QUANTIZED or "shared_experts" in parts or parts[-3:-1] == ["attn", "wkv"]


def is_fp32(name):
    return "hc_" in name or name.endswith(("attn_sink", ".ape", "gate.bias"))


def fp8_codes(shape, g):
    """Every e4m3 code but the two NaNs: denormals and both zeros among them."""
    codes = torch.randint(0, 254, shape, generator=g, dtype=torch.int16)
    codes = codes + (codes >= 0x7F)  # 0x7F is left out; 0xFF is beyond 254
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def scales(shape, g, dtype=torch.float8_e8m0fnu):
    """Powers of two from 2^-21 to 2^-2, not those an encoder would choose."""
    exponents = torch.randint(106, 126, shape, generator=g, dtype=torch.int16).to(torch.uint8)
    return exponents.view(torch.float8_e8m0fnu).to(dtype)


def release_tensors(config=RELEASED, seed=0, *, experts="fp4", scale_dtype=torch.float8_e8m0fnu):
    """Name -> tensor of the official layout; experts "fp4" or "fp8", fp8 scales e8m0 or float32."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_shapes(config).items():
        is_expert = ".ffn.experts." in name
        scale = name.removesuffix("weight") + "scale"
        if is_expert and experts == "fp4":
            tensors[name] = torch.randint(-128, 128, (shape[0], shape[1] // 2), generator=g, dtype=torch.int8)
            tensors[scale] = scales((shape[0], -(-shape[1] // 32)), g)
        elif is_expert or is_fp8(name):
            tensors[name] = fp8_codes(shape, g)
            tensors[scale] = scales([-(-size // 128) for size in shape], g, scale_dtype)
        elif name.endswith("tid2eid"):
            tensors[name] = torch.randint(0, config.n_routed_experts, shape, generator=g)
        else:
            dtype = torch.float32 if is_fp32(name) else torch.bfloat16
            tensors[name] = torch.randn(shape, generator=g).to(dtype)
    wide = tensors["layers.1.attn.wo_b.weight"].view(torch.uint8)
    wide[:128] = 0x80  # a tile of minus zeros
    tensors["layers.1.ffn.experts.1.w1.weight" if experts == "fp4" else "layers.0.attn.wq_a.weight"].view(
        torch.uint8
    )[:, :16] = 0  # blocks of zeros, with scales that no encoder would choose
    return tensors


def release_config(config=RELEASED, experts="fp4", **changes):
    """config.json as released: order of its own, keys that mean nothing to the model."""
    row = {"use_cache": True, **config.to_json_dict(), "quantization_config": QUANTIZATION}
    row |= {"expert_dtype": experts, "ep_size": 1, "transformers_version": "4.57.1", "note": "é ü"}
    return row | changes


def write_folder(folder, tensors, row, num_shards=3):
    """Shards of contiguous thirds with an index, and config.json; num_shards 1: a single file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    size = -(-len(names) // num_shards)
    weight_map = {}
    for number in range(num_shards):
        part = names[number * size : (number + 1) * size]
        file = f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        file = file if num_shards > 1 else "model.safetensors"
        save_file({n: tensors[n].contiguous() for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if num_shards > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(row, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return folder


def write_official(folder, config=RELEASED, seed=0, num_shards=3, experts="fp4", **kwargs):
    """The whole of it in a folder."""
    tensors = release_tensors(config, seed, experts=experts, **kwargs)
    return write_folder(folder, tensors, release_config(config, experts), num_shards)


def dspark(folder):
    """Three stages under mtp.*, of other tensors than a V4 block; 3 ratios more than layers."""
    tensors = {n: t for n, t in release_tensors().items() if not n.startswith("mtp.")}
    for stage in range(3):
        tensors[f"mtp.{stage}.main_proj.weight"] = torch.ones(256, 768, dtype=torch.float8_e4m3fn)
        tensors[f"mtp.{stage}.main_proj.scale"] = torch.ones(2, 6, dtype=torch.float8_e8m0fnu)
        tensors[f"mtp.{stage}.attn.wkv.weight"] = torch.ones(64, 256, dtype=torch.float8_e4m3fn)
        tensors[f"mtp.{stage}.attn.wkv.scale"] = torch.ones(1, 2, dtype=torch.float8_e8m0fnu)
        tensors[f"mtp.{stage}.confidence"] = torch.tensor(0.5)
    ratios = [*RELEASED.compress_ratios, 0, 0, 0]
    return write_folder(folder, tensors, release_config(compress_ratios=ratios))


def hf_model(dtype=torch.float32):
    """The same sizes as transformers' own model, random weights."""
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**RELEASED.to_transformers_dict())).to(dtype)
    for layer in model.model.layers:
        if hasattr(layer.mlp.gate, "tid2eid"):
            layer.mlp.gate.tid2eid.random_(RELEASED.n_routed_experts)
    return model
