"""mHC on a GPU: the write of one sub-layer with the read of the next, forward and backward.

    python bench/hyper_connections_gpu.py [--sweep [--only KERNEL …]]

N 4, bf16 streams, random data. Each arm is a CUDA graph, so that launches from Python cost nothing; inputs
are larger than L2. The goal of a forward is 112 KB a token at 70 % of the copy rate (D 4096), that of a
backward 120 KB by the same rule; our backward moves 195. Other arms: the same in steps (write, read,
gradients added by autograd), the definition in PyTorch, eager and compiled.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_timing import Arm, Table, arguments, copy_rate, median_text, peak_bytes, relative_errors, time_arms
from torch import Tensor

from consilience.model.config import TINY
from consilience.model.hyper_connections import HyperConnection
from consilience.model.kernels import gpu_hyper_connections as gpu
from consilience.model.kernels import triton_hyper_connections as forward
from consilience.model.kernels import triton_hyper_connections_backward as backward
from consilience.model.kernels import triton_hyper_connections_logits as logits
from consilience.model.kernels import triton_hyper_connections_parameters as parameters

N = 4
HOMES = (forward, logits, parameters, backward)
SHARE = 0.7  # of the copy rate, that the goals ask for
NAMES = (
    *("streams", "layer_input", "post", "comb"),
    *("d_streams", "d_output", "d_post", "d_comb", "d_fn", "d_base", "d_scale"),
)
SWEEP: dict[str, list[dict[str, int]]] = {
    "write_project": [
        {"BLOCK_T": t, "BLOCK_D": d, "num_warps": w, "num_stages": s}
        for t, d, w in ((64, 32, 8), (64, 32, 4), (64, 64, 8), (32, 64, 4), (32, 32, 4), (128, 32, 8))
        for s in (1, 2, 3)
    ],
    "coefficients": [{"BLOCK_T": t, "num_warps": w} for t, w in ((16, 2), (32, 4), (32, 1), (64, 4))],
    "apply": [
        {"BLOCK_T": t, "BLOCK_D": d, "num_warps": w}
        for t, d, w in ((4, 512, 4), (2, 1024, 4), (8, 256, 4), (1, 1024, 4), (4, 1024, 8), (2, 512, 4))
    ],
    "d_logits": [
        {"BLOCK_R": r, "BLOCK_T": t, "BLOCK_D": d, "num_warps": w}
        for r, t, d, w in (
            *((8, 2, 1024, 4), (16, 2, 1024, 4), (32, 2, 1024, 4), (8, 1, 1024, 4), (8, 1, 2048, 4)),
            *((8, 2, 512, 4), (8, 4, 512, 4), (16, 2, 1024, 8), (4, 1, 1024, 2)),
        )
    ],
    "d_parameters": [
        {"BLOCK_T": t, "BLOCK_D": d, "GROUPS": g, "num_warps": w, "num_stages": s}
        for t, d, g, w, s in (
            *((64, 128, 3, 4, 3), (64, 128, 2, 4, 3), (64, 128, 2, 4, 4), (64, 128, 3, 4, 2)),
            *((32, 128, 3, 4, 4), (64, 64, 2, 4, 4), (64, 64, 3, 4, 3), (128, 128, 1, 8, 3)),
        )
    ],
    "d_streams": [
        {"BLOCK_T": t, "BLOCK_D": d, "num_warps": w, "num_stages": s, "maxnreg": m}
        for t, d, w, s, m in (
            *((16, 64, 4, 2, 168), (16, 64, 4, 2, 255), (16, 64, 4, 2, 128), (16, 64, 4, 3, 168)),
            *((16, 64, 4, 1, 168), (16, 32, 2, 2, 168), (16, 32, 2, 3, 168), (32, 64, 8, 2, 255)),
            *((32, 64, 8, 2, 128), (16, 64, 8, 2, 128), (32, 32, 4, 2, 168)),
        )
    ],
    "sum_columns": [{"BLOCK_T": t, "num_warps": w} for t, w in ((16, 4), (8, 4), (32, 4), (4, 1))],
}


def connection(width: int) -> HyperConnection:
    """A connection with coefficients that differ from token to token."""
    torch.manual_seed(width)
    module = HyperConnection(replace(TINY, hc_mult=N, hidden_size=width)).cuda()
    module.fn.data.normal_(std=0.02)
    module.base.data.normal_()
    module.scale.data.fill_(0.3)
    return module


def reader(module: HyperConnection) -> gpu.Reader:
    return gpu.Reader(module.fn, module.base, module.scale, module.rounds, module.eps, module.norm_eps)


def draw(num_tokens: int, width: int) -> gpu.Written:
    normal = lambda *shape: torch.randn(*shape, device="cuda").bfloat16()
    comb = torch.softmax(torch.randn(num_tokens, N, N, device="cuda"), -1)
    leaves = (
        normal(num_tokens, N, width),
        normal(num_tokens, width),
        2 * torch.rand(num_tokens, N).cuda(),
        comb,
    )
    return gpu.Written(*(t.requires_grad_() for t in leaves))


def ours(written: gpu.Written, module: HyperConnection) -> tuple[Tensor, ...]:
    return gpu.write_read(written, reader(module))


def in_steps(written: gpu.Written, module: HyperConnection) -> tuple[Tensor, ...]:
    new = gpu.write(*written)
    return new, *gpu.read(new, reader(module))


def plain(written: gpu.Written, module: HyperConnection) -> tuple[Tensor, ...]:
    """The definition: coefficients and mixing in fp32 (or wider), one rounding of streams and layer input."""
    streams, output, post, comb = written
    kind = module.fn.dtype
    new = torch.einsum("rjk,rjd->rkd", comb, streams.to(kind)) + post[:, :, None] * output.to(kind)[:, None]
    new = new.to(streams.dtype)
    flat = new.flatten(1).to(kind)
    mixes = (flat @ module.fn.t()) * torch.rsqrt(flat.square().mean(1, keepdim=True) + module.norm_eps)
    factor = torch.cat([part.expand(n) for part, n in zip(module.scale.split(1), (N, N, N * N))])
    z = factor * mixes + module.base
    pre, next_post = z[:, :N].sigmoid() + module.eps, 2 * z[:, N : 2 * N].sigmoid()
    x = z[:, 2 * N :].view(-1, N, N).softmax(2) + module.eps
    for step in range(2 * module.rounds - 1):
        x = x / (x.sum(1 + step % 2, keepdim=True) + module.eps)
    return new, (pre[:, :, None] * new.to(kind)).sum(1).to(streams.dtype), next_post, x


compiled = torch.compile(plain, dynamic=False)
FUNCTIONS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "ours, fused": ours,
    "ours again (A/A)": ours,
    "ours in steps: write, read": in_steps,
    "PyTorch, eager": plain,
    "PyTorch, compiled": compiled,
}


def captured(arm: Arm) -> Arm:
    """`arm` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            arm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        arm()
    return partial(_replay, graph, arm)


