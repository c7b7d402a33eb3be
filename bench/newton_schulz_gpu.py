"""Muon's iteration on one GPU: symmetric products against plain ones, at V4-Flash's matrices.

    python bench/newton_schulz_gpu.py [--sweep]

Ten steps (8 + 2) from fp32 matrices to bf16 ones, norm and cast included. Errors are against the same
iteration in fp64. `products` are the three products of every step by cuBLAS and nothing else: the goal is 0.8
of their time. `plain` is the iteration from cuBLAS with its elementwise work in the products' epilogues where
PyTorch can (baddbmm), `compiled` what torch.compile makes of it. FLOP counted are those of plain products. By
FLOP alone ours takes 0.67 (n = m) to 0.75 (n far below m) of them; with tiles that meet the diagonal and a
kernel at 0.9 of cuBLAS's rate 0.75 to 0.80 is expected of batches, and about 1 of a single matrix of 2,048
rows, whose tiles do not fill the chip. `--sweep` tries tiles, stages and groups of the symmetric product.
"""

from __future__ import annotations

import statistics

import torch
from gpu_timing import Arm, Table, arguments, matrix_rate, median_text, peak_bytes, relative_errors, time_arms
from torch import Tensor

from consilience.model.kernels import triton_symmetric
from consilience.model.kernels.newton_schulz import (
    COEFFICIENTS,
    iterate_halves,
    newton_schulz,
    newton_schulz_plainly,
)

SHAPES = {  # matrices of a batch, rows, columns
    "experts": (32, 2048, 4096),
    "one expert": (1, 2048, 4096),
    "square": (8, 4096, 4096),
    "one square": (1, 4096, 4096),
    "output": (4, 4096, 8192),
    "query up": (8, 1024, 32768),
    "query down, output groups": (64, 1024, 4096),
    "window, compressors": (64, 512, 4096),
    "routers": (43, 256, 4096),
}
GOAL = 0.8
SPECTRA = ("normal", "steep")


def draw(k: int, n: int, m: int, spectrum: str = "normal") -> Tensor:
    """Normal entries; `steep`: most of the norm in 32 directions, as gradients have it."""
    g = torch.randn(k, n, m, device="cuda")
    if spectrum == "steep":
        scale = torch.logspace(0, -2, 32, device="cuda")
        few = (torch.randn(k, n, 32, device="cuda") * scale) @ torch.randn(k, 32, m, device="cuda")
        g = few + 0.01 * g
    return g


def plain(g: Tensor) -> Tensor:
    """bf16 by cuBLAS: c A² + b A in one call, a on the diagonal, the product with Y."""
    y = (g / torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True)).bfloat16()
    gram, polynomial = (y.new_empty(len(y), y.shape[1], y.shape[1]) for _ in range(2))
    diagonal, next_y = polynomial.diagonal(dim1=1, dim2=2), torch.empty_like(y)
    for a, b, c in COEFFICIENTS:
        torch.bmm(y, y.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        diagonal.add_(a)
        torch.bmm(polynomial, y, out=next_y)
        y, next_y = next_y, y
    return y


def unfused(g: Tensor) -> Tensor:
    """The same for torch.compile to fuse."""
    y = (g / torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True)).bfloat16()
    for a, b, c in COEFFICIENTS:
        gram = torch.bmm(y, y.mT)
        y = a * y + torch.bmm(b * gram + c * torch.bmm(gram, gram), y)
    return y


def products(g: Tensor) -> Arm:
    """Thirty products on buffers that are there already."""
    y = g.bfloat16()
    gram, out = y @ y.mT / y.shape[2], torch.empty_like(y)
    square = torch.empty_like(gram)

    def run() -> None:
        for _ in COEFFICIENTS:
            torch.bmm(y, y.mT, out=gram)
            torch.bmm(gram, gram, out=square)
            torch.bmm(square, y, out=out)

    return run


def plain_flop(k: int, n: int, m: int) -> float:
    return 10.0 * k * (4 * n * n * m + 2 * n**3)


def singular_values(matrix: Tensor) -> Tensor:
    """Of one fp64 matrix [n, m], rising. Near 1 they come out of its Gram matrix as well as they went in."""
    return torch.linalg.eigvalsh(matrix @ matrix.mT).clamp(min=0).sqrt()


