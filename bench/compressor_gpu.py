"""Compressors, norms and rotations on one GPU: our kernels, composed operations, a copy of their bytes.

    python bench/compressor_gpu.py [--out FOLDER] [--tokens 4096 32768] [--sweep]

Flash's widths (hidden 4096; CSA 512 with its index compressor of 128; HCA 512) in bf16, packed samples of
1,000 to 3,000 tokens. Errors against fp64 come first. `floor` is the bytes a kernel must move (inputs read
once, outputs written once) at the copy rate of the same run. Kernels run several times in one CUDA graph on
three sets of inputs by turns, so that neither launches nor the second-level cache count. The issue's goal is
twice the floor. `--sweep` tries the launch settings.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_timing import Table, arguments, copy_rate, median_text, relative_errors, time_arms

from consilience.model.compressor import Compressor
from consilience.model.config import PRESETS, ModelConfig
from consilience.model.kernels import gpu_compressor, gpu_norm, triton_compressor, triton_norm
from consilience.model.layout import Layout, packed_layout
from consilience.model.norm import plain_norm
from consilience.model.rope import rotate

SETS = 3
CALLS = 12
KINDS = {"CSA 512": (512, 4), "CSA index 128": (128, 4), "HCA 512": (512, 128)}


def flash() -> ModelConfig:
    return replace(
        PRESETS["flash"],
        num_hidden_layers=3,
        compress_ratios=(0, 4, 128),
        num_hash_layers=1,
        num_nextn_predict_layers=0,
        mtp_compress_ratios=(),
    )


def layout_of(tokens: int) -> Layout:
    """One row of packed samples."""
    g = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(min(int(torch.randint(1000, 3000, (1,), generator=g)), tokens - sum(lengths)))
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(n) for n in lengths])
    return packed_layout(flash(), segment[None].cuda(), position[None].cuda(), None)


def module_of(width: int, ratio: int) -> Compressor:
    with torch.device("cuda"):
        module = Compressor(flash(), width, ratio, torch.bfloat16)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (module.wkv.weight, module.wgate.weight):
            p.normal_(0, p.shape[1] ** -0.5)
        module.ape.normal_()
        module.norm.weight.normal_(1, 0.1)
    return module


def repeated(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """CALLS calls in turn as one CUDA graph."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in itertools.islice(itertools.cycle(calls), CALLS):
            call()
    return graph.replay


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compressors as PyTorch's operations (their norm keeps its kernel)."""
    chosen = gpu_compressor.uses_triton
    gpu_compressor.uses_triton = lambda *_: False  # type: ignore[assignment]
    try:
        yield
    finally:
        gpu_compressor.uses_triton = chosen


@dataclass(frozen=True)
class Case:
    """A kernel's calls on each set of inputs, the composed twin's if any, and the bytes it must move."""

    name: str
    calls: list[Callable[[], Any]]
    twins: list[Callable[[], Any]]
    num_bytes: int


