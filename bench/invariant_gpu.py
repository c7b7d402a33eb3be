"""The batch-invariant product on a GPU: bits, error, and time beside cuBLAS at V4-Flash's shapes.

    python bench/invariant_gpu.py [--sweep]

bf16, random data, each arm a CUDA graph of three calls on three inputs. The goal is 1.2 x cuBLAS's time.
`cuBLAS in tiles` is the exact mode's product: tiles of 256 rows.
"""

from __future__ import annotations

import statistics

import torch
from gpu_timing import Arm, Table, arguments, copy_rate, median_text, relative_errors, time_arms
from torch import Tensor

from consilience.model import exact
from consilience.model.kernels import triton_invariant
from consilience.model.kernels.triton_invariant import linear

SHAPES = {  # outputs, inputs
    "query down": (1024, 4096),
    "query up": (32768, 1024),
    "expert gate": (2048, 4096),
    "expert down": (4096, 2048),
    "head": (129_280, 4096),
}
SETS = 3
GOAL = 1.2


def captured(product, pairs: list[tuple[Tensor, Tensor]]) -> Arm:
    def run() -> None:
        for x, weight in pairs:
            product(x, weight)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cublas(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def in_tiles(x: Tensor, weight: Tensor) -> Tensor:
    with exact.exact_mode():
        return exact.linear(x, weight)


def draw(num_rows: int, shape: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    normal = lambda *size: torch.randn(*size, device="cuda").bfloat16()
    return [(normal(num_rows, shape[1]), normal(*shape)) for _ in range(SETS)]


def show_bits(table: Table) -> None:
    """Whether a row's bits depend on its batch: rows 0..n of 4096, for many n, ours and cuBLAS's."""
    for name, shape in SHAPES.items():
        x, weight = draw(4096, shape)[0]
        for arm, product in {"ours": linear, "cuBLAS": cublas}.items():
            whole = product(x, weight)
            differing = [
                n
                for n in (1, 2, 8, 33, 64, 65, 200, 1000)
                if not torch.equal(product(x[:n], weight), whole[:n])
            ]
            shifted = torch.equal(product(x[77:], weight), whole[77:])
            rows = slice(0, 64)
            error = relative_errors(whole[rows], x[rows].double() @ weight.double().t())
            table.add(name, arm, differing or "none", shifted, *(f"{e:.1e}" for e in error))


def sweep() -> None:
    for rows, which in ((4096, "many"), (8, "few")):
        chosen = triton_invariant.CONFIGS[which]
        tiles = [(128, 256, 8), (128, 128, 8), (128, 128, 4), (256, 128, 8), (64, 256, 8)]
        if which == "few":
            tiles = [(64, 16, 4), (64, 32, 4), (64, 64, 4), (64, 128, 4)]
        for name in ("query up", "expert gate", "head"):
            pairs = draw(rows, SHAPES[name])
            whole = cublas(*pairs[0])
            print(
                f"{name}, {rows} rows, cuBLAS {median_text(time_arms({'': captured(cublas, pairs)})[''])} ms"
            )
            for m, n, warps in tiles:
                for stages in (2, 3, 4, 5, 6):
                    config = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
                    triton_invariant.CONFIGS[which] = config
                    try:
                        found = linear(*pairs[0])
                        times = time_arms({"": captured(linear, pairs)}, rounds=5)[""]
                    except Exception as fault:  # too much shared memory
                        print(f"  {config}: {type(fault).__name__}")
                        continue
                    print(
                        f"  {config}: {median_text(times)} ms, {relative_errors(found, whole)[1]:.0e} apart"
                    )
        triton_invariant.CONFIGS[which] = chosen


def main() -> None:
    if arguments(__doc__).parse_args().sweep:
        sweep()
        return
    show_bits(Table("product", "arm", "row counts with other bits", "same at another place", "max", "rms"))
    print(f"\nCopy {copy_rate() / 1e12:.2f} TB/s. Milliseconds of {SETS} products:\n")
    table = Table("product", "rows", "cuBLAS", "ours", "ours again (A/A)", "cuBLAS in tiles", "ours / cuBLAS")
    for name, shape in SHAPES.items():
        for rows in (1, 8, 64, 512, 4096):
            pairs = draw(rows, shape)
            products = {"cuBLAS": cublas, "ours": linear, "again": linear, "tiles": in_tiles}
            times = time_arms({arm: captured(product, pairs) for arm, product in products.items()})
            ratio = statistics.median(times["ours"]) / statistics.median(times["cuBLAS"])
            cells = [median_text(ts, digits=3) for ts in times.values()]
            table.add(name, rows, *cells, f"{ratio:.2f} (goal {GOAL})")


if __name__ == "__main__":
    main()
