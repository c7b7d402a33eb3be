"""Full-vocabulary reverse KL and log-probabilities from hidden states on a GPU: time, memory, error.

    python bench/reverse_kl_gpu.py [--tokens 8192] [--sweep] [--only kl|logprob]

V 129,280, bf16 hidden states and heads, forward and both gradients, milliseconds per 1,000 tokens. The goal
of each is 1.05 x (its matrix products at their real shapes + the row pass's bytes at the copy rate), both
measured in the same run. Other arms: plain PyTorch with fp32 logits in chunks; Liger's losses and
cut-cross-entropy where they are installed (they compute from bf16 logits or average over the vocabulary).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import (
    Arm,
    Table,
    arguments,
    copy_rate,
    matrix_rate,
    median_text,
    peak_bytes,
    relative_errors,
    time_arms,
)

from consilience.model.kernels import reverse_kl as reverse_kl_module
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.kernels.reverse_kl import reverse_kl, reverse_kl_dense

V = 129_280
ROW_BYTES = {"kl": 4 + 4 + 8 + 2, "logprob": 4 + 4 + 2}
"""Per logit: read twice (student and teacher for the KL), the gradient written once."""


def draw(n: int, d_s: int, d_t: int, apart: float = 0.1, seed: int = 0) -> list[torch.Tensor]:
    """Hidden states and heads whose logits have a spread of about 2; equal widths give a close teacher."""
    g = torch.Generator("cuda").manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, device="cuda")
    h, w = normal(n, d_s), normal(V, d_s) * (2 / d_s**0.5)
    if d_s == d_t:
        h_t, w_t = h + apart * normal(n, d_t), w + apart * normal(V, d_t) * (2 / d_t**0.5)
    else:
        h_t, w_t = normal(n, d_t), normal(V, d_t) * (2 / d_t**0.5)
    bf16 = [x.bfloat16() for x in (h, w, h_t, w_t)]
    return [bf16[0].requires_grad_(), bf16[1].requires_grad_(), bf16[2], bf16[3]]


def products(kind: str, given: list[torch.Tensor], chunk: int) -> dict[str, Arm]:
    """The matrix products of one chunk at their real shapes, alone."""
    h, w, h_t, w_t = (x.detach() for x in given)
    h, h_t = h[:chunk], h_t[:chunk]
    logits = torch.empty(chunk, V, device="cuda")
    g = torch.randn(chunk, V, device="cuda").mul_(1e-3).bfloat16()
    total = torch.zeros(V, h.shape[1], device="cuda")
    arms: dict[str, Arm] = {
        "student logits": lambda: torch.mm(h, w.t(), out_dtype=torch.float32, out=logits),
        "dH": lambda: torch.mm(g, w),
        "dW": lambda: torch.addmm(total, g.t(), h, out_dtype=torch.float32, out=total),
    }
    if kind == "kl":
        arms["teacher logits"] = lambda: torch.mm(h_t, w_t.t(), out_dtype=torch.float32, out=logits)
    return arms


def floor(kind: str, given: list[torch.Tensor], chunk: int, copied: float) -> tuple[float, dict[str, float]]:
    """(ms per 1,000 tokens, its parts) of products plus row bytes at the copy rate."""
    times = time_arms(products(kind, given, chunk), rounds=9)
    parts = {name: statistics.median(ts) / chunk * 1e3 for name, ts in times.items()}
    parts["rows"] = ROW_BYTES[kind] * V * 1e3 / copied * 1e3
    return sum(parts.values()), parts


def kl_arms(given: list[torch.Tensor]) -> dict[str, Arm]:
    n = given[0].shape[0]
    weight = torch.full((n,), 1 / n, device="cuda")
    total = torch.zeros(V, given[0].shape[1], device="cuda")

    def ours(chunk: int, in_place: bool = True) -> Arm:
        def run() -> None:
            grad = total if in_place else None
            reverse_kl(*given, weight, chunk, head_grad=grad).loss.backward()
            given[0].grad = given[1].grad = None

        return run

    arms = {f"ours, chunks of {c}": ours(c) for c in (1024, 2048, 4096)}
    arms |= {
        "ours again (A/A), 2048": ours(2048),
        "ours, 2048, head gradient through autograd": ours(2048, False),
    }
    arms["plain PyTorch, fp32 logits, chunks of 2048"] = lambda: plain_kl(given, weight, total)
    return arms | liger_kl(given)


def plain_kl(given: list[torch.Tensor], weight: torch.Tensor, total: torch.Tensor) -> None:
    """Eager PyTorch over chunks: fp32 logits by cuBLAS, softmaxes, gradient in bf16, products."""
    h, w, h_t, w_t = (x.detach() for x in given)
    for start in range(0, h.shape[0], 2048):
        rows = slice(start, start + 2048)
        logp = torch.mm(h[rows], w.t(), out_dtype=torch.float32).log_softmax(-1)
        delta = torch.mm(h_t[rows], w_t.t(), out_dtype=torch.float32).log_softmax(-1).neg_().add_(logp)
        p = logp.exp_()
        kl = torch.linalg.vecdot(p, delta)
        g = delta.sub_(kl[:, None]).mul_(p).mul_(weight[rows, None]).bfloat16()
        torch.mm(g, w)
        torch.addmm(total, g.t(), h[rows], out_dtype=torch.float32, out=total)


def liger_kl(given: list[torch.Tensor]) -> dict[str, Arm]:
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except ImportError as fault:
        print(f"  Liger's arms are left out: {fault}")
        return {}
    labels = torch.zeros(given[0].shape[0], dtype=torch.long, device="cuda")

    def step(loss: Callable[..., Any]) -> Arm:
        def run() -> None:
            loss(*given, labels).backward()
            given[0].grad = given[1].grad = None

        return run

    chunked = lambda c: LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, chunk_size=c
    )
    return {
        "Liger FusedLinearJSD": step(LigerFusedLinearJSD(jsd_beta=1.0)),
        "Liger FusedLinearJSD, fp32 sums": step(LigerFusedLinearJSD(jsd_beta=1.0, accum_dtype=torch.float32)),
        "Liger chunked JSD, 1024 (bf16 logits)": step(chunked(1024)),
        "Liger chunked JSD, 2048 (bf16 logits)": step(chunked(2048)),
    }


def logprob_arms(given: list[torch.Tensor]) -> dict[str, Arm]:
    h, w = given[:2]
    n = h.shape[0]
    g = torch.Generator("cuda").manual_seed(1)
    target = torch.randint(V, (n,), device="cuda", generator=g)
    total = torch.zeros(V, h.shape[1], device="cuda")
    up = torch.randn(n, device="cuda", generator=g) / n

    def ours(chunk: int, keep: int, entropy: bool = False) -> Arm:
        def run() -> None:
            out = linear_logprob(h, w, target, chunk, keep_bytes=keep, head_grad=total)
            loss = (out.logprob * up).sum()
            (loss + 1e-3 * (out.entropy * up).sum() if entropy else loss).backward()
            h.grad = w.grad = None

        return run

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(h, w, target, 2048)

    keep = 8 * 2**30
    arms = {f"ours, chunks of {c}": ours(c, keep) for c in (1024, 2048, 4096)}
    arms |= {
        "ours again (A/A), 2048": ours(2048, keep),
        "ours, 2048, with entropy's gradient": ours(2048, keep, True),
        "ours, 2048, nothing kept (recomputed)": ours(2048, 0),
        "ours, forward alone": forward,
    }
    return arms | library_logprob(h, w, target)


def library_logprob(h: torch.Tensor, w: torch.Tensor, target: torch.Tensor) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}

    def step(loss: Callable[[], torch.Tensor]) -> Arm:
        def run() -> None:
            loss().backward()
            h.grad = w.grad = None

        return run

    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        for name, kind in {"": None, ", fp32 sums": torch.float32}.items():
            liger = LigerFusedLinearCrossEntropyLoss(accum_dtype=kind)
            arms["Liger FusedLinearCrossEntropy" + name] = step(lambda f=liger: f(w, h, target))
    except ImportError as fault:
        print(f"  Liger's arm is left out: {fault}")
    try:
        from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_sm90  # noqa: F401
        from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
            LigerFusedLinearScaledCrossEntropyFunction,
        )

        def scaled(has_entropy: bool) -> torch.Tensor:
            found = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, target, 1.0, -100, 1, has_entropy)
            return (found[0] - 1e-3 * found[1]).mean() if has_entropy else found.mean()

        arms["Liger scaled cross-entropy (CuTe)"] = step(lambda: scaled(False))
        arms["Liger scaled cross-entropy (CuTe), with entropy's gradient"] = step(lambda: scaled(True))
    except Exception as fault:  # its stack is optional, and heavy
        print(f"  Liger's CuTe arm is left out: {type(fault).__name__}: {str(fault)[:200]}")
    try:
        from cut_cross_entropy import linear_cross_entropy

        arms["cut-cross-entropy (filtered)"] = step(lambda: linear_cross_entropy(h, w, target))
        arms["cut-cross-entropy, exact"] = step(lambda: linear_cross_entropy(h, w, target, filter_eps=None))
    except ImportError as fault:
        print(f"  cut-cross-entropy is left out: {fault}")
    return arms


def show_errors() -> None:
    """Gradient error against fp64 where the student is close to its teacher."""
    table = Table("KL", "arm", "KL max error", "dH max", "dH rms", "dW max", "dW rms")
    n, d = 128, 4096
    for apart in (0.4, 0.05, 0.005):
        given = draw(n, d, d, apart)
        weight = torch.rand(n, device="cuda")
        exact = [x.detach().double().requires_grad_() for x in given[:2]]
        twin = reverse_kl_dense(*exact, given[2].double(), given[3].double(), weight.double())
        expected = torch.autograd.grad(twin.loss, exact)
        ours = reverse_kl(*given, weight)
        cases = {"ours": (ours.kl, torch.autograd.grad(ours.loss, given[:2]))}
        halves = [x.detach().requires_grad_() for x in given[:2]]
        logp, logq = ((h @ w.t()).float().log_softmax(-1) for h, w in (halves, given[2:]))
        kl = (logp.exp() * (logp - logq)).sum(-1)
        cases["PyTorch, bf16 logits"] = (kl, torch.autograd.grad((kl * weight).sum(), halves))
        for name, (value, grads) in cases.items():
            worst = (value.detach().double() - twin.kl).abs().max().item()
            errors = [f"{e:.1e}" for x, y in zip(grads, expected) for e in relative_errors(x, y)]
            table.add(f"{twin.kl.mean().item():.1e}", name, f"{worst:.1e}", *errors)
        del twin, expected, exact, cases, logp, logq, kl, ours
        torch.cuda.empty_cache()
    table.note("Errors against fp64, relative to the largest value and to the root mean square.")


def show(kind: str, tokens: int, d_s: int, d_t: int, copied: float, table: Table) -> None:
    given = draw(tokens, d_s, d_t)
    arms = kl_arms(given) if kind == "kl" else logprob_arms(given)
    where = f"{tokens} x {d_s}" + (f" ← {d_t}" if kind == "kl" else "")
    bound, parts = floor(kind, given, 2048, copied)
    text = ", ".join(f"{name} {value:.2f}" for name, value in parts.items())
    table.add(where, "products + rows at copy rate", f"{bound:.2f}", "", text)
    times = time_arms(arms)
    for name, ts in times.items():
        per_1k = statistics.median(ts) / tokens * 1e3
        memory = f"{peak_bytes(arms[name]) / 2**30:.2f}"
        table.add(where, name, median_text(ts, 1e3 / tokens), memory, f"{per_1k / bound:.3f} of the bound")


def sweep(tokens: int) -> None:
    """Row kernels alone at several blocks and warps, GB/s of their own bytes."""
    from consilience.model.kernels import triton_kl_rows, triton_logprob_rows

    rows = min(tokens, 2048)
    z_s, z_t = (torch.randn(rows, V, device="cuda") for _ in "ab")
    g = torch.empty(rows, V, dtype=torch.bfloat16, device="cuda")
    weight, target = torch.rand(rows, device="cuda"), torch.randint(V, (rows,), device="cuda")
    print(f"copy {copy_rate() / 1e9:.0f} GB/s")
    modules: list[Any] = [triton_kl_rows, triton_logprob_rows]
    launches = [module.LAUNCH for module in modules]
    for block, warps in [(b, w) for b in (1024, 2048, 4096, 8192, 16384) for w in (4, 8, 16, 32)]:
        if not 4 <= block // (32 * warps) <= 32:
            continue
        for module in modules:
            module.LAUNCH = {"BLOCK": block, "num_warps": warps}
        arms: dict[str, Arm] = {
            "kl": lambda: triton_kl_rows.row_pass(z_s, z_t, target, weight, g, True, None),
            "logprob": lambda: triton_logprob_rows.row_pass(z_s, target, 1.0, g),
        }
        times = time_arms(arms, rounds=5)
        rates = {k: ROW_BYTES[k] * rows * V / (statistics.median(ts) / 1e3) / 1e9 for k, ts in times.items()}
        cells = ", ".join(f"{k} {statistics.median(times[k]):.3f} ms {r:.0f} GB/s" for k, r in rates.items())
        print(f"block {block:6d} warps {warps:2d}: {cells}", flush=True)
    for module, launch in zip(modules, launches):
        module.LAUNCH = launch


def sweep_chunks(tokens: int) -> None:
    """The whole operations with several chunks, and tokens that wait for dW."""
    from consilience.model.kernels import gpu_linear_logprob

    given = draw(tokens, 4096, 4096)
    homes: list[Any] = [reverse_kl_module, gpu_linear_logprob]
    for waiting in (2048, 4096, 8192):
        for home in homes:
            home.GRADIENT_TOKENS = waiting
        for kind, arms in (("kl", kl_arms(given)), ("logprob", logprob_arms(given))):
            ours = {name: arm for name, arm in arms.items() if name.startswith("ours, chunks")}
            for name, ts in time_arms(ours, rounds=5).items():
                memory = peak_bytes(ours[name]) / 2**30
                print(
                    f"{kind}, {waiting} waiting, {name}: {median_text(ts, 1e3 / tokens)}, {memory:.2f} GiB",
                    flush=True,
                )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", choices=["kl", "logprob"])
    given = parser.parse_args()
    if given.sweep:
        sweep(given.tokens)
        sweep_chunks(given.tokens)
        return
    show_errors()
    copied, rate = copy_rate(), matrix_rate()
    table = Table("tokens x width", "arm", "ms per 1,000 tokens", "GiB beyond inputs", "")
    for kind in ("kl", "logprob"):
        if given.only in (None, kind):
            for d_s, d_t in ((4096, 4096), (7168, 7168)):
                show(kind, given.tokens, d_s, d_t, copied, table)
                torch.cuda.empty_cache()
    table.note(f"8192³ bf16 product {rate / 1e12:.0f} TFLOP/s, copy {copied / 1e12:.2f} TB/s.")


if __name__ == "__main__":
    main()