def show_errors() -> None:
    table = Table("matrices", "spectrum", "arm", "max", "rms", "singular values apart from fp64's")
    ways = {"ours": iterate_halves, "plain, bf16": plain, "plain, fp32": newton_schulz_plainly}
    for shape in ((2, 1024, 4096), (1, 2048, 4096)):
        for spectrum in SPECTRA:
            g = draw(*shape, spectrum)
            exact = newton_schulz_plainly(g.double())
            wanted = singular_values(exact[0])
            for name, way in ways.items():
                found = way(g).double()
                errors = (f"{e:.1e}" for e in relative_errors(found, exact))
                apart = (singular_values(found[0]) - wanted).abs().max().item()
                table.add(f"{shape[1]} x {shape[2]}", spectrum, name, *errors, f"{apart:.1e}")


def show_times(rate: float) -> None:
    compiled = torch.compile(unfused, dynamic=False)
    names = ("products", "plain", "ours", "ours again (A/A)", "compiled")
    table = Table("matrices", "shape", *(f"{n} ms" for n in names), "TFLOP/s of products", "ours / products")
    for name, (k, n, m) in SHAPES.items():
        g = draw(k, n, m)
        arms: dict[str, Arm] = {"products": products(g), "plain": lambda g=g: plain(g)}
        arms |= {arm: lambda g=g: iterate_halves(g) for arm in names[2:4]}
        if name in ("experts", "one square"):  # compiling takes a while
            try:
                compiled(g)
                arms["compiled"] = lambda g=g: compiled(g)
            except Exception as fault:
                print(f"torch.compile: {type(fault).__name__}: {str(fault)[:200]}")
        times = time_arms(arms)
        cells = [median_text(times[arm]) if arm in times else "" for arm in names]
        base, ours = (statistics.median(times[arm]) for arm in ("products", "ours"))
        speed = f"{plain_flop(k, n, m) / base / 1e9:.0f}"
        table.add(name, f"{k} x {n} x {m}", *cells, speed, f"{ours / base:.2f} (goal {GOAL})")
        del g, arms
    table.note(f"8192³ bf16 product {rate / 1e12:.0f} TFLOP/s.")
    g = draw(32, 2048, 4096)
    table.note(f"Peak beyond 32 experts' matrices: {peak_bytes(lambda: newton_schulz(g)) / 2**30:.2f} GiB.")


def sweep() -> None:
    """Milliseconds of A = XXᵀ and of b A + c A², per setting, beside cuBLAS's."""
    sizes = ((128, 256, 8), (128, 128, 4), (128, 128, 8), (256, 128, 8), (64, 256, 4))
    settings = [(*size, stages, group) for size in sizes for stages in (3, 4) for group in (4, 8, 16)]
    for name in ("experts", "output", "query up", "query down, output groups", "window, compressors"):
        k, n, m = SHAPES[name]
        x = draw(k, n, m).bfloat16()
        gram = x @ x.mT / m
        out = torch.empty_like(gram)
        library = {
            "gram": lambda x=x, out=out: torch.bmm(x, x.mT, out=out),
            "square": lambda gram=gram, out=out: torch.bmm(gram, gram, out=out),
        }
        for arm, times in time_arms(library, rounds=5).items():
            print(f"{name} {(k, n, m)}, {arm}: cuBLAS {median_text(times, digits=3)} ms")
        for block_m, block_n, warps, stages, group in settings:
            config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64}
            config |= {"num_warps": warps, "num_stages": stages}
            triton_symmetric.CONFIGS.update(large=config, small=config)
            triton_symmetric.GROUP = group
            triton_symmetric._order.cache_clear()
            ours = {
                "gram": lambda x=x, out=out: triton_symmetric.product(x, out),
                "square": lambda gram=gram, out=out: triton_symmetric.product(gram, out, gram, scale=0.5),
            }
            try:
                times = time_arms(ours, rounds=5)
            except Exception as fault:  # too much shared memory
                print(f"  {block_m} x {block_n}, {warps} warps, {stages} stages: {type(fault).__name__}")
                continue
            cells = ", ".join(f"{arm} {median_text(ts, digits=3)}" for arm, ts in times.items())
            print(f"  {block_m} x {block_n}, {warps} warps, {stages} stages, groups of {group}: {cells} ms")


def main() -> None:
    if arguments(__doc__).parse_args().sweep:
        sweep()
        return
    rate = matrix_rate()
    show_errors()
    show_times(rate)


if __name__ == "__main__":
    main()
