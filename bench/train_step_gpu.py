"""A training step on one GPU: ours and transformers' eager deepseek_v4, at Flash's widths.

    python bench/train_step_gpu.py [--tokens 4096 …] [--recompute none …] [--profile]

Four layers (sliding, CSA, HCA, CSA) and 16 experts at Flash's other sizes, 3.2 B parameters, bf16, one row of
random tokens: forward, cross-entropy over the vocabulary, backward into new gradients. Random weights on both
sides, of the X beyond weights and gradients.
`--profile` prints where the time of our step goes. Goal: 5 x transformers' tokens per second at 4,096 tokens
with a quarter of its activations; 32,768 tokens on one card, 131,072 with recomputation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from gpu_timing import Table, arguments, matrix_rate, median_text, peak_bytes, time_once

ROOT = Path(__file__).parents[1]
ARM_LIMIT_S = 240


def flash_width():
    """Flash with 4 layers, one of each attention kind and a second CSA, and 16 experts."""
    from consilience.model.config import PRESETS

    return replace(
        PRESETS["flash"],
        num_hidden_layers=4,
        compress_ratios=(0, 4, 128, 4),
        n_routed_experts=16,
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
    )


def fill(model: torch.nn.Module) -> None:
    """Random weights of a spread that keeps activations near 1, norms at 1, biases and sinks at 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() < 2:
                p.fill_(1.0 if "norm" in name or "scale" in name else 0.0)
            else:
                p.normal_(0, 0.02 if "embed" in name else p.shape[-1] ** -0.5)


def our_step(tokens: int, recompute: str | list[str]) -> tuple[torch.nn.Module, Callable[[], None]]:
    from consilience.model.kernels.linear_logprob import linear_logprob
    from consilience.model.recompute import recompute_policy, set_recompute
    from consilience.model.transformer import Transformer

    config = flash_width()
    with torch.device("cuda"):
        model = Transformer(config, torch.bfloat16)
    fill(model)
    spread_hash(model, config)
    set_recompute(model, recompute_policy(recompute))
    ids = torch.randint(config.vocab_size, (1, tokens), device="cuda")
    targets = torch.randint(config.vocab_size, (tokens,), device="cuda")

    def step() -> None:
        hidden = model.hidden(ids).flatten(0, 1)
        (-linear_logprob(hidden, model.head.weight, targets).logprob.mean()).backward()

    return model, step


def their_step(tokens: int) -> tuple[torch.nn.Module, Callable[[], None]]:
    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from transformers import DeepseekV4ForCausalLM
    from transformers_oracle import hf_config

    config = flash_width()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = DeepseekV4ForCausalLM(hf_config(config)).train()
    torch.set_default_dtype(torch.float32)
    fill(model)
    spread_hash(model, config)
    ids = torch.randint(config.vocab_size, (1, tokens), device="cuda")
    targets = torch.randint(config.vocab_size, (tokens,), device="cuda")

    def step() -> None:
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets).backward()

    return model, step


def spread_hash(model: torch.nn.Module, config) -> None:
    """Hash routes that give every expert its share."""
    each = (
        torch.arange(config.vocab_size * config.num_experts_per_tok, device="cuda") % config.n_routed_experts
    )
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(each.view(buffer.shape))


def measure(given: argparse.Namespace) -> None:
    """One arm in this process; prints its figures as JSON."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    tokens = given.tokens[0]
    model, step = our_step(tokens, given.recompute[0]) if given.arm == "ours" else their_step(tokens)
    rounds = 3 if tokens > 16384 else 7

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    for _ in range(2):  # kernels are compiled
        step()
        clear()
    if given.profile:
        show_profile(step)
        return
    times = []
    for _ in range(rounds):
        times.append(time_once(step))
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        clear()
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"ms": times, "bytes": peak_bytes(step) - gradients, "parameters": parameters}))


def show_profile(step: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        step()
        torch.cuda.synchronize()
    print(
        recorded.key_averages().table(sort_by="self_cuda_time_total", row_limit=45, max_name_column_width=70)
    )


def run_arm(arm: str, tokens: int, recompute: str) -> dict | str:
    """Figures of one arm in a process of its own, or why there are none."""
    command = [sys.executable, __file__, "--arm", arm, "--tokens", str(tokens), "--recompute", recompute]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ARM_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"over {ARM_LIMIT_S} s"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["?"])[-1]
        return "out of memory" if "OutOfMemory" in last else last[:200]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--recompute", nargs="+", default=["none", "block"])
    parser.add_argument("--arm", choices=["ours", "transformers"])
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.arm:
        measure(given)
        return
    rate = matrix_rate()
    table = Table("tokens", "arm", "ms", "tokens/s", "GiB beyond weights and gradients")
    for tokens in given.tokens:
        arms = [("ours", policy) for policy in given.recompute] + [("transformers", "none")]
        for arm, policy in arms:
            if arm == "transformers" and tokens > 8192:
                continue
            found = run_arm(arm, tokens, policy)
            name = arm if arm == "transformers" else f"ours, recompute {policy}"
            if isinstance(found, str):
                table.add(tokens, name, found, "", "")
                continue
            speed = tokens / statistics.median(found["ms"]) * 1e3
            memory = found["bytes"] / 2**30
            table.add(tokens, name, median_text(found["ms"], digits=1), f"{speed:,.0f}", f"{memory:.2f}")
    table.note(f"8192³ bf16 product {rate / 1e12:.0f} TFLOP/s.")


if __name__ == "__main__":
    main()
