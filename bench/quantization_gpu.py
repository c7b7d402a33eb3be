"""Quantisers against the copy rate, FP8 projections against bf16 ones, on one GPU.

    PYTHONPATH=. python bench/quantization_gpu.py [--sweep]

First what the kernels make against the plain quantisers on the CPU (bits that differ) and FP8 products
against fp64, by the decoded values (the products' own error) and by the unrounded ones (rounding included).
Then each quantiser over more data than the L2 cache holds; then projections at Flash's widths and 4,096
tokens: products alone and whole (rounding, products, gradients). Random data. 80 % of the copy rate and 1.5
× bf16 are asked for.

Predicted for an H100 at 3 TB/s: 134 M values in bf16 to codes and turned codes 0.18 ms; products at 1,200
TFLOP/s 1.7 × bf16's 700. Whole projections: rounding takes 4 bytes for each entry of x, dy and W; at 4,096
tokens w1 1.36 ×, wq_b 1.27 × (its gradient has 32,768 columns), wo_b 1.49 ×, the shared expert 1.5 ×.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from gpu_timing import (
    Table,
    arguments,
    copy_rate,
    matrix_rate,
    median_text,
    peak_bytes,
    relative_errors,
    time_arms,
)
from torch import Tensor
from torch.nn import functional

from consilience.model.kernels import fp8_linear, gpu_moe, triton_quantize, triton_scaled_mm
from consilience.model.number_formats import E2M1, E4M3, decode_fp8, encode_fp8
from consilience.model.quantization import (
    fake_fp8,
    fake_fp8_tiles,
    fake_mxfp4,
    hadamard,
    index_values,
    kv_values,
)

TOKENS, LIMIT = 4096, 10.0
# name -> inputs, outputs
SHAPES = {
    "wq_a": (4096, 1024),
    "wq_b": (1024, 32768),
    "wkv": (4096, 512),
    "wo_b": (8192, 4096),
    "indexer.wq_b": (1024, 8192),
    "shared w1": (4096, 2048),
    "shared w2": (2048, 4096),
}
Arm = Callable[[], Any]


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal values in bf16, columns from 2^-2 to 2^2."""
    columns = 2.0 ** torch.randint(-2, 3, shape[-1:], device="cuda")
    return (torch.randn(*shape, device="cuda") * columns * scale).bfloat16()


def repeated(arm: Arm, times: int = 8) -> Arm:
    def run() -> None:
        for _ in range(times):
            arm()

    return run


# ---- correctness --------------------------------------------------------------------------------


def check_bits() -> None:
    """How many results of each kernel differ from the plain quantiser's on the CPU."""
    x = normal(513, 1024)
    weight = normal(384, 640, scale=0.02)
    pairs = {
        "MXFP4 1×32": (fake_mxfp4, x),
        "FP8 1×128": (functools.partial(fake_fp8, width=128), x),
        "FP8 1×64, 64 of 512 channels apart": (functools.partial(kv_values, num_rope=64), x.view(-1, 512)),
        "FP8 128×128": (fake_fp8_tiles, weight),
        "Hadamard": (hadamard, x.view(-1, 128)),
        "Hadamard + FP4": (index_values, x.view(-1, 128)),
    }
    table = Table("kernel", "values", "differing from the plain quantiser")
    for name, (work, given) in pairs.items():
        found, expected = work(given).cpu(), work(given.cpu())
        table.add(name, given.numel(), int((found.view(torch.int16) != expected.view(torch.int16)).sum()))
    codes, scales, turned, turned_scales = triton_quantize.encode_rows(x[:512])
    for name, found, scale, source in (
        ("codes of rows", codes, scales, x[:512].cpu()),
        ("codes of columns", turned, turned_scales, x[:512].cpu().t().contiguous()),
    ):
        expected, exponents = encode_fp8(source, tile=(1, 128))
        count = (found.cpu().view(torch.uint8) != expected.view(torch.uint8)).sum()  # type: ignore[union-attr]
        count += (scale.cpu().t() != exponents.float()).sum()  # type: ignore[union-attr]
        table.add(name, source.numel(), int(count))


def decoded(x: Tensor, tile: tuple[int, int]) -> Tensor:
    return decode_fp8(*encode_fp8(x.detach().cpu(), tile), torch.float32, tile).double().cuda()


