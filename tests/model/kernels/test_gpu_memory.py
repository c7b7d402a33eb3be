"""What a training step on a GPU holds at Flash's widths, without one: its own code on tensors of no content.

Meta tensors have shapes and storages but no memory. They pass for tensors of a GPU here, and kernels are not
launched, so what is counted is every byte that this package and autograd hold at once. What the allocator
rounds up and leaves unused comes on top.
"""

from dataclasses import fields, replace

import pytest
import torch
from memory_meter import MemoryMeter

from consilience.model.config import PRESETS
from consilience.model.kernels import attention_problem, choice, gpu_linear_logprob
from consilience.model.layout import packed_layout
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.transformer import Transformer

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

GIB = 2**30
CONFIG = replace(
    PRESETS["flash"],
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4),
    n_routed_experts=16,
    num_hash_layers=1,
    num_nextn_predict_layers=0,
    mtp_compress_ratios=(),
)


@pytest.fixture
def on_paper(triton_device, monkeypatch):
    """Meta tensors pass for a GPU's, and kernels do nothing."""
    from triton.runtime import interpreter, jit

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.device.type == "meta"))
    monkeypatch.setattr(choice, "_is_capable", lambda index: True)
    monkeypatch.setattr(attention_problem, "HAND_PLACED", False)  # asks the chip; it holds the same
    # In place, it holds nothing; torch 2.11 has no meta kernel for it.
    monkeypatch.setattr(torch, "addmm", lambda total, a, b, *, out_dtype, out: out)
    for kind in (interpreter.InterpretedFunction, jit.KernelInterface):
        monkeypatch.setattr(kind, "__getitem__", lambda self, grid: lambda *given, **named: None)


def meta(x):
    """A dataclass, or a dictionary, with its tensors on paper."""
    if isinstance(x, dict):
        return {key: meta(value) for key, value in x.items()}
    return x.to("meta") if isinstance(x, torch.Tensor) else x


def on_meta(record, **more):
    return replace(record, **{f.name: meta(getattr(record, f.name)) for f in fields(record)} | more)


def layout_of(num_tokens):
    """One sample of T tokens. What closes where is found on the CPU, where numbers are."""
    position = torch.arange(num_tokens)[None]
    layout = packed_layout(CONFIG, torch.zeros_like(position), position, None)
    windows = {}
    for ratio, each in layout.windows.items():
        closing = on_meta(each.closing)
        windows[ratio] = on_meta(each, find_closing=lambda closing=closing: closing)
    return on_meta(layout, windows=windows)


def step(num_tokens, setting):
    """Forward, cross-entropy and backward: the meter, bytes of weights, bytes of gradients."""
    with torch.device("meta"):
        model = Transformer(CONFIG, torch.bfloat16)
        ids = torch.empty(1, num_tokens, dtype=torch.long)
    set_recompute(model, recompute_policy(setting))
    layout = layout_of(num_tokens)
    model._layout = lambda *_: layout  # type: ignore[method-assign]
    plan = gpu_linear_logprob.Plan(2048, 1.0, 2 << 30, None)  # what `linear_logprob` chooses
    with MemoryMeter() as meter:
        hidden = model.hidden(ids).flatten(0, 1)
        logprob, _ = gpu_linear_logprob.run(hidden, model.head.weight, ids[0], plan)
        (-logprob.mean()).backward()
    sizes = [(p.nbytes, p.grad.nbytes) for p in model.parameters() if p.grad is not None]
    return meter, *(sum(each) for each in zip(*sizes))


@pytest.mark.parametrize(("setting", "measured"), [("none", 4.0), ("block", 1.4)])
def test_the_count_is_what_was_measured_on_an_h100(setting, measured, on_paper):
    """GiB beyond weights and gradients at 4,096 tokens, `bench/train_step_gpu.py`, to its last digit."""
    meter, _, gradients = step(4096, setting)
    assert (meter.peak - gradients) / GIB == pytest.approx(measured, abs=0.06)


@pytest.mark.parametrize("setting", ["block", ("mhc", "attention_inner", "picks", "router")])
def test_131072_tokens_fit_a_card_of_80_gb(setting, on_paper):
    meter, weights, _ = step(131072, setting)
    # 79 GiB are there; a tenth for the allocator, libraries and the context.
    assert (weights + meter.peak) / GIB < 70
    # Streams are the widest: nothing has the channels of all heads, or of a token's experts, for all tokens.
    assert meter.largest <= 131072 * CONFIG.hc_mult * CONFIG.hidden_size


def test_every_further_token_takes_so_much(on_paper):
    """From 131,072 tokens on: a block's streams in bf16 for each layer, one more gradient of them, and what a
    block holds beside its pieces while it is run again."""
    peaks = [step(length, "block")[0].peak for length in (131072, 196608)]
    streams = 2 * CONFIG.hc_mult * CONFIG.hidden_size
    per_token = (peaks[1] - peaks[0]) / 65536
    assert CONFIG.num_hidden_layers * streams < per_token < (CONFIG.num_hidden_layers + 5) * streams