def compressor_cases(name: str, tokens: int, layout: Layout) -> list[Case]:
    """Pooling, norm and rotation without the projections: forward and backward."""
    width, ratio = KINDS[name]
    module, windows = module_of(width, ratio), layout.windows[ratio]
    series, closing = module.ape.shape[1], windows.closing
    weights = gpu_compressor.Weights(
        module.wkv.weight, module.wgate.weight, module.ape, module.norm.weight, 1e-6
    )
    place = gpu_compressor.entries_of(closing, ratio, layout.compressed_rotation, windows.num_columns)
    count = closing.row.numel()
    forward, backward, twins = [], [], []
    for _ in range(SETS):
        projected = torch.randn(tokens, 2 * series, device="cuda")
        out = torch.empty(1, windows.num_columns, width, device="cuda", dtype=torch.bfloat16)
        d_out = torch.randn(count, width, device="cuda").bfloat16()
        halves = (projected[:, :series], projected[:, series:])
        finished = (*halves, weights.ape, weights.norm, 1e-6, place, out)
        pooled = gpu_compressor.finish(*finished)
        forward.append(lambda finished=finished: gpu_compressor.finish(*finished))
        given = (projected, pooled, weights, place, d_out, torch.bfloat16)
        backward.append(lambda given=given: gpu_compressor.pooled_gradient(*given))

        def twin(p: torch.Tensor = projected) -> torch.Tensor:
            gates = module._biased(p[None, :, series:], layout)
            return module._pool(p[None, :, :series], gates, closing, layout, torch.bfloat16)

        with torch.no_grad():
            twins.append(twin)
    read, written = tokens * 2 * series * 4, count * width * 2
    return [
        Case(f"{name} forward", forward, twins, read + written),
        Case(f"{name} backward", backward, [], read + written + read // 2),
    ]


def norm_cases(name: str, tokens: int, layout: Layout) -> list[Case]:
    heads, width, has_weight, is_turned = {
        "queries 64 x 512": (64, 512, False, True),
        "hidden 4096": (1, 4096, True, False),
        "latent 1024": (1, 1024, True, False),
        "keys 512": (1, 512, True, True),
    }[name]
    weight = torch.ones(width, device="cuda", dtype=torch.bfloat16) if has_weight else None
    pairs = layout.compressed_rotation[0]
    turn = torch.view_as_real(pairs).contiguous() if is_turned else None
    forward, backward, twins = [], [], []
    for _ in range(SETS):
        x, d_y = (torch.randn(tokens, heads, width, device="cuda").bfloat16() for _ in "ab")
        forward.append(lambda x=x: triton_norm.forward(x, weight, turn, 1e-6, 1.0))
        backward.append(lambda x=x, d=d_y: triton_norm.backward(x, weight, turn, 1e-6, 1.0, d))

        def twin(x: torch.Tensor = x) -> torch.Tensor:
            y = plain_norm(x, 1e-6).to(x.dtype)
            y = y if weight is None else y * weight
            return composed_rotation(y, pairs[:, None]) if is_turned else y

        twins.append(twin)
    size = tokens * heads * width * 2
    return [
        Case(f"{name} forward", forward, twins, 2 * size),
        Case(f"{name} backward", backward, [], 3 * size),
    ]


def composed_rotation(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """`rotate` without its kernel."""
    width = 2 * rotation.shape[-1]
    pairs = torch.view_as_complex(x[..., -width:].float().unflatten(-1, (-1, 2)))
    turned = torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)
    return torch.cat((x[..., :-width], turned), dim=-1)


NORMS = ["queries 64 x 512", "hidden 4096", "latent 1024", "keys 512"]


def show_errors() -> None:
    """Whole compressors and norms against fp64: each output's and gradient's largest and RMS error."""
    table = Table("operation", "tensor", "max", "rms")
    layout, tokens = layout_of(2048), 2048
    hidden = torch.randn(1, tokens, 4096, device="cuda").bfloat16()
    for name, (width, ratio) in KINDS.items():
        module = module_of(width, ratio)
        here, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
        ours = module(here, layout, None)
        upstream = torch.randn_like(ours)
        found = torch.autograd.grad(ours, (here, *module.parameters()), upstream)
        double = module.double()
        twin = double(exact, layout, None)
        wanted = torch.autograd.grad(twin, (exact, *double.parameters()), upstream.double())
        labels = ["entries", "d_hidden", *(f"d_{n}" for n, _ in double.named_parameters())]
        for label, a, b in zip(labels, (ours, *found), (twin, *wanted)):
            table.add(name, label, *(f"{e:.1e}" for e in relative_errors(a.detach(), b.detach())))
    x = torch.randn(1, 512, 64, 512, device="cuda").bfloat16()
    turn = layout.compressed_rotation[:, :512, None]
    ours = [x.clone().requires_grad_(), torch.rand(512, device="cuda").bfloat16().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in ours]
    y = gpu_norm.norm_rotate(*ours, turn, 1e-6, 1.0)
    twin = rotate(plain_norm(exact[0], 1e-6) * exact[1], turn)
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, ours, upstream)
    wanted = torch.autograd.grad(twin, exact, upstream.double())
    for label, a, b in zip(["y", "d_x", "d_weight"], (y, *found), (twin, *wanted)):
        table.add("norm, rotation", label, *(f"{e:.1e}" for e in relative_errors(a.detach(), b.detach())))


