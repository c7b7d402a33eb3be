"""Experts over the GPUs of one host: a layer at Flash's widths, and how much of its communication shows.

    PYTHONPATH=. python bench/expert_parallel_gpu.py [--ranks 2] [--waves 1 2 4 8] [--tokens 16384]
    PYTHONPATH=. python bench/expert_parallel_gpu.py --device cpu --tiny      (what it does, by gloo)

Width 4,096, 256 experts of 2,048, 6 a token, one shared, bf16, random data, learned router; forward and
backward of `tokens` a rank. First ranks against one process with the tokens of all. Then, for each number of
waves, three arms in turns, their order reversed every other round, the slowest rank's time, medians, range:

    exchange      as it is
    local copies  nothing travels; what would is copied on this GPU, in line with the rest
    no transfer   nothing travels and nothing is copied: the compute alone

Exposed share = (exchange - the other) / exchange; at most 10 % is asked for. Predicted for 2 ranks: half of
98,304 pairs cross, 0.4 GB each way and pass, four passes; at 350 GB/s 4.6 ms of a step of about 32, of which
the first and last wave's of the forward and the first of the backward show: 0.9 ms, 3 %, in 4 waves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.multiprocessing
from torch import Tensor

from consilience.model.config import FLASH, ModelConfig
from consilience.model.expert_parallel import shard_experts, sharded_names
from consilience.model.moe import MoE
from consilience.model.ranks import Ranks, open_ranks

LIMIT_S = 300.0
LAYER = FLASH.num_hash_layers  # the first with a learned router
Arm = Callable[[], object]


@dataclass(frozen=True)
class Apart(Ranks):
    """Ranks that talk once, to learn the sizes; afterwards what arrives is what was given, or anything."""

    copies: bool = True
    counts: list[Tensor] = field(default_factory=list)

    def stack(self, tensor: Tensor) -> Tensor:
        if not self.counts:
            self.counts.append(super().stack(tensor))
        return self.counts[0]

    def start_exchange(
        self, found: Tensor, given: Tensor, found_rows: Sequence[int], given_rows: Sequence[int]
    ) -> Callable[[], object]:
        if self.copies:
            count = min(len(found), len(given))
            found[:count].copy_(given[:count])
            found[count:].zero_()
        return lambda: None


def layer(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> MoE:
    with torch.device(device):
        moe = MoE(config, LAYER, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for p in moe.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5, generator=generator)
    return moe


def tokens(
    count: int, config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Hidden states and upstream gradient [T, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (count, config.hidden_size)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(2)]


def step(moe: MoE, hidden: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """One forward and backward; the output and all gradients."""
    moe.zero_grad(set_to_none=True)
    hidden = hidden.detach().requires_grad_()
    output = moe(hidden, torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device))
    output.backward(grad)
    assert hidden.grad is not None
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "hidden": hidden.grad} | grads


# ---- correctness --------------------------------------------------------------------------------


def correctness(
    ranks: Ranks, config: ModelConfig, count: int, device: torch.device, dtype: torch.dtype
) -> None:
    """The first rank's error to one process, and whether runs and waves agree."""
    every = [tokens(count, config, device, dtype, seed) for seed in range(ranks.size)]
    whole = step(layer(config, device, dtype), *(torch.cat(x) for x in zip(*every)))
    runs = []
    for waves in (1, 3, 3):
        moe = layer(config, device, dtype)
        shard_experts(moe, ranks, waves=waves)
        runs.append(step(moe, *every[ranks.rank]))
    own = next(iter(sharded_names(moe).values())).own
    errors: dict[str, float] = {}
    for name, found in runs[0].items():
        expected = whole[name]
        if name in ("output", "hidden"):
            expected = expected[ranks.rank * count : (ranks.rank + 1) * count]
        elif name.startswith("experts."):
            expected = expected[own.start : own.stop]
        else:
            ranks.sum_([found := found.to(torch.float32, copy=True)])
        errors[name] = float((found.double() - expected.double()).norm() / expected.double().norm())
    again = all(torch.equal(runs[1][name], x) for name, x in runs[2].items())
    waves_agree = all(torch.equal(runs[0][name], x) for name, x in runs[1].items())
    said = ranks.gather((errors, again, waves_agree))
    if ranks.is_first:
        print(f"\n{ranks.size} ranks of {count} tokens against one process, the worst rank's relative error")
        print("| | error |\n|---|---|")
        for name in errors:
            print(f"| {name} | {max(each[name] for each, _, _ in said):.1e} |")
        same, equal = (all(flags) for flags in zip(*((a, w) for _, a, w in said)))
        print(f"\nTwo runs give the same bits: {same}. 1 and 3 waves give the same bits: {equal}.")


