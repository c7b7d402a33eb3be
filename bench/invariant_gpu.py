"""The batch-invariant set on a GPU: bits, error, and time beside the libraries' at V4-Flash's shapes.

    python bench/invariant_gpu.py [--sweep]

Products (bf16), RMS norm and log-softmax, random data, each arm a CUDA graph of three calls on three inputs.
The goal is 1.2 x the library's time (cuBLAS; PyTorch's rms_norm and log_softmax), and 6 % of a training step:
the last tables sum what the set takes beyond the libraries over a step of the four-layer model of
`train_step_gpu.py`, and time that step in exact mode, whose other parts are composed and slow.
`--sweep` tries the tiles of few, middle and many rows, and says where their bits differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from gpu_timing import (
    Arm,
    Table,
    arguments,
    copy_rate,
    matrix_rate,
    median_text,
    relative_errors,
    time_arms,
)
from torch import Tensor
from torch.nn import functional

from consilience.model import exact
from consilience.model.kernels import gpu_norm, triton_invariant, triton_logprob_rows
from consilience.model.kernels.triton_invariant import linear

SHAPES = {  # outputs, inputs
    "query down": (1024, 4096),
    "query up": (32768, 1024),
    "expert gate": (2048, 4096),
    "expert down": (4096, 2048),
    "head": (129_280, 4096),
}
WIDTHS = {"norm, hidden": 4096, "norm, latent": 1024, "norm, 64 heads": 512}
VOCABULARY = 129_280
ROWS = (1, 8, 64, 512, 4096)
SETS = 3
GOAL = 1.2

TOKENS = 4096
LAYERS, EXPERTS, PICKS = 4, 16, 6
STEP_PRODUCTS = {  # outputs, inputs, rows: calls in a forward of `train_step_gpu.py`'s model
    (1024, 4096, TOKENS): LAYERS * 9,  # queries' latent, eight output groups
    (32768, 1024, TOKENS): LAYERS,
    (512, 4096, TOKENS): LAYERS,
    (4096, 8192, TOKENS): LAYERS,
    (2048, 4096, TOKENS): LAYERS * 2,
    (4096, 2048, TOKENS): LAYERS,
    (2048, 4096, TOKENS * PICKS // EXPERTS): LAYERS * EXPERTS * 2,
    (4096, 2048, TOKENS * PICKS // EXPERTS): LAYERS * EXPERTS,
    (VOCABULARY, 4096, TOKENS): 1,
}
STEP_NORMS = {(TOKENS, 4096): 2 * LAYERS + 1, (TOKENS, 1024): LAYERS, (TOKENS * 64, 512): LAYERS}

Pairs = list[tuple[Tensor, ...]]


def captured(operation: Callable[..., Any], inputs: Pairs) -> Arm:
    def run() -> None:
        for given in inputs:
            operation(*given)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cublas(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


def in_fp32(x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight, torch.float32)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return gpu_norm.norm_rotate(x, weight, None, 1e-6, 1.0)


def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight, 1e-6)


def torch_log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1)


def chosen(logits: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities and entropies of given tokens, as a trainer wants them."""
    return triton_logprob_rows.row_pass(logits, target, 1.0, None)


def torch_chosen(logits: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1).gather(1, target[:, None])


def normal(*size: int) -> Tensor:
    return torch.randn(*size, device="cuda")


def draw(num_rows: int, shape: tuple[int, int]) -> Pairs:
    return [(normal(num_rows, shape[1]).bfloat16(), normal(*shape).bfloat16()) for _ in range(SETS)]


def draw_norm(num_rows: int, width: int) -> Pairs:
    return [(normal(num_rows, width).bfloat16(), normal(width).bfloat16()) for _ in range(SETS)]


def draw_logits(num_rows: int, *, has_target: bool = False) -> Pairs:
    logits = [4 * normal(num_rows, VOCABULARY) for _ in range(SETS if num_rows < 2048 else 1)]
    target = torch.randint(VOCABULARY, (num_rows,), device="cuda")
    return [(z, target) if has_target else (z,) for z in logits]


