"""Two Qwen3 with parameters that vLLM's reload loses, filled as vLLM fills the sinks of DeepSeek-V4: by
`copy_`, without a weight loader.

    sinks  a number a head, which scales the head's output; the reload puts the old ones back and says so
    gains  a factor beside a norm's weight; its layer receives another tensor, so the reload says nothing

Both can be folded into the plain weights, which gives the reference.
"""

import torch
from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

HEADS = 4


class _Lossy(Qwen3ForCausalLM):
    extra = ""

    def load_weights(self, weights):
        params, rest = dict(self.named_parameters()), []
        for name, tensor in weights:
            if name.endswith(self.extra):
                params[name].data[: len(tensor)].copy_(tensor)
            else:
                rest.append((name, tensor))
        return super().load_weights(rest) | {name for name in params if name.endswith(self.extra)}


class SinkQwen3ForCausalLM(_Lossy):
    extra = "attn_sink"

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.model.layers:
            attention = layer.self_attn
            attention.attn_sink = nn.Parameter(torch.zeros(2 * HEADS), requires_grad=False)  # padded, as V4's
            attention.o_proj.register_forward_pre_hook(
                lambda module, args, a=attention: (scaled(args[0], a.attn_sink[:HEADS]),)
            )


class GainQwen3ForCausalLM(_Lossy):
    extra = "gain"

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for layer in self.model.layers:
            norm = layer.input_layernorm
            norm.gain = nn.Parameter(torch.ones(1), requires_grad=False)
            layer.self_attn.qkv_proj.register_forward_pre_hook(
                lambda module, args, n=norm: (args[0] * n.gain,)
            )


MODELS = {cls.__name__: cls for cls in (SinkQwen3ForCausalLM, GainQwen3ForCausalLM)}
for name, cls in MODELS.items():
    ModelRegistry.register_model(name, cls)


def scaled(heads, sink):
    """[…, H C] with each head times the sigmoid of its sink [H]."""
    return (heads.unflatten(-1, (HEADS, -1)) * sink.sigmoid()[:, None]).flatten(-2)


def with_extra(weights, extra, seed):
    """`weights` and the extra tensors of the two layers."""
    generator = torch.Generator().manual_seed(seed)
    new = dict(weights)
    for layer in (0, 1):
        if extra == "attn_sink":
            sink = 2 * torch.randn(HEADS, generator=generator)
            new[f"model.layers.{layer}.self_attn.attn_sink"] = sink
        else:
            new[f"model.layers.{layer}.input_layernorm.gain"] = torch.rand(1, generator=generator) + 0.5
    return new


def folded(weights):
    """The plain Qwen3 that computes the same."""
    plain = {name: tensor for name, tensor in weights.items() if not name.endswith(("attn_sink", "gain"))}
    for layer in (0, 1):
        own = f"model.layers.{layer}."
        if (sink := weights.get(f"{own}self_attn.attn_sink")) is not None:
            plain[f"{own}self_attn.o_proj.weight"] = scaled(plain[f"{own}self_attn.o_proj.weight"], sink)
        if (gain := weights.get(f"{own}input_layernorm.gain")) is not None:
            plain[f"{own}input_layernorm.weight"] = plain[f"{own}input_layernorm.weight"] * gain
    return plain