def show(cases: list[Case], tokens: int, copied: float, table: Table) -> None:
    for case in cases:
        floor = case.num_bytes / copied * 1e3
        arms = {"ours": repeated(case.calls), "ours again (A/A)": repeated(case.calls)}
        if case.twins:
            with torch.no_grad(), without_kernels():
                arms["composed"] = repeated(case.twins)
        for name, ts in time_arms(arms, rounds=5).items():
            times = statistics.median(ts) / CALLS / floor
            table.add(
                tokens, case.name, name, median_text(ts, 1e3 / CALLS, 1), f"{floor * 1e3:.1f}", f"{times:.2f}"
            )


def show_whole(tokens: int, layout: Layout, table: Table) -> None:
    """A CSA layer's two compressors with projections, forward and backward, kernels and composed."""
    hidden = torch.randn(1, tokens, 4096, device="cuda").bfloat16().requires_grad_()
    modules = [module_of(*KINDS["CSA 512"]), module_of(*KINDS["CSA index 128"])]

    def step() -> None:
        entries = modules[0](hidden, layout, None)
        keys = modules[1](hidden.detach(), layout, None)
        torch.autograd.backward((entries, keys), (entries.detach(), keys.detach()))
        hidden.grad = None

    def composed() -> None:
        with without_kernels():
            step()

    arms: dict[str, Callable[[], Any]] = {"ours": step, "composed, fp32 products": composed}
    for name, ts in time_arms(arms, rounds=5).items():
        table.add(tokens, "CSA main + index, with projections", name, median_text(ts, 1e3, 1), "", "")


def sweep(tokens: int) -> None:
    layout = layout_of(tokens)
    copied = copy_rate()
    print(f"copy {copied / 1e12:.2f} TB/s")
    home: Any = triton_compressor
    for name in KINDS:
        for tile, per_thread, programs in itertools.product(
            (2048, 4096, 8192), (16, 32, 64), (132, 264, 528)
        ):
            home.LAUNCH = triton_compressor.Launch(tile, per_thread, programs)
            report(compressor_cases(name, tokens, layout), copied, f"{tile} {per_thread} {programs}")
    norm_home: Any = triton_norm
    for name in NORMS[:2]:
        for tile, per_thread, programs in itertools.product((512, 1024, 2048), (16, 32, 64), (264, 528)):
            norm_home.FORWARD = norm_home.BACKWARD = triton_norm.Launch(tile, per_thread, programs)
            report(norm_cases(name, tokens, layout), copied, f"{tile} {per_thread} {programs}")


def report(cases: list[Case], copied: float, label: str) -> None:
    for case in cases:
        ts = time_arms({"ours": repeated(case.calls)}, rounds=3, warm_up=1)["ours"]
        took = statistics.median(ts) / CALLS
        print(
            f"{case.name}: {label}: {took * 1e3:.1f} us, {took / (case.num_bytes / copied * 1e3):.2f} x floor"
        )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768])
    given = parser.parse_args()
    if given.sweep:
        sweep(given.tokens[0])
        return
    show_errors()
    copied = copy_rate()
    table = Table("tokens", "operation", "arm", "us", "floor, us", "x floor")
    for tokens in given.tokens:
        layout = layout_of(tokens)
        for name in KINDS:
            show(compressor_cases(name, tokens, layout), tokens, copied, table)
        for name in NORMS:
            show(norm_cases(name, tokens, layout), tokens, copied, table)
        show_whole(tokens, layout, table)
        torch.cuda.empty_cache()
    table.note(f"Copy {copied / 1e12:.2f} TB/s.")


if __name__ == "__main__":
    main()
