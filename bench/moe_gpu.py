"""The mixture of experts on one GPU: forward and backward at Flash's widths, beside its GEMMs alone.

    PYTHONPATH=. python bench/moe_gpu.py [--sweep] [--rounds 7] [--quick]

Width 4,096, experts of 2,048, 6 a token, bf16, random data. First the relative errors to fp64 of outputs and
gradients; then arms in turns, the order reversed every other round, medians with range. `dense` is one matrix
for all pairs: the rate that 70 % is asked of.

Predicted for 4,096 tokens on 16 experts: 24,576 pairs, nine GEMMs of 0.41 TFLOP, 5.3 ms at 700 TFLOP/s; our
own reads and writes are 2.3 GB, 0.8 ms: 87 % of dense if grouped_mm were dense's equal. fp32 sums of 403 M
weights read and write 3.2 GB, 1.1 ms, of which the GEMMs hide some; at 512 pairs an expert that is twice as
long as the weight gradients' GEMMs, so 70 % is near the bound of in-place sums there.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import triton
from torch import Tensor

from consilience.model.config import TINY
from consilience.model.kernels import gpu_moe, triton_moe, triton_route
from consilience.model.moe import MoE

D, INNER, K = 4096, 2048, 6
Work = Callable[[], object]


def measure(arms: dict[str, Work], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Median, least and most milliseconds of each arm."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for work in arms.values():
        work()
    for number in range(rounds):
        for name in list(arms)[:: -1 if number % 2 else 1]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            arms[name]()
            end.record()
            torch.cuda.synchronize()
            found[name].append(begin.elapsed_time(end))
    return {name: (statistics.median(t), min(t), max(t)) for name, t in found.items()}


def repeated(work: Work, times: int = 10) -> Work:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def peak(work: Work) -> float:
    """GiB beyond what is allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def load(tokens: int, experts: int, is_zipf: bool) -> Tensor:
    """K distinct experts a token [R, K], all equally likely or like 1 / rank."""
    odds = 1 / torch.arange(1, experts + 1, device="cuda") if is_zipf else torch.ones(experts, device="cuda")
    return torch.multinomial(odds.expand(tokens, -1), K)


def moe_of(experts: int, width: int = D, inner: int = INNER) -> MoE:
    config = replace(
        TINY, hidden_size=width, moe_intermediate_size=inner, n_routed_experts=experts, n_shared_experts=1,
        num_experts_per_tok=K, num_hash_layers=0, swiglu_limit=10.0,
    )  # fmt: skip
    with torch.device("cuda"):
        moe = MoE(config, 1, torch.bfloat16)
    with torch.no_grad():
        for p in moe.parameters():
            p.normal_(std=p.shape[-1] ** -0.5)
    return moe


def ours(moe: MoE, hidden: Tensor, chosen: Tensor) -> Tensor:
    """The layer on a GPU, with the experts prescribed."""
    weights, experts, _ = gpu_moe.route(moe.gate, hidden, chosen[:, 0], chosen)
    shared = gpu_moe.shared_expert(moe.shared_experts, hidden)
    return gpu_moe.routed_experts(hidden, weights, experts, moe.experts.weights(), moe.experts.limit, shared)


def twin(moe: MoE, hidden: Tensor, chosen: Tensor) -> Tensor:
    """The same by the modules in PyTorch."""
    weights, experts, _ = moe.gate(hidden, chosen[:, 0], chosen)
    return (moe.experts(hidden, weights, experts)[0] + moe.shared_experts(hidden)).to(hidden.dtype)


def trained(layer: Callable[..., Tensor], moe: MoE, hidden: Tensor, chosen: Tensor, grad: Tensor) -> Work:
    def run() -> None:
        moe.zero_grad()
        hidden.grad = None
        layer(moe, hidden, chosen).backward(grad)

    return run


# ---- correctness --------------------------------------------------------------------------------