def show_bits(table: Table) -> None:
    """Whether a row's bits depend on its batch: rows 0..n of many, for many n, ours and the library's."""
    with torch.no_grad():
        for name, shape in SHAPES.items():
            x, weight = draw(4096, shape)[0]
            wanted = x[:64].double() @ weight.double().t()
            arms = {"ours": linear, "cuBLAS": cublas}
            _bits_of(table, name, {a: lambda x, f=f, w=weight: f(x, w) for a, f in arms.items()}, x, wanted)
        for name, width in WIDTHS.items():
            x, weight = draw_norm(4096, width)[0]
            wanted = torch_norm(x[:64].double(), weight.double())
            arms = {"ours": norm, "torch": torch_norm}
            _bits_of(table, name, {a: lambda x, f=f, w=weight: f(x, w) for a, f in arms.items()}, x, wanted)
        (z,) = draw_logits(1024)[0]
        arms = {"ours": triton_logprob_rows.log_softmax, "torch": torch_log_softmax}
        _bits_of(table, "log-softmax", arms, z, z[:64].double().log_softmax(-1))


def _bits_of(
    table: Table, name: str, arms: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, wanted: Tensor
) -> None:
    for arm, operation in arms.items():
        whole = operation(x)
        counts = (1, 2, 8, 33, 64, 65, 200, 300, 1000)
        differing = [n for n in counts if not torch.equal(operation(x[:n]), whole[:n])]
        shifted = torch.equal(operation(x[77:]), whole[77:])
        errors = (f"{e:.1e}" for e in relative_errors(whole[:64], wanted))
        table.add(name, arm, differing or "none", shifted, *errors)


def show_agreement() -> None:
    """The trainer's log-probability against the sampler's log-softmax, bit for bit."""
    logits, target = draw_logits(512, has_target=True)[0]
    found, _ = triton_logprob_rows.summary(chosen(logits, target))
    rows = [triton_logprob_rows.log_softmax(z) for z in logits.split(7)]
    same = torch.equal(found, torch.cat(rows).gather(1, target[:, None])[:, 0])
    x, weight = draw(300, SHAPES["head"])[0]
    with exact.exact_mode(), torch.no_grad():
        whole = exact.logits(x, weight)
        same_logits = all(torch.equal(exact.logits(x[i : i + 5], weight), whole[i : i + 5]) for i in (0, 77))
    print(f"\nThe trainer's log-probabilities are the sampler's: {same}; their logits: {same_logits}.\n")


def show_times() -> None:
    table = Table("operation", "rows", "library", "ours", "ours again (A/A)", "ours / library")
    for name, shape in SHAPES.items():
        for rows in ROWS:
            _add_times(table, name, rows, {"library": cublas, "ours": linear}, draw(rows, shape))
    for name, width in WIDTHS.items():
        for rows in ROWS:
            count = rows * 64 if "heads" in name else rows
            _add_times(table, name, count, {"library": torch_norm, "ours": norm}, draw_norm(count, width))
    for rows in ROWS:
        arms = {"library": torch_log_softmax, "ours": triton_logprob_rows.log_softmax}
        _add_times(table, "log-softmax", rows, arms, draw_logits(rows))
        arms = {"library": torch_chosen, "ours": chosen}
        _add_times(table, "chosen log-probability", rows, arms, draw_logits(rows, has_target=True))


def _add_times(
    table: Table, name: str, rows: int, arms: Mapping[str, Callable[..., Any]], inputs: Pairs
) -> None:
    with torch.no_grad():
        graphs = {arm: captured(operation, inputs) for arm, operation in arms.items()}
        times = time_arms({**graphs, "again": captured(arms["ours"], inputs)})
    ratio = statistics.median(times["ours"]) / statistics.median(times["library"])
    cells = [median_text(ts, 1 / len(inputs), digits=4) for ts in times.values()]
    table.add(name, rows, *cells, f"{ratio:.2f} (goal {GOAL})")


def beyond(ours: Callable[..., Any], library: Callable[..., Any], inputs: Pairs) -> float:
    """Milliseconds of a call of ours beyond one of the library's."""
    with torch.no_grad():
        times = time_arms({"library": captured(library, inputs), "ours": captured(ours, inputs)}, rounds=5)
    return (statistics.median(times["ours"]) - statistics.median(times["library"])) / len(inputs)


