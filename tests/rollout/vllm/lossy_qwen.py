"""A Qwen3 whose layers have what vLLM's reload loses: a sink a head, and a gain beside a norm's weight.

Both are filled as vLLM fills the sinks of DeepSeek-V4: `copy_` into the parameter, no weight loader. So a reload
puts the sinks back to their old values, and leaves the gains, whose layer receives other tensors, to whatever
memory it gets. Sinks scale the heads' outputs, gains what their norm gives.
"""

import re

import torch
from tiny_qwen import PROBES
from torch import nn
from transformers import Qwen3ForCausalLM as HuggingFace
from vllm import ModelRegistry
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

ARCHITECTURE = "LossyQwen3ForCausalLM"
EXTRA = re.compile(r"model\.layers\.(\d+)\.(self_attn\.attn_sink|input_layernorm\.gain)$")
__all__ = ["ARCHITECTURE", "PROBES", "Lossy", "extra_tensors", "lossy_reference"]


def extra_tensors(weights, heads, seed):
    """Sinks and gains for the layers that `weights` has."""
    generator = torch.Generator().manual_seed(seed)
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    sinks = {f"model.layers.{i}.self_attn.attn_sink": torch.randn(heads, generator=generator) for i in layers}
    gains = {f"model.layers.{i}.input_layernorm.gain": torch.randn(1, generator=generator) + 2 for i in layers}
    return sinks | gains


def _scale_heads(sink, heads):
    return lambda module, args: ((args[0].unflatten(-1, (heads, -1)) * (2 * sink[:heads, None]).sigmoid()).flatten(-2),)


class Lossy(Qwen3ForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        heads = vllm_config.model_config.hf_config.num_attention_heads
        for layer in self.model.layers:
            attention, norm = layer.self_attn, layer.input_layernorm
            attention.attn_sink = nn.Parameter(torch.zeros(2 * heads), requires_grad=False)  # padded, as V4's
            norm.gain = nn.Parameter(torch.ones(1), requires_grad=False)
            attention.o_proj.register_forward_pre_hook(
                lambda module, args, a=attention: _scale_heads(a.attn_sink, heads)(module, args)
            )
            attention.qkv_proj.register_forward_pre_hook(lambda module, args, n=norm: (args[0] * n.gain,))

    def load_weights(self, weights):
        params, rest, loaded = dict(self.named_parameters()), [], set()
        for name, tensor in weights:
            if EXTRA.match(name):
                params[name][: len(tensor)].data.copy_(tensor)
                loaded.add(name)
            else:
                rest.append((name, tensor))
        return loaded | super().load_weights(rest)


ModelRegistry.register_model(ARCHITECTURE, Lossy)


def lossy_reference(reference):
    """The same model by transformers; `reference` scores its plain part."""

    def score(weights, sequences):
        plain = {name: tensor for name, tensor in weights.items() if not EXTRA.match(name)}
        taken = {}

        def catch(module, args):
            taken[id(module)] = module

        handle = nn.modules.module.register_module_forward_pre_hook(catch)
        handle.remove()
        return reference(plain, sequences, extra={n: t for n, t in weights.items() if EXTRA.match(n)})

    return score