def correctness() -> None:
    print("\n512 tokens, width 1,024, 16 experts of 512, Zipf; error relative to fp64")
    print("| | ours RMS | ours max | twin RMS | twin max |\n|---|---|---|---|---|")
    moe = moe_of(16, 1024, 512)
    hidden, chosen = normal(512, 1024).requires_grad_(), load(512, 16, True)
    grad = normal(512, 1024)
    wide = moe_of(16, 1024, 512).double()
    wide.load_state_dict(moe.state_dict())
    exact_hidden = hidden.detach().double().requires_grad_()
    leaves = lambda m, h: {"hidden": h} | {n: p for n, p in m.named_parameters() if p.requires_grad}
    results = []
    for layer, m, h in (
        (twin, wide, exact_hidden),
        (ours, moe, hidden),
        (twin, moe, hidden),
        (ours, moe, hidden),
    ):
        out = layer(m, h, chosen)
        names = leaves(m, h)
        gradients = torch.autograd.grad(out, list(names.values()), grad.to(out.dtype))
        results.append({"output": out.detach()} | dict(zip(names, gradients)))
    truth, own, plain, again = results
    for name, t in truth.items():
        row = []
        for found in (own[name].double(), plain[name].double()):
            row += [(found - t).norm() / t.norm(), (found - t).abs().max() / t.abs().max()]
        print(f"| {name} | " + " | ".join(f"{float(x):.2e}" for x in row) + " |")
    same = all(torch.equal(own[n], again[n]) for n in own)
    print(f"\nTwo runs give the same bits: {same}.")
    d_out, rows, total = normal(3000, INNER), normal(3000, D), torch.zeros(4, INNER, D, device="cuda")
    ends = torch.tensor([1000, 1000, 1777, 3000], dtype=torch.int32, device="cuda")
    triton_moe.add_weight_gradient(d_out, rows, ends, total)
    bf16 = torch.nn.functional.grouped_mm(d_out.t(), rows, offs=ends)
    start = 0
    for e, end in enumerate(ends.tolist()):
        t = d_out[start:end].double().t() @ rows[start:end].double()
        errors = [float((x[e].double() - t).norm() / (t.norm() + 1e-30)) for x in (total, bf16)]
        print(
            f"weight gradient of {end - start} pairs: fp32 kernel {errors[0]:.1e}, grouped_mm {errors[1]:.1e}"
        )
        start = end


# ---- the layer ----------------------------------------------------------------------------------


def products(mm: Callable[[Tensor, int, bool], object]) -> Work:
    """The nine GEMMs of a step: w1 (0), w3 (1), w2 (2); forward, backward, weight gradient."""
    return lambda: [mm(x, n, b) for n in range(3) for x, b in ((0, False), (0, True), (1, False))]  # type: ignore[arg-type]


def gemm_arms(moe: MoE, chosen: Tensor) -> dict[str, Work]:
    """Nothing but the GEMMs, operands in place: one matrix for all, a loop over experts, grouped_mm."""
    pairs, experts = chosen.numel(), moe.experts.w1.shape[0]
    _, _, ends = triton_route.sort_pairs(chosen, experts)
    counts = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    wide, narrow = normal(pairs, D), normal(pairs, INNER)
    w = [p.detach() for p in (moe.experts.w1, moe.experts.w3, moe.experts.w2)]
    operands = [(wide, narrow), (wide, narrow), (narrow, wide)]  # rows in, rows out

    def dense() -> None:
        for (x, y), m in zip(operands, w):
            torch.mm(x, m[0].t()), torch.mm(y, m[0]), torch.mm(y.t(), x)

    def loop() -> None:
        for (x, y), m in zip(operands, w):
            parts = list(zip(x.split(counts), y.split(counts), m))
            torch.cat([a @ e.t() for a, _, e in parts]), torch.cat([b @ e for _, b, e in parts])
            torch.stack([b.t() @ a for a, b, _ in parts])

    def grouped() -> None:
        for (x, y), m in zip(operands, w):
            gpu_moe.forward_mm(x, m, ends), gpu_moe.backward_mm(y, m, ends)
            torch.nn.functional.grouped_mm(y.t(), x, offs=ends)

    return {"dense GEMMs": dense, "loop of mm": loop, "grouped_mm alone": grouped}