def check_products() -> None:
    """Relative errors of the three products of a projection of 1,024 inputs and 2,048 outputs."""
    x, weight, grad = normal(1024, 1024), normal(2048, 1024, scale=0.03), normal(1024, 2048)
    wide = [t.double() for t in (x, weight, grad)]
    unrounded = (wide[0] @ wide[1].t(), wide[2] @ wide[1], wide[2].t() @ wide[0])
    rows, tiles = (1, 128), (128, 128)
    across = lambda t: decoded(t.t().contiguous(), rows)
    rounded = (
        decoded(x, rows) @ decoded(weight, tiles).t(),
        decoded(grad, rows) @ decoded(weight, tiles),
        across(grad) @ across(x).t(),
    )
    table = Table("product", "arm", "largest / RMS to the decoded", "largest / RMS to the unrounded")
    for arm, multiply in product_arms().items():
        for name, make, truth, whole in zip(("y", "dx", "dW"), operands(x, weight, grad), rounded, unrounded):
            left, right, is_tiled = make
            found = multiply(left, right, torch.float32, is_tiled=is_tiled)
            text = ["{:.1e} / {:.1e}".format(*relative_errors(found, t)) for t in (truth, whole)]
            table.add(name, arm, *text)
    bf16 = (x @ weight.t(), grad @ weight, grad.t() @ x)
    for name, found, whole in zip(("y", "dx", "dW"), bf16, unrounded):
        table.add(name, "bf16", "", "{:.1e} / {:.1e}".format(*relative_errors(found, whole)))


def product_arms() -> dict[str, Callable[..., Tensor]]:
    triton = lambda a, b, dtype, is_tiled: triton_scaled_mm.scaled_mm(*a, *b, dtype, is_tiled=is_tiled)
    return {"cuBLAS": fp8_linear.product, "Triton": triton}


def operands(x: Tensor, weight: Tensor, grad: Tensor) -> list[tuple[Any, Any, bool]]:
    """Both factors, and whether the second is in tiles, of y, dx and dW."""
    x_codes, d_codes = triton_quantize.encode_rows(x), triton_quantize.encode_rows(grad)
    codes = triton_quantize.encode_tiles(weight)
    return [
        (x_codes[:2], codes[:2], True),
        (d_codes[:2], codes[2:], True),
        (d_codes[2:], x_codes[2:], False),
    ]


# ---- quantisers ---------------------------------------------------------------------------------


def quantiser_arms() -> dict[str, tuple[Arm, float]]:
    """Each kernel with the bytes it must move; inputs of 134 M values."""
    x = normal(32768, 4096)
    heads, kv, weight = x.view(-1, 128), x.view(-1, 512), x.view(32768, 4096)
    gate, up = x[:16384], x[16384:]
    n = float(x.numel())
    q = triton_quantize
    return {
        "MXFP4 1×32": (lambda: q.fake_blocks(x, 32, E2M1), 4 * n),
        "FP8 1×128": (lambda: q.fake_blocks(x, 128, E4M3), 4 * n),
        "KV, 1×64 of 448": (lambda: q.fake_blocks(kv, 64, E4M3, 448), 4 * n),
        "Hadamard": (lambda: q.rotate_blocks(heads, None), 4 * n),
        "Hadamard + FP4": (lambda: q.rotate_blocks(heads, E2M1), 4 * n),
        "codes of rows": (lambda: q.encode_rows(x, has_turned=False), 3 * n),
        "codes of columns": (lambda: q.encode_rows(x, has_codes=False), 3 * n),
        "codes of both": (lambda: q.encode_rows(x), 4 * n),
        "codes of weights": (lambda: q.encode_tiles(weight, has_turned=False), 3 * n),
        "codes of weights, both": (lambda: q.encode_tiles(weight), 4 * n),
        "values of weights": (lambda: q.fake_tiles(weight), 4 * n),
        **swiglu_arms(gate, up),
    }


def swiglu_arms(gate: Tensor, up: Tensor) -> dict[str, tuple[Arm, float]]:
    from consilience.model.kernels import triton_swiglu_codes as fused

    n, grad = float(gate.numel()), gate.flip(0)
    return {
        "SwiGLU to codes": (lambda: fused.forward(gate, up, LIMIT), 6 * n),
        "SwiGLU backward to codes": (lambda: fused.backward(grad, gate, up, LIMIT), 10 * n),
    }


def quantisers(rate: float) -> None:
    arms = quantiser_arms()
    found = time_arms({name: repeated(arm) for name, (arm, _) in arms.items()})
    again = time_arms({"codes of both": repeated(arms["codes of both"][0])})
    table = Table("quantiser, 134 M values", "ms", "GB/s", "of the copy rate")
    for name, times in [*found.items(), ("codes of both, again (A/A)", again["codes of both"])]:
        num_bytes = arms[name.removesuffix(", again (A/A)")][1]
        achieved = num_bytes / (statistics.median(times) / 8e3)
        table.add(name, median_text(times, 1 / 8, 3), f"{achieved / 1e9:.0f}", f"{achieved / rate:.0%}")
    x = normal(4096, 4096)
    plain = time_arms({"FP4": lambda: composed(x, 32, E2M1), "FP8": lambda: composed(x, 128, E4M3)}, rounds=5)
    ours = time_arms({"FP4": repeated(lambda: triton_quantize.fake_blocks(x, 32, E2M1))}, rounds=5)["FP4"]
    table.note(
        f"4,096 × 4,096 composed from PyTorch's operations: FP4 {median_text(plain['FP4'], 1, 3)} ms, "
        f"FP8 {median_text(plain['FP8'], 1, 3)} ms; the kernel {median_text(ours, 1 / 8, 3)} ms."
    )


