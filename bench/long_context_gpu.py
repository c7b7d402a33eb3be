"""Long contexts on one GPU, at Flash's widths: training 131,072 tokens, reading and decoding a million.

    python bench/long_context_gpu.py [--tables train_131k prefill_1m decode_1m] [--tokens …] [--sweep]

train_step_gpu.py's model: 4 layers (sliding, CSA, HCA, CSA), 16 experts, bf16, random weights and tokens. A
process each:
  pieces      work in pieces against undivided work, 8,192 tokens: relative error (RMS) of hidden states and
              gradients, beside those of the undivided work run again
  train_131k  forward, cross-entropy, backward of one row; `tests/model/kernels/test_gpu_memory.py` counts
              45.3 GiB with recompute=block and 51.8 with the outputs of sub-layers kept, before the allocator
  prefill_1m  one row read chunk by chunk into a decode state: tokens/s of each eighth, peak, state's bytes
  decode_1m   a step behind 4,096 tokens and behind 1,048,576, in time and in kernels' time: at most 2 ×
Expected on an H100: 5 to 6 s a step of 131,072 tokens (22 to 26 thousand tokens/s), half a minute for a
million. `--sweep` reads the million in chunks of other sizes too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import torch
from gpu_timing import Table, arguments, matrix_rate, median_text, peak_bytes, time_once
from torch import Tensor
from train_step_gpu import fill, flash_width, our_step, spread_hash

TABLES = ["pieces", "train_131k", "prefill_1m", "decode_1m"]
# The second keeps what attention and experts hand on, so that neither runs a third time.
POLICIES = [["block"], ["mhc", "attention_inner", "router"]]
CHUNKS = [16384]
SWEPT_CHUNKS = [4096, 8192, 16384, 32768]
ARM_LIMIT_S = 240
GIB = 2**30


def build(layers: int) -> Any:
    from consilience.model.transformer import Transformer

    config = flash_width()
    config = replace(config, num_hidden_layers=layers, compress_ratios=config.compress_ratios[:layers])
    with torch.device("cuda"):
        model = Transformer(config, torch.bfloat16)
    fill(model)
    spread_hash(model, config)
    return model


# ---- arms: a process each, figures as JSON ---------------------------------------------------------


def pieces(_: argparse.Namespace) -> dict[str, Any]:
    """Errors against the undivided run: of the same again, and in pieces of 1,024 tokens."""
    from consilience.model import pieces as setting
    from consilience.model.recompute import recompute_policy, set_recompute

    model = build(4)
    ids = torch.randint(model.config.vocab_size, (1, 8192), device="cuda")
    upstream = torch.randn(1, 8192, model.config.hidden_size, device="cuda").bfloat16()

    def run() -> dict[str, Tensor]:
        hidden = model.hidden(ids)
        (hidden * upstream).float().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"hidden": hidden.detach(), **found}

    def error(a: Tensor, b: Tensor) -> float:
        return ((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)).item()

    whole, found = run(), {}
    for name, policy, is_divided in (
        ("again", "none", False),
        ("pieces", "none", True),
        ("pieces, block", "block", True),
        ("pieces, block, again", "block", True),
    ):
        set_recompute(model, recompute_policy(policy))
        setting.WHOLE_BYTES = setting.PIECE_BYTES = 1024 * 64 * 512 * 2 if is_divided else 1 << 40
        made = run()
        errors = {key: error(made[key], whole[key]) for key in whole}
        hidden = errors.pop("hidden")
        found[name] = [hidden, statistics.median(errors.values()), *max((e, k) for k, e in errors.items())]
    return found


def train(given: argparse.Namespace) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    model, step = our_step(given.tokens, given.policy)
    times = []
    for number in range(4):
        took = time_once(step)
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        model.zero_grad(set_to_none=True)
        if number:  # kernels are compiled
            times.append(took)
    torch.cuda.empty_cache()
    before, peak = torch.cuda.memory_allocated(), peak_bytes(step)
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    reserved = torch.cuda.max_memory_reserved()
    return {
        "ms": times,
        "peak": before + peak,
        "beyond": peak - gradients,
        "reserved": reserved,
        "finite": finite,
    }


@torch.no_grad()
def prefill(given: argparse.Namespace) -> dict[str, Any]:
    from consilience.model.cost import allocated_bytes
    from consilience.model.state import DecodeState

    model, chunk, total = build(given.layers), given.chunk, given.tokens
    g = torch.Generator(device="cuda").manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (1, total), device="cuda", generator=g)
    state = DecodeState.allocate(model.config, 1, 4 * chunk, device="cuda", dtype=torch.bfloat16)
    for begin in range(0, 4 * chunk, chunk):  # kernels are compiled
        hidden = model.hidden(ids[:, begin : begin + chunk], state=state)
    packed = model.hidden(ids[:, : 4 * chunk])
    apart = (hidden[0, -256:] - packed[0, -256:]).float().norm() / packed[0, -256:].float().norm()
    del state, packed, hidden
    before = torch.cuda.memory_allocated()
    state = DecodeState.allocate(model.config, 1, total, device="cuda", dtype=torch.bfloat16)
    grown = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    marks, began = [], time.monotonic()
    for begin in range(0, total, chunk):
        hidden = model.hidden(ids[:, begin : begin + chunk], state=state)
        if (begin + chunk) % (total // 8) == 0:
            torch.cuda.synchronize()
            marks.append(time.monotonic() - began)
            print(f"  {begin + chunk} tokens, {marks[-1]:.1f} s", file=sys.stderr, flush=True)
    assert bool(hidden.isfinite().all()) and int(state.position[0]) == total
    return {
        "s": marks,
        "apart": apart.item(),
        "peak": torch.cuda.max_memory_allocated(),
        "state": state.num_bytes(),
        "grown": grown,
        "model": allocated_bytes(model.config, 1, total, 2),
    }


@torch.no_grad()
def decode(given: argparse.Namespace) -> dict[str, Any]:
    """Steps behind so many tokens, of random content, in a state for so many."""
    from torch.profiler import ProfilerActivity, profile

    from consilience.model.state import DecodeState

    def step() -> None:
        model.head(model.hidden(ids, state=state))

    model, found = build(given.layers), {}
    ids = torch.randint(model.config.vocab_size, (1, 1), device="cuda")
    for length, room in ((4096, 4096), (4096, given.tokens), (given.tokens, given.tokens)):
        state = DecodeState.allocate(model.config, 1, room + 256, device="cuda", dtype=torch.bfloat16)
        for layer in state.layers:
            for x in (*layer.rings(), *layer.pages()):
                x.normal_()
        state.position.fill_(length)
        for _ in range(10):
            step()
        times = [time_once(step) for _ in range(41)]
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        kernels = sum(e.self_device_time_total for e in recorded.key_averages()) / 10 / 1e3
        found[f"{length} of {room}"] = {"ms": times, "kernels": kernels}
        state = None  # its blocks make room for the next
    return found


# ---- tables ------------------------------------------------------------------------------------------


def run_arm(arm: str, *more: str) -> dict | str:
    """Figures of one arm in a process of its own, or why there are none."""
    command = [sys.executable, __file__, "--arm", arm, *more]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=None, text=True, timeout=ARM_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"over {ARM_LIMIT_S} s"
    return json.loads(done.stdout.strip().splitlines()[-1]) if not done.returncode else "failed, see stderr"


def show_pieces(given: argparse.Namespace) -> None:
    table = Table("against the undivided run", "hidden states", "gradients, median", "largest", "of")
    found = run_arm("pieces")
    for name, cells in found.items() if isinstance(found, dict) else [(found, ["", "", "", ""])]:
        table.add(name, *(f"{c:.2e}" if isinstance(c, float) else c for c in cells))
    table.note(
        "Random routes and picks flip where scores are equal but for rounding. The last two rows are equal."
    )


def show_train(given: argparse.Namespace) -> None:
    tokens = given.tokens or 131072
    table = Table(
        "tokens",
        "recompute",
        "s a step",
        "tokens/s",
        "GiB at most",
        "beyond weights and gradients",
        "reserved",
    )
    for policy in POLICIES:
        found = run_arm("train", "--tokens", str(tokens), "--policy", *policy)
        name = ", ".join(policy)
        if isinstance(found, str):
            table.add(tokens, name, found, "", "", "", "")
            continue
        sizes = (f"{found[key] / GIB:.1f}" for key in ("peak", "beyond", "reserved"))
        speed = tokens / statistics.median(found["ms"]) * 1e3
        table.add(tokens, name, median_text(found["ms"], scale=1e-3), f"{speed:,.0f}", *sizes)
        if not found["finite"]:
            table.note(f"{name}: some gradients are not finite.")
    table.note(f"8192³ bf16 product {matrix_rate() / 1e12:.0f} TFLOP/s.")


def show_prefill(given: argparse.Namespace) -> None:
    tokens = given.tokens or 1 << 20
    table = Table(
        "tokens", "chunk", "s", "tokens/s", "of the first eighth", "last", "GiB at most",
        "state, MiB", "cost model", "to a packed forward",
    )  # fmt: skip
    for chunk in SWEPT_CHUNKS if given.sweep else CHUNKS:
        more = ("--tokens", str(tokens), "--chunk", str(chunk), "--layers", str(given.layers))
        found = run_arm("prefill", *more)
        if isinstance(found, str):
            table.add(tokens, chunk, found, *[""] * 7)
            continue
        s = found["s"]
        rates = (tokens / s[-1], tokens / 8 / s[0], tokens / 8 / (s[-1] - s[-2]))
        mib = (f"{found[key] / 2**20:.1f}" for key in ("state", "model"))
        cells = (f"{s[-1]:.1f}", *(f"{r:,.0f}" for r in rates), f"{found['peak'] / GIB:.1f}", *mib)
        table.add(tokens, chunk, *cells, f"{found['apart']:.1e}")
    table.note("The last column: relative difference (RMS) of the last hidden states after 4 chunks.")


def show_decode(given: argparse.Namespace) -> None:
    tokens = given.tokens or 1 << 20
    table = Table("a step behind", "ms", "kernels, ms", "of 4,096: time", "kernels")
    found = run_arm("decode", "--tokens", str(tokens), "--layers", str(given.layers))
    if isinstance(found, str):
        table.add(found, "", "", "", "")
        return
    first = next(iter(found.values()))
    for name, each in found.items():
        ratio = statistics.median(each["ms"]) / statistics.median(first["ms"])
        kernels = each["kernels"]
        share = f"{kernels / first['kernels']:.2f} ×"
        table.add(name, median_text(each["ms"]), f"{kernels:.3f}", f"{ratio:.2f} ×", share)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--tokens", type=int, help="instead of the table's own")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=CHUNKS[0])
    parser.add_argument("--policy", nargs="+", default=POLICIES[0])
    parser.add_argument("--arm", choices=["pieces", "train", "prefill", "decode"])
    given = parser.parse_args()
    if given.arm:
        arms = {"pieces": pieces, "train": train, "prefill": prefill, "decode": decode}
        print(json.dumps(arms[given.arm](given)))
        return
    shows = {
        "pieces": show_pieces,
        "train_131k": show_train,
        "prefill_1m": show_prefill,
        "decode_1m": show_decode,
    }
    for name in given.tables:
        print(f"\n### {name}\n")
        shows[name](given)


if __name__ == "__main__":
    main()