def layer(tokens: int, experts: int, is_zipf: bool, rounds: int) -> None:
    moe, chosen = moe_of(experts), load(tokens, experts, is_zipf)
    hidden, grad = normal(tokens, D).requires_grad_(), normal(tokens, D)
    weights = torch.rand(tokens, K, device="cuda").requires_grad_()
    shared = torch.zeros_like(grad)
    masters = moe.experts.weights()

    def routed(m: MoE, h: Tensor, c: Tensor) -> Tensor:
        return gpu_moe.routed_experts(h, weights, c, masters, m.experts.limit, shared)

    def inference() -> None:
        with torch.no_grad():
            ours(moe, hidden, chosen)

    given = (moe, hidden, chosen, grad)
    arms = gemm_arms(moe, chosen)
    arms |= {
        "ours, routed experts": trained(routed, *given),
        "ours, routed again (A/A)": trained(routed, *given),
    }
    arms |= {"ours, whole layer": trained(ours, *given), "ours, forward only": inference}
    if experts <= 16:
        arms["twin, whole layer"] = trained(twin, *given)
    found = measure(arms, rounds)
    memory = {name: peak(arms[name]) for name in arms if "layer" in name}
    del arms["dense GEMMs"], arms["loop of mm"], arms["grouped_mm alone"]
    moe.zero_grad()
    for w in (moe.experts.w1, moe.experts.w2, moe.experts.w3):
        w.main_grad = torch.zeros(w.shape, device="cuda")  # type: ignore[attr-defined]
    found |= measure({"ours, routed, fp32 sums": arms["ours, routed experts"]}, rounds)
    flops = 18 * tokens * K * D * INNER
    dense = found["dense GEMMs"][0]
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    kind = "Zipf" if is_zipf else "balanced"
    print(f"\n{tokens} tokens, {experts} experts, {kind}: {int(counts.min())} to {int(counts.max())} pairs")
    print("| | ms | range | TFLOP/s | of dense | peak GiB |\n|---|---|---|---|---|---|")
    for name, (ms, low, high) in found.items():
        # The whole layer also runs the shared expert: a sixth of the pairs more.
        own = flops * (1 + 1 / K) if "whole" in name else flops / 3 if "forward" in name else flops
        rate, share = own / ms / 1e9, own / flops * dense / ms
        size = f"{memory[name]:.2f}" if name in memory else ""
        print(f"| {name} | {ms:.2f} | {low:.2f}–{high:.2f} | {rate:.0f} | {100 * share:.0f} % | {size} |")


# ---- kernel by kernel ---------------------------------------------------------------------------


def kernel_works(tokens: int, experts: int) -> dict[str, tuple[Work, float]]:
    """Every kernel on Flash's shapes, and the bytes it must move."""
    pairs, chosen = tokens * K, load(tokens, experts, False)
    logits, weights = torch.randn(tokens, experts, device="cuda"), torch.rand(tokens, K, device="cuda")
    order, inverse, ends = triton_route.sort_pairs(chosen, experts)
    source, rows, second = normal(tokens, D), normal(pairs, D), normal(pairs, D)
    gate, up, grad = (normal(pairs, INNER) for _ in range(3))
    bias = torch.zeros(experts, device="cuda")
    wide, narrow, score = 2.0 * pairs * D, 2.0 * pairs * INNER, 4.0 * tokens * experts
    own = 2.0 * tokens * D
    total = torch.zeros(experts, INNER, D, device="cuda")
    plain = lambda: total.add_(torch.nn.functional.grouped_mm(gate.t(), rows, offs=ends))
    router = normal(experts, D)
    return {
        "router logits (GEMM)": (lambda: gpu_moe.wide_mm(source, router.t()), own + score),
        "gate forward": (lambda: triton_route.gate_forward(logits, bias, None, K, 1.5), 2 * score),
        "gate backward": (lambda: triton_route.gate_backward(logits, chosen, weights, None, 1.5), 2 * score),
        "sort": (lambda: triton_route.sort_pairs(chosen, experts), 24.0 * pairs),
        "torch's stable argsort": (lambda: chosen.flatten().argsort(stable=True), 24.0 * pairs),
        "expand": (lambda: triton_moe.expand(source, inverse), own + wide),
        "combine": (lambda: triton_moe.combine(rows, inverse, base=source), wide + 2 * own),
        "combine two": (lambda: triton_moe.combine(rows, inverse, second=second), 2 * wide + own),
        "SwiGLU forward": (lambda: triton_moe.swiglu_forward(gate, up, 10.0, weights, order), 3 * narrow),
        "SwiGLU backward": (
            lambda: triton_moe.swiglu_backward(grad, gate, up, 10.0, weights, order),
            6 * narrow,
        ),
        "fp32 weight gradient": (
            lambda: triton_moe.add_weight_gradient(gate, rows, ends, total),
            8.0 * experts * INNER * D,
        ),
        "grouped_mm, then add": (plain, 12.0 * experts * INNER * D),
    }