def composed(x: Tensor, width: int, minifloat: Any) -> Tensor:
    """The plain quantiser on the GPU."""
    from consilience.model.number_formats import blocks, choose_scale, round_to

    grouped = blocks(x.float(), width)
    return round_to(grouped, choose_scale(grouped.abs().amax(-1, keepdim=True), minifloat), minifloat).to(
        x.dtype
    )


# ---- projections --------------------------------------------------------------------------------


def products(name: str, table: Table) -> None:
    """Each product alone, operands ready."""
    inner, out = SHAPES[name]
    x, weight, grad = normal(TOKENS, inner), normal(out, inner, scale=0.02), normal(TOKENS, out)
    plain = (lambda: x @ weight.t(), lambda: grad @ weight, lambda: grad.t() @ x)
    made = operands(x, weight, grad)
    for i, product in enumerate(("y", "dx", "dW")):
        arms: dict[str, Arm] = {"bf16": repeated(plain[i])}
        for arm, multiply in product_arms().items():
            left, right, is_tiled = made[i]
            arms[arm] = repeated(functools.partial(multiply, left, right, torch.bfloat16, is_tiled=is_tiled))
        found = {arm: statistics.median(times) / 8 for arm, times in time_arms(arms, rounds=5).items()}
        flop = 2.0 * TOKENS * inner * out
        texts = [f"{ms:.3f} ({flop / ms / 1e9:.0f})" for ms in found.values()]
        ratios = [f"{found['bf16'] / found[arm]:.2f}" for arm in ("cuBLAS", "Triton") if arm in found]
        table.add(name, product, *texts, *ratios)


def trained(work: Callable[..., Any], leaves: list[Tensor], grads: list[Tensor]) -> Arm:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(work(*leaves), grads)

    return run


def projections(name: str, outs: tuple[int, ...], inner: int, table: Table) -> None:
    """Forward, and forward with backward, rounding included; several projections of the same rows at once."""
    x = normal(TOKENS, inner).requires_grad_()
    weights = [normal(out, inner, scale=0.02).requires_grad_() for out in outs]
    grads = [normal(TOKENS, out) for out in outs]
    plain = lambda x, *ws: tuple(functional.linear(x, w) for w in ws)
    compare(name, {"bf16": plain, "FP8": fp8_linear.by_kernels}, [x, *weights], grads, table)


