"""A V4 model that has everything, batches for it and one training step, for tests on several ranks."""

import re
from dataclasses import replace

import numpy as np
import torch

from consilience.grpo.sft import index_queries
from consilience.model.config import TINY
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.transformer import Transformer
from consilience.training.forward import hidden_at_loss, mtp_loss
from consilience.training.packing import pack, split_micro_batches
from consilience.training.torch_engine import OptimizerSettings
from tests.ranks_table import keep

# A sliding window alone, CSA with its indexer, HCA; hash and learned routers; a prediction block.
CONFIG = replace(
    TINY,
    vocab_size=48,
    hidden_size=16,
    num_attention_heads=2,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_lora_rank=8,
    sliding_window=8,
    index_head_dim=8,
    index_topk=4,
    n_routed_experts=4,
    moe_intermediate_size=8,
    num_nextn_predict_layers=1,
    mtp_compress_ratios=(0,),
)
# With AdamW's 1e-20 a gradient of rounding alone would become a whole step.
SETTINGS = OptimizerSettings(lr=1e-4, bias_speed=0.1, eps=1e-6)
# The streams enter layer 0 as copies, and a norm follows on what is read of them: neither the weights of
# reading nor those of mixing change anything there. Their gradient is rounding, brought to full size by Muon.
_N = CONFIG.hc_mult
HAS_GRADIENT = {f"layers.0.hc_attn.{name}": slice(_N, 2 * _N) for name in ("fn", "base")}
HAS_GRADIENT["layers.0.hc_attn.scale"] = slice(1, 2)


def v4_model(dtype=torch.float32, seed=0):
    return initialize(Transformer(CONFIG), seed).to(dtype)


def packed_rows(step=0):
    """One long sample, so that HCA has entries, and eleven short ones."""
    rng = np.random.default_rng(step)
    lengths = [150, *rng.integers(20, 60, 11)]
    ids = [rng.integers(2, 48, n) for n in lengths]
    weights = [(np.arange(n) > 4).astype(np.float32) * rng.choice([0.5, 1.0]) for n in lengths]
    return pack(ids, weights, quantum=160, max_row_tokens=160)


def supervised(engine, packed, micro_tokens=160):
    """Gradients of next-token, balance, indexer and MTP losses; the report and the experts' load."""
    trace = Trace(wants_losses=True)
    denominator, num_queries = packed.loss_weight, index_queries(packed)

    def loss_fn(model, micro):
        trace.start_losses()
        at = hidden_at_loss(model, micro, trace, wants_mtp=True)
        nll = -(linear_logprob(at.hidden, model.head.weight, at.target_ids).logprob * at.weight).sum()
        ahead, index_kl = mtp_loss(at, model.head.weight), trace.summed_indexer_loss()
        loss = (nll + 0.3 * ahead) / denominator + index_kl / num_queries
        loss = loss + 0.01 / len(packed.lengths) * sum(trace.balance_loss)
        sums = {"nll": float(nll.detach()), "tokens": float(at.weight.numel())}
        return loss, sums | {"max_weight": float(micro.loss_mask.max())}

    parts = split_micro_batches(packed, micro_tokens)
    return engine.forward_backward(loss_fn, parts, {"nll": denominator}), trace.expert_load


def train(engine, num_steps, micro_tokens=160, first=0):
    """Reports of so many updates."""
    reports = []
    for step in range(first, first + num_steps):
        report, load = supervised(engine, packed_rows(step), micro_tokens)
        reports.append(report | engine.step(1.0, load))
    return reports


def copies(tensors):
    """Tensors as numpy arrays of their own, which travel between processes by value."""
    return {name: tensor.detach().cpu().numpy().copy() for name, tensor in tensors.items()}


def assert_close(found, expected, tolerance, *, is_update=False):
    """Within `tolerance` of each tensor's largest value, but where there is no gradient to be equal.

    Weights that began at 0 have only their few updates: the largest value of any is taken as 0.01 at least.

    A mixing matrix has fixed sums: in 7 of its 16 directions the gradient is rounding, raised by Muon's eight
    fast steps 3.4^8 = 2e4-fold. In fp64 that is 1e-11; in fp32 updates are compared without the mixing rows.
    """
    assert found.keys() == expected.keys()
    least = 0.01 if is_update else 1e-30
    for name, value in expected.items():
        rows = HAS_GRADIENT.get(name, slice(None))
        if (
            is_update
            and value.dtype == np.float32
            and name not in HAS_GRADIENT
            and re.search(r"hc_(attn|ffn)\.fn$", name)
        ):
            rows = slice(2 * _N)
        difference = np.abs(found[name] - value)[rows]
        assert difference.max() <= tolerance * max(np.abs(value).max(), least), (name, difference.max())
        keep(difference.max() / max(np.abs(value).max(), least))