def kernels(tokens: int, experts: int, rounds: int, copy_rate: float) -> None:
    works = kernel_works(tokens, experts)
    found = measure({name: repeated(work) for name, (work, _) in works.items()}, rounds)
    print(f"\n{tokens} tokens, {experts} experts")
    print("| kernel | µs | range | GB/s | of copy | TFLOP/s |\n|---|---|---|---|---|---|")
    for name, (ms, low, high) in found.items():
        us, rate = 100 * ms, works[name][1] / ms / 1e5
        is_gemm = name in ("fp32 weight gradient", "grouped_mm, then add")
        flops = f"{2 * tokens * K * D * INNER / us / 1e6:.0f}" if is_gemm else ""
        share = 100 * rate / copy_rate
        print(
            f"| {name} | {us:.1f} | {100 * low:.1f}–{100 * high:.1f} | {rate:.0f} | {share:.0f} % | {flops} |"
        )


WEIGHT_TILES = ((128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (256, 128, 64, 8, 4),
                (128, 128, 64, 4, 4), (128, 128, 64, 8, 3), (128, 128, 128, 8, 3))  # fmt: skip
WEIGHT_KEYS = ("rows", "columns", "inner", "num_warps", "num_stages")
WIDTHS = [{"columns": c, "num_warps": w} for c, w in ((2048, 4), (4096, 4), (4096, 8), (1024, 4), (1024, 2))]
GATES = [{"rows": r, "num_warps": w} for r, w in ((4, 4), (1, 1), (2, 1), (8, 4), (16, 4))]
SWEEPS = [
    (
        triton_moe,
        "WEIGHT_GRADIENT",
        "fp32 weight gradient",
        [dict(zip(WEIGHT_KEYS, t)) for t in WEIGHT_TILES],
    ),
    *((triton_moe, "COPY", name, WIDTHS) for name in ("expand", "combine", "combine two")),
    *((triton_moe, "SWIGLU", name, WIDTHS) for name in ("SwiGLU forward", "SwiGLU backward")),
    *((triton_route, "GATE", name, GATES) for name in ("gate forward", "gate backward")),
]


def sweep(tokens: int, experts: int, rounds: int) -> None:
    """Other tiles and warps, the fastest first."""
    works = kernel_works(tokens, experts)
    for module, table, name, settings in SWEEPS:
        shipped = dict(getattr(module, table))
        run = functools.partial(with_setting, module, table)
        arms = {str(x): repeated(functools.partial(run, x, works[name][0]), 5) for x in settings}
        print(f"\n{table}, {name}, {tokens} tokens, {experts} experts; shipped {shipped}")
        for text, (ms, low, high) in sorted(measure(arms, rounds).items(), key=lambda found: found[1]):
            print(f"  {200 * ms:8.1f} µs ({200 * low:.1f}–{200 * high:.1f})  {text}")
        getattr(module, table).update(shipped)


def with_setting(module: object, table: str, setting: dict[str, int], work: Work) -> None:
    getattr(module, table).update(setting)
    work()


def ceilings(rounds: int) -> float:
    """Prints the machine's; GB/s of a copy, reads and writes both counted."""
    square, source = normal(8192, 8192), torch.empty(2**29, device="cuda", dtype=torch.float16)
    target = torch.empty_like(source)
    found = measure({"gemm": lambda: square @ square, "copy": lambda: target.copy_(source)}, rounds)
    copy_rate = 2 * source.nbytes / found["copy"][0] / 1e6
    rate = 2 * 8192**3 / found["gemm"][0] / 1e9
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"8192³ bf16 {rate:.0f} TFLOP/s, copy {copy_rate:.0f} GB/s")
    return copy_rate


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep", action="store_true", help="try other tiles")
    parser.add_argument("--quick", action="store_true", help="the smallest case only")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    copy_rate = ceilings(options.rounds)
    correctness()
    cases = [(4096, 16, False), (4096, 16, True), (16384, 16, False), (16384, 16, True), (16384, 256, False),
             (16384, 256, True), (24576, 256, False)]  # fmt: skip
    for case in cases[:1] if options.quick else cases:
        layer(*case, options.rounds)
        torch.cuda.empty_cache()
    for case in ((4096, 16),) if options.quick else ((4096, 16), (4096, 48), (16384, 16)):
        kernels(*case, options.rounds, copy_rate)
    if options.sweep:
        sweep(4096, 16, options.rounds)
        sweep(4096, 48, options.rounds)
    print(f"\n{time.perf_counter() - began:.0f} s, compilation included")


if __name__ == "__main__":
    main()