def shared_expert(table: Table) -> None:
    """All of a shared expert: SwiGLU between its projections."""
    from consilience.model.kernels import fp8_expert

    x = normal(TOKENS, 4096).requires_grad_()
    sizes = ((2048, 4096), (4096, 2048), (2048, 4096))
    weights = [normal(*size, scale=0.02).requires_grad_() for size in sizes]
    by = lambda w: functools.partial(functional.linear, weight=w)
    joined = lambda x, w1, w2, w3: by(w2)(gpu_moe._SwiGLU.apply(by(w1)(x), by(w3)(x), LIMIT))

    def apart(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        gate, up = fp8_linear.by_kernels(x, w1, w3)
        return fp8_linear.by_kernels(gpu_moe._SwiGLU.apply(gate, up, LIMIT), w2)[0]  # type: ignore[arg-type]

    fused = lambda x, w1, w2, w3: fp8_expert.by_kernels(x, w1, w2, w3, LIMIT)
    arms = {"bf16": joined, "FP8": fused, "FP8, SwiGLU apart": apart}
    compare("shared expert", arms, [x, *weights], [normal(TOKENS, 4096)], table)


def compare(
    name: str, works: dict[str, Callable[..., Any]], leaves: list[Tensor], grads: list[Tensor], table: Table
) -> None:
    frozen = [leaf.detach() for leaf in leaves]
    forward = {
        f"{arm}": repeated(functools.partial(under_no_grad, work, frozen), 4) for arm, work in works.items()
    }
    both = {arm: repeated(trained(work, leaves, grads), 4) for arm, work in works.items()}
    times = {0: time_arms(forward, rounds=5), 1: time_arms(both, rounds=5)}
    kept = {arm: peak_bytes(functools.partial(work, *leaves)) / 2**20 for arm, work in works.items()}
    base = [statistics.median(times[i]["bf16"]) for i in (0, 1)]
    for arm in works:
        ratios = [base[i] / statistics.median(times[i][arm]) for i in (0, 1)]
        cells = [median_text(times[i][arm], 1 / 4, 3) for i in (0, 1)]
        table.add(name, arm, cells[0], f"{ratios[0]:.2f}", cells[1], f"{ratios[1]:.2f}", f"{kept[arm]:.0f}")


def under_no_grad(work: Callable[..., Any], leaves: list[Tensor]) -> None:
    with torch.no_grad():
        work(*leaves)


def linears() -> None:
    table = Table(
        "4,096 tokens", "product", "bf16 ms (TFLOP/s)", "cuBLAS FP8", "Triton FP8", "× cuBLAS", "× Triton"
    )
    for name in SHAPES:
        products(name, table)
    print()
    table = Table("projection", "arm", "forward ms", "×", "with backward ms", "×", "MiB, forward")
    for name, (inner, out) in SHAPES.items():
        projections(name, (out,), inner, table)
    projections("wq_a + wkv", (1024, 512), 4096, table)
    projections("w1 + w3", (2048, 2048), 4096, table)
    shared_expert(table)
    table.note(
        "Forward without gradients keeps a weight's codes until it changes; with gradients codes are new."
    )


# ---- sweep --------------------------------------------------------------------------------------

WARPS = [{"num_warps": w, "maxnreg": r} for w, r in ((8, 128), (8, 168), (16, 64), (16, 80), (4, 255))]
VALUES = [
    {"values": v, "num_warps": w}
    for v, w in ((1024, 1), (2048, 2), (2048, 4), (4096, 4), (8192, 4), (8192, 8))
]
TILES = [dict(zip(("rows", "columns", "group", "num_warps", "num_stages"), t)) for t in (
    (128, 128, 8, 8, 3), (128, 128, 8, 8, 4), (128, 128, 8, 8, 5), (128, 64, 8, 4, 3), (128, 64, 8, 4, 4),
    (64, 128, 8, 4, 3), (64, 128, 8, 4, 4), (128, 128, 16, 8, 4), (64, 64, 8, 4, 4),
)]  # fmt: skip


def sweep() -> None:
    """Other launch settings of every kernel, the fastest first."""
    from consilience.model.kernels import triton_swiglu_codes as fused

    arms = quantiser_arms()
    settings: list[tuple[ModuleType, str, list[dict[str, int]], list[str]]] = [
        (triton_quantize, "FAKE", VALUES, ["MXFP4 1×32", "FP8 1×128", "KV, 1×64 of 448"]),
        (triton_quantize, "INDEX", VALUES, ["Hadamard + FP4"]),
        (triton_quantize, "CODES", WARPS, ["codes of rows", "codes of both", "codes of weights, both"]),
        (fused, "CODES", WARPS, ["SwiGLU to codes"]),
        (fused, "BACKWARD", WARPS, ["SwiGLU backward to codes"]),
    ]
    for module, table, choices, names in settings:
        for name in names:
            try_settings(module, table, choices, name, arms[name][0])
    for name in ("shared w1", "wq_b"):
        inner, out = SHAPES[name]
        made = operands(normal(TOKENS, inner), normal(out, inner, scale=0.02), normal(TOKENS, out))
        for (left, right, is_tiled), product in zip(made, ("y", "dx", "dW")):
            multiply = functools.partial(
                product_arms()["Triton"], left, right, torch.bfloat16, is_tiled=is_tiled
            )
            try_settings(triton_scaled_mm, "PRODUCT", TILES, f"{name}: {product}", multiply)


def try_settings(module: ModuleType, table: str, choices: list[dict[str, int]], name: str, arm: Arm) -> None:
    known = dict(getattr(module, table))

    def run(setting: dict[str, int]) -> None:
        getattr(module, table).update(setting)
        repeated(arm)()

    found = time_arms({str(choice): functools.partial(run, choice) for choice in choices}, rounds=5)
    getattr(module, table).update(known)
    print(f"\n{table}, {name}; shipped {known}")
    for text, times in sorted(found.items(), key=lambda pair: statistics.median(pair[1])):
        print(f"  {median_text(times, 1 / 8, 3)} ms  {text}", flush=True)


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.manual_seed(0)
    began = time.perf_counter()
    if options.sweep:
        sweep()
        return
    machine = SimpleNamespace(copy=copy_rate(), matrix=matrix_rate())
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {machine.copy / 1e12:.2f} TB/s, ",
        end="",
    )
    print(f"8192³ bf16 {machine.matrix / 1e12:.0f} TFLOP/s\n")
    for part in (check_bits, check_products, lambda: quantisers(machine.copy), linears):
        part()
        print(flush=True)
    print(f"{time.perf_counter() - began:.0f} s, compilation included")


if __name__ == "__main__":
    main()