def _replay(graph: torch.cuda.CUDAGraph, _arm: Arm) -> None:
    """The arm holds what the graph reads: freed memory would be gone."""
    graph.replay()


def forward_pass(
    function: Callable[..., tuple[Tensor, ...]], written: gpu.Written, module: HyperConnection
) -> Arm:
    """Forward without gradients, captured."""

    def run_forward() -> None:
        with torch.no_grad():
            function(written, module)

    return captured(run_forward)


def passes(
    function: Callable[..., tuple[Tensor, ...]], written: gpu.Written, module: HyperConnection
) -> dict[str, Arm]:
    """Forward without gradients; backward alone, of a forward that ran before."""
    leaves = [*written, *module.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values = function(written, module)
        upstream = [torch.randn_like(v) for v in values]
        run_backward = lambda: torch.autograd.grad(values, leaves, upstream, retain_graph=True)
        for _ in range(3):
            run_backward()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run_backward()
    return {
        "forward": forward_pass(function, written, module),
        "backward": partial(_replay, graph, run_backward),
    }


def kilobytes(width: int) -> dict[str, float]:
    """What a token moves by the goals, bf16."""
    row = 2 * width / 1e3
    return {"forward": (3 * N + 2) * row, "backward": (3 * N + 3) * row}


def show_errors(table: Table, num_tokens: int = 256, width: int = 4096) -> None:
    """Every output and gradient against fp64 on the same inputs."""
    module, written = connection(width), draw(num_tokens, width)
    exact_module = connection(width).double()
    for name, function in {
        "ours, fused": ours,
        "PyTorch, eager": plain,
    }.items():
        values = function(written, module)
        upstream = [torch.randn_like(v) for v in values]
        found = [*values, *torch.autograd.grad(values, [*written, *module.parameters()], upstream)]
        leaves = gpu.Written(*(t.detach().double().requires_grad_() for t in written))
        unrounded = exact_module.write(*leaves)
        new = unrounded + (values[0].double() - unrounded).detach()
        wide = new, *exact_module.read_plainly(new)
        exact = torch.autograd.grad(
            wide, [*leaves, *exact_module.parameters()], [u.double() for u in upstream]
        )
        for what, a, b in zip(NAMES, found, [unrounded, *wide[1:], *exact]):
            table.add(name, what, *(f"{e:.1e}" for e in relative_errors(a.detach(), b.detach())))


def show_passes(table: Table, num_tokens: int, width: int, copied: float) -> None:
    module, written = connection(width), draw(num_tokens, width)
    arms: dict[str, dict[str, Arm]] = {"forward": {}, "backward": {}}
    for name, function in FUNCTIONS.items():
        if function in (plain, compiled) and num_tokens * width > 2**25:
            continue  # eager keeps about 1 MB a token
        try:
            for which, arm in passes(function, written, module).items():
                arms[which][name] = arm
        except Exception as fault:  # the table goes on without an arm that PyTorch cannot capture or compile
            print(f"  {name} is left out: {type(fault).__name__}: {str(fault)[:200]}")
    moved = kilobytes(width)
    where = f"{num_tokens} x {width}"
    for which, group in arms.items():
        bound = moved[which] * 1e3 * num_tokens / copied * 1e6
        table.add(where, which, f"{moved[which]:.0f} KB a token at the copy rate", f"{bound:.0f}", "")
        for name, times in time_arms(group, rounds=9).items():
            reached = bound / (statistics.median(times) * 1e3)
            verdict = f"{reached:.0%} of it (goal {SHARE:.0%})"
            table.add(where, which, name, median_text(times, 1e3, 0), verdict)


def kernels(num_tokens: int, width: int) -> dict[str, tuple[Arm, float]]:
    """Each kernel alone, and the kilobytes a token that it must move."""
    module, given = connection(width), draw(num_tokens, width)
    row = 2 * width / 1e3
    with torch.no_grad():
        streams, output, post, comb = (t.detach() for t in given)
        fn, base, scale, rounds, eps, norm_eps = reader(module)
        new, partial, squares = forward.write_project(streams, output, post, comb, fn)
        assert partial is not None and squares is not None
        project = lambda: forward.write_project(streams, output, post, comb, fn)
        coefficients = lambda: forward.coefficients(
            partial, squares, width, base, scale, rounds, eps, norm_eps
        )
        pre, next_post, next_comb, mixes, inverse = coefficients()
        d_input, d_new = torch.randn_like(output), torch.randn_like(new)
        d_post, d_comb = torch.randn_like(next_post), torch.randn_like(next_comb)
        d_logits = lambda: logits.d_logits(new, d_input, mixes, base, scale, d_post, d_comb, rounds, eps)
        read = parameters.Read(d_input, pre, fn, d_logits(), mixes, inverse, scale)
        write = (output, post, comb, d_new)
    num_splits = -(-width // forward.SPLIT)
    columns = (N + N * N) * 4 / 1e3  # of a token's gradients of post and comb, once
    return {
        "write_project": (project, (2 * N + 1) * row),
        "coefficients": (coefficients, 25 * 4 * (num_splits + 2) / 1e3),
        "apply": (lambda: forward.apply(new, pre), (N + 1) * row),
        "d_logits": (d_logits, (N + 1) * row + 90 * 4 / 1e3),
        "d_parameters": (lambda: parameters.d_parameters(new, read), N * row),
        "d_streams": (  # with sum_columns
            lambda: backward.d_streams(streams, write, read),
            (3 * N + 3) * row + (2 * num_splits + 1) * columns,
        ),
    }


def show_kernels(table: Table, num_tokens: int, width: int, copied: float) -> None:
    found = kernels(num_tokens, width)
    for name, times in time_arms({name: captured(arm) for name, (arm, _) in found.items()}, rounds=9).items():
        num_bytes = found[name][1] * 1e3 * num_tokens
        rate = num_bytes / (statistics.median(times) / 1e3)
        floor, size = f"{num_bytes / copied * 1e6:.0f}", f"{found[name][1]:.1f} KB"
        cells = median_text(times, 1e3, 1), size, floor, f"{rate / copied:.0%}"
        table.add(f"{num_tokens} x {width}", name, *cells)


def show_memory(num_tokens: int = 4096, width: int = 4096) -> None:
    """Peak of a forward and backward beyond its inputs and its results' gradients."""
    module, written = connection(width), draw(num_tokens, width)
    with torch.no_grad():
        upstream = [torch.randn_like(v) for v in ours(written, module)]
    leaves = [*written, *module.parameters()]
    for name, function in FUNCTIONS.items():
        if function is not compiled:
            step = lambda f=function: torch.autograd.grad(f(written, module), leaves, upstream)
            print(f"\n{name}: {peak_bytes(step) / 2**20:.0f} MiB at most, {num_tokens} x {width}")


def show_variants(width: int = 4096) -> None:
    """How often the kernels are compiled over several numbers of tokens, and what few tokens cost."""
    module = connection(width)
    lengths = (1, 2, 8, 16, 17, 128, 1000)
    for num_tokens in lengths:
        written = draw(num_tokens, width)
        values = ours(written, module)
        torch.autograd.grad(values, [*written, *module.parameters()], [torch.ones_like(v) for v in values])
    device = torch.cuda.current_device()
    counts = {
        name: len(getattr(home, "_" + name).device_caches[device][0])
        for home in HOMES
        for name in home.CONFIGS
    }
    print(f"\nCompiled variants after {lengths} tokens: {counts}")
    for num_tokens in (1, 8, 64):
        written = draw(num_tokens, width)
        arms = {name: forward_pass(FUNCTIONS[name], written, module) for name in list(FUNCTIONS)[:3]}
        times = time_arms(arms, rounds=15)
        cells = ", ".join(f"{name} {median_text(ts, 1e3, 1)}" for name, ts in times.items())
        print(f"{num_tokens} tokens, forward, us: {cells}", flush=True)


def sweep(only: list[str], num_tokens: int = 4096, width: int = 4096) -> None:
    """Each kernel (of `only`, if it names some) with several launch settings, the fastest last."""
    copied = copy_rate()
    print(f"copy {copied / 1e9:.0f} GB/s")
    found = kernels(num_tokens, width)
    for home in HOMES:
        for name, chosen in list(home.CONFIGS.items()):
            if only and name not in only:
                continue
            arm, size = found["d_streams" if name == "sum_columns" else name]  # which runs both
            ranks: list[tuple[float, str]] = []
            for config in SWEEP.get(name, []):
                home.CONFIGS[name] = config
                try:
                    times = time_arms({name: captured(arm)}, rounds=7)[name]
                except Exception as fault:  # settings that do not fit on this device
                    print(f"{name} {config}: {type(fault).__name__}")
                    continue
                rate = size * 1e3 * num_tokens / (statistics.median(times) / 1e3)
                text = f"{name} {config}: {median_text(times, 1e3, 1)} us, {rate / copied:.0%} of copy"
                ranks.append((-statistics.median(times), text + (" (chosen)" if config == chosen else "")))
            home.CONFIGS[name] = chosen
            print("\n".join(text for _, text in sorted(ranks)), flush=True)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="kernels that --sweep tries")
    asked = parser.parse_args()
    if asked.sweep:
        sweep(asked.only)
        return
    show_errors(Table("arm", "what", "max error", "rms error"))
    copied = copy_rate()
    print(f"\nCopy {copied / 1e12:.2f} TB/s.\n")
    table: Any = Table("tokens x width", "pass", "arm", "us", "")
    for num_tokens, width in ((4096, 4096), (4096, 7168), (16384, 4096)):
        show_passes(table, num_tokens, width, copied)
        torch.cuda.empty_cache()
    print()
    table = Table("tokens x width", "kernel", "us", "a token", "us at the copy rate", "of the copy rate")
    for width in (4096, 7168):
        show_kernels(table, 4096, width, copied)
    show_memory()
    show_variants()


if __name__ == "__main__":
    main()