# ---- time ---------------------------------------------------------------------------------------


def took(arm: Arm, ranks: Ranks, device: torch.device) -> float:
    """Milliseconds of the slowest rank."""
    if device.type == "cpu":
        ranks.barrier()
        began = time.perf_counter()
        arm()
        own = 1e3 * (time.perf_counter() - began)
    else:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        ranks.barrier()
        begin.record()
        arm()
        end.record()
        torch.cuda.synchronize()
        own = begin.elapsed_time(end)
    return max(ranks.gather(own))


def measure(arms: dict[str, Arm], rounds: int, ranks: Ranks, device: torch.device) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2):
        for arm in arms.values():
            arm()
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            found[name].append(took(arms[name], ranks, device))
    return found


def arms_of(ranks: Ranks, config: ModelConfig, waves: int, given: list[Tensor]) -> dict[str, Arm]:
    """The layer's step by arm, on the same weights."""
    moe = layer(config, given[0].device, given[0].dtype)
    shard_experts(moe, ranks, waves=waves)
    if moe.experts.shard is None:
        return {"one rank": lambda: step(moe, *given)}
    shard, values = moe.experts.shard, (ranks.rank, ranks.size, ranks.group, ranks.talk, ranks.device)

    def run(others: Ranks) -> None:
        moe.experts.shard = replace(shard, ranks=others)
        step(moe, *given)

    every = {"exchange": ranks, "local copies": Apart(*values), "no transfer": Apart(*values, copies=False)}
    return {name: lambda others=others: run(others) for name, others in every.items()}


def table(ranks: Ranks, config: ModelConfig, options: argparse.Namespace, device: torch.device) -> None:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    given = tokens(options.tokens, config, device, dtype, seed=100 + ranks.rank)
    if ranks.is_first:
        print(f"\n{ranks.size} ranks, {options.tokens} tokens each, {config.n_routed_experts} experts")
        print("| waves | arm | ms | range | exposed beside it |\n|---|---|---|---|---|")
    for waves in options.waves if ranks.size > 1 else [1]:
        arms = arms_of(ranks, config, waves, given)
        found = measure(arms, options.rounds, ranks, device)
        medians = {name: statistics.median(times) for name, times in found.items()}
        for name, times in found.items():
            shown = 100 * (1 - medians[name] / medians["exchange"]) if "exchange" in medians else 0.0
            share = "" if name in ("exchange", "one rank") else f"{shown:.1f} %"
            if ranks.is_first:
                spread = f"{min(times):.2f}–{max(times):.2f}"
                print(f"| {waves} | {name} | {medians[name]:.2f} | {spread} | {share} |", flush=True)
        del arms
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if ranks.is_first and device.type == "cuda":
        print(f"\nPeak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB on rank 0.")


def work(rank: int, size: int, address: str, options: argparse.Namespace) -> None:
    """One rank."""
    is_cpu = options.device == "cpu"
    device = torch.device("cpu") if is_cpu else torch.device("cuda", rank)
    if is_cpu:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(device)
    backend = "gloo" if is_cpu else "nccl"
    ranks = open_ranks(address, rank, size, backend=backend, timeout_s=LIMIT_S)
    flash = FLASH
    if options.tiny:
        flash = replace(flash, hidden_size=64, moe_intermediate_size=32, n_routed_experts=16)
    elif options.experts:
        flash = replace(flash, n_routed_experts=options.experts)
    if size > 1:
        small = flash if options.tiny else replace(flash, hidden_size=1024, moe_intermediate_size=512)
        dtype = torch.float32 if is_cpu else torch.bfloat16
        correctness(ranks, small, 64 if options.tiny else 2048, device, dtype)
    table(ranks, flash, options, device)
    ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="width 64, 16 experts, 128 tokens, 2 rounds")
    parser.add_argument("--ranks", type=int, default=0, help="default: the GPUs there are, or 2 on a CPU")
    parser.add_argument("--waves", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=0, help="default: Flash's 256")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.rounds = min(options.tokens, 128), 2
    size = options.ranks or (2 if options.device == "cpu" else torch.cuda.device_count())
    name = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, {size} ranks")
    for count in sorted({1, size}):
        with tempfile.TemporaryDirectory() as folder:
            given = (count, f"file://{folder}/meeting", options)
            torch.multiprocessing.spawn(work, args=given, nprocs=count)  # pyright: ignore[reportPrivateImportUsage]


if __name__ == "__main__":
    main()