def show_share() -> None:
    """What the set takes beyond the libraries in a forward, of a training step; and the exact step itself."""
    extra = {"products": 0.0, "norms": 0.0}
    for (outputs, inputs, rows), count in STEP_PRODUCTS.items():
        extra["products"] += count * beyond(linear, cublas, draw(rows, (outputs, inputs)))
    for (rows, width), count in STEP_NORMS.items():
        extra["norms"] += count * beyond(norm, torch_norm, draw_norm(rows, width))
    extra["log-probabilities"] = beyond(chosen, torch_chosen, draw_logits(TOKENS, has_target=True))
    torch.cuda.empty_cache()
    from train_step_gpu import our_step

    model, step = our_step(TOKENS, "none")

    def fast() -> None:
        model.zero_grad(set_to_none=True)
        step()

    def whole() -> None:
        with exact.exact_mode():
            fast()

    fast_ms = statistics.median(time_arms({"fast": fast}, rounds=5)["fast"])
    table = Table("beyond the libraries, 4,096 tokens", "ms", "of a fast step")
    for name, ms in {**extra, "the set": sum(extra.values())}.items():
        table.add(name, f"{ms:.2f}", f"{ms / fast_ms:.1%}")
    table.note("Goal: 6 %. One forward; backward products are cuBLAS's in both modes.")
    exact_ms = time_arms({"exact": whole}, rounds=2, warm_up=1).get("exact")
    text = "out of memory" if exact_ms is None else f"{statistics.median(exact_ms):.0f} ms"
    print(f"A fast step {fast_ms:.1f} ms; all of it in exact mode: {text}.")


def sweep() -> None:
    sizes = {
        "many": [(128, 256, 8), (128, 128, 8), (128, 128, 4), (256, 128, 8), (64, 256, 4)],
        "middle": [(128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4)],
        "few": [(64, 16, 4), (64, 32, 4), (64, 64, 4)],
    }
    stages = {"many": (3, 4), "middle": (3, 5), "few": (5, 8)}
    for which, rows in (("many", 4096), ("middle", 512), ("few", 8)):
        settings = [
            {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": s}
            for m, n, warps in sizes[which]
            for s in stages[which]
        ]
        for name in ("query down", "query up", "expert down"):
            _sweep_product(name, rows, settings)


def _sweep_product(name: str, rows: int, settings: list[dict[str, int]]) -> None:
    pairs = draw(rows, SHAPES[name])
    usual = in_fp32(*pairs[0])
    library = median_text(time_arms({"": captured(cublas, pairs)}, rounds=5)[""], 1 / SETS, 4)
    print(f"{name}, {rows} rows: cuBLAS {library} ms", flush=True)
    choose, step = triton_invariant._config, triton_invariant.BLOCK_K
    for config in settings:
        for triton_invariant.BLOCK_K in (64, 128) if rows == 8 else (64,):
            triton_invariant._config = lambda *_, config=config: config
            try:
                same = torch.equal(in_fp32(*pairs[0]), usual)
                times = time_arms({"": captured(in_fp32, pairs)}, rounds=5)[""]
            except Exception as fault:  # too much shared memory
                print(f"  {config}, steps of {triton_invariant.BLOCK_K}: {type(fault).__name__}")
                continue
            bits = "" if same else ", OTHER BITS"
            text = median_text(times, 1 / SETS, 4)
            print(f"  {config}, steps of {triton_invariant.BLOCK_K}: {text} ms{bits}", flush=True)
    triton_invariant._config, triton_invariant.BLOCK_K = choose, step


def main() -> None:
    if arguments(__doc__).parse_args().sweep:
        sweep()
        return
    show_bits(Table("operation", "arm", "row counts with other bits", "same at another place", "max", "rms"))
    show_agreement()
    print(f"Copy {copy_rate() / 1e12:.2f} TB/s, 8192³ bf16 product {matrix_rate() / 1e12:.0f} TFLOP/s.\n")
    print("Milliseconds a call:\n")
    show_times()
    print()
    show_share()


if __name__ == "__main__":
    main()
