"""Decoding on one GPU: our engine's steps, captured and not, and transformers' `generate`, at Flash's widths.

    python bench/decode_gpu.py [--tables speed logprobs] [--batches 1 8 64] [--prompts 128 4096]
                               [--steps 48] [--ours-only] [--no-capture] [--profile] [--sweep]

The model of train_step_gpu.py: 4 layers, 16 experts, bf16, random weights and prompts, temperature 1.

speed     a step of `NativeEngine` from call to call, its host's work and copies included, prompts' forward
          not; `generate` between its tokens, the first two left out. "captured again" is the A/A arm,
          "recorded" hands out every token's experts, "grouped_mm" has torch's products of many rows in place
          of triton_few_experts.py. "of copy": the bytes a step must read (weights but the embedding, experts
          as random routes choose them, and the state's) over the rate of a copy in the same run.
logprobs  d = log-probability by the trainer's forward and `linear_logprob` less the sampled one: largest and
          mean |d|, and mean(e^d - 1 - d), the divergence of the sampler from the trainer. Exact mode: 0.

`--profile` prints where a captured step's time goes, `--sweep` tries the experts' launch settings. Each table
is a process; an arm that fails says why and leaves the others alone. Goal: 12 x transformers at batch 8.
Predicted there: 5.4 GB a step, 1.85 ms at 2.9 TB/s; with experts and head at 85 %, other products at 65 % of
the copy rate and 190 small launches of 2.5 us 2.9 ms, 2,750 tokens/s. If a capture raises, --no-capture shows
whether the step itself is right.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from gpu_timing import Table, arguments, copy_rate, median_text
from torch import Tensor
from train_step_gpu import fill, flash_width, spread_hash

ROOT = Path(__file__).parents[1]
LIMIT_S = 150
WARM_UP = 4  # steps; the first ones capture
EXACT_STEPS = 6


def our_model():
    from consilience.model.transformer import Transformer

    config = flash_width()
    with torch.device("cuda"):
        model = Transformer(config, torch.bfloat16)
    fill(model)
    spread_hash(model, config)
    return model.requires_grad_(False).eval()


def their_model():
    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from transformers import DeepseekV4ForCausalLM
    from transformers_oracle import hf_config

    config = flash_width()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = DeepseekV4ForCausalLM(hf_config(config))
    torch.set_default_dtype(torch.float32)
    fill(model)
    spread_hash(model, config)
    model.generation_config.eos_token_id = None
    return model.requires_grad_(False).eval()


def prompts_of(vocabulary: int, batch: int, length: int) -> Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(length))


def weight_bytes(model, batch: int) -> float:
    """Bytes of weights that a step of `batch` random tokens must read once."""
    experts = model.config.n_routed_experts
    touched = 1 - (1 - model.config.num_experts_per_tok / experts) ** batch
    return sum(
        p.nbytes * (touched if ".experts.w" in name and "shared" not in name else 1.0)
        for name, p in model.named_parameters()
        if not name.startswith("embed")
    )


def state_bytes(config, batch: int, length: int) -> float:
    """Bytes of the decode state that a step of `batch` rows of `length` tokens must read."""
    width, total = 2 * config.head_dim, 0.0
    for ratio in config.compress_ratios:
        total += min(length, config.sliding_window) * width
        if ratio:
            entries = length // ratio
            has_choice = ratio == 4
            total += (min(entries, config.index_topk) if has_choice else entries) * width
            total += entries * 2 * config.index_head_dim if has_choice else 0
    return batch * total


# ---- our engine -----------------------------------------------------------------------------------


def started(model, prompts: Tensor, tokens: int, **options):
    """An engine whose streams have been prefilled and have taken a step."""
    from consilience.rollout.engine import Request, SamplingParams
    from consilience.rollout.native_engine import NativeEngine

    batch, length = prompts.shape
    engine = NativeEngine(
        model, max_rows=batch, max_length=length + tokens, prefill_tokens=max(8192, length), **options
    )
    engine.submit(
        [
            Request(f"{i}", tuple(row), SamplingParams(1.0, tokens, (), i))
            for i, row in enumerate(prompts.tolist())
        ]
    )
    engine.step()
    return engine


def steps_of(engine, count: int) -> list[float]:
    """Milliseconds of each of `count` steps; none of them is a stream's last."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        engine.step()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def finish(engine) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens and log-probabilities of every stream."""
    done = {}
    while engine.state().num_running:
        done |= {c.uid: (c.token_ids, c.logprobs) for c in engine.step()}
    return done


def our_arms(given: argparse.Namespace) -> dict[str, dict]:
    arms = {
        "eager": {"captures": False},
        "captured": {},
        "captured again": {},
        "captured, recorded": {"records_routing": True},
        "captured, grouped_mm": {},
        "exact": {"exact": True},
    }
    return {n: a for n, a in arms.items() if n == "eager" or not (given.no_capture and "captured" in n)}


def time_ours(given: argparse.Namespace) -> Iterator[dict]:
    from consilience.model.kernels import gpu_moe

    model, rate, few = our_model(), copy_rate(), gpu_moe.FEW_TOKENS
    for length in given.prompts:
        for batch in given.batches:
            prompts, drawn = prompts_of(model.config.vocab_size, batch, length), {}
            must = weight_bytes(model, batch) + state_bytes(model.config, batch, length)
            for name, options in our_arms(given).items():
                if name == "exact" and (length > 1024 or batch > 8):
                    continue
                count = EXACT_STEPS if name == "exact" else given.steps
                gc.collect()
                torch.cuda.empty_cache()
                row = {"batch": batch, "prompt": length, "arm": name, "copy": rate, "bytes": must}
                gpu_moe.FEW_TOKENS = 0 if "grouped_mm" in name else few
                try:
                    torch.cuda.reset_peak_memory_stats()
                    engine = started(model, prompts, WARM_UP + count + 2, **options)
                    prefill_peak = torch.cuda.max_memory_allocated()
                    steps_of(engine, WARM_UP - 1)
                    torch.cuda.reset_peak_memory_stats()
                    row["ms"] = steps_of(engine, count)
                    row |= {"peak": torch.cuda.max_memory_allocated(), "prefill_peak": prefill_peak}
                    drawn[name] = finish(engine)
                    del engine
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                if name in ("captured", "captured, recorded") and "eager" in drawn and name in drawn:
                    row["equal"] = drawn[name] == drawn["eager"]
                yield row


def time_theirs(given: argparse.Namespace) -> Iterator[dict]:
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids, scores, **kwargs):
            torch.cuda.synchronize()
            self.times.append(1e3 * time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    model = their_model()
    for length in given.prompts:
        for batch in given.batches:
            if batch * length > 8 * 4096:
                continue
            row = {"batch": batch, "prompt": length, "arm": "transformers"}
            ids = prompts_of(model.config.vocab_size, batch, length).cuda()
            sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 18}
            try:
                gc.collect()
                torch.cuda.empty_cache()
                for _ in range(2):  # the first makes what is made once
                    watch = Clock()
                    torch.cuda.reset_peak_memory_stats()
                    model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        pad_token_id=0,
                        stopping_criteria=[watch],
                        **sampling,
                    )
                row["ms"] = [b - a for a, b in zip(watch.times[1:], watch.times[2:])]
                row["peak"] = torch.cuda.max_memory_allocated()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            yield row


# ---- log-probabilities ----------------------------------------------------------------------------


@torch.no_grad()
def trained_logprobs(model, prompt: list[int], tokens: tuple[int, ...]) -> Tensor:
    """What a trainer computes for `tokens` behind `prompt`, from one packed row."""
    from consilience.model.kernels.linear_logprob import linear_logprob

    ids = torch.tensor([[*prompt, *tokens]], device="cuda")
    hidden = model.hidden(ids)[0, len(prompt) - 1 : -1]
    found = linear_logprob(hidden, model.head.weight, ids[0, len(prompt) :])
    return found.logprob.double().cpu()


def compare_logprobs(given: argparse.Namespace) -> Iterator[dict]:
    from consilience.model.exact import exact_mode

    model = our_model()
    for length in given.prompts:
        for batch in (1, 8):
            prompts = prompts_of(model.config.vocab_size, batch, length)
            for name, options in our_arms(given).items():
                is_exact = name == "exact"
                if name in ("captured again", "captured, grouped_mm") or (is_exact and length > 1024):
                    continue
                row = {"batch": batch, "prompt": length, "arm": name}
                try:
                    engine = started(model, prompts, 8 if is_exact else 32, **options)
                    done = finish(engine)
                    del engine
                    with exact_mode(is_exact):
                        parts = [
                            trained_logprobs(model, ids.tolist(), done[f"{i}"][0])
                            - torch.tensor(done[f"{i}"][1], dtype=torch.float64)
                            for i, ids in enumerate(prompts)
                        ]
                    d = torch.cat(parts)
                    row |= {
                        "tokens": len(d),
                        "max": d.abs().max().item(),
                        "mean": d.abs().mean().item(),
                        "kl": (d.expm1() - d).mean().item(),
                        "equal": bool((d == 0).all()),
                    }
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
                yield row


def show_profile(given: argparse.Namespace) -> None:
    from torch.profiler import ProfilerActivity, profile

    model, batch = our_model(), given.batches[-1] if len(given.batches) == 1 else 8
    prompts = prompts_of(model.config.vocab_size, batch, given.prompts[0])
    engine = started(model, prompts, 40, captures=not given.no_capture)
    steps_of(engine, WARM_UP)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
        steps_of(engine, 4)
    key = "self_cuda_time_total"
    print(recorded.key_averages().table(sort_by=key, row_limit=50, max_name_column_width=80))


def sweep(given: argparse.Namespace) -> None:
    """Captured steps at batch 8 and 64 with other settings of the experts' kernels."""
    from consilience.model.kernels import triton_few_experts as kernels

    model, length = our_model(), given.prompts[0]
    table = Table("batch", "w1, w3: outputs x inputs, warps, stages", "w2", "ms a step")
    first = (dict(kernels.INNER), dict(kernels.DOWN))
    names = tuple(first[0])
    inner = [(32, 128, 4, 4), (64, 128, 4, 4), (32, 256, 4, 3), (16, 256, 4, 4), (32, 128, 4, 6)]
    down = [(64, 128, 4, 4), (128, 128, 4, 4), (32, 256, 4, 4), (32, 128, 4, 6), (64, 256, 8, 3)]
    tried = [(inner[0], down[0]), *((i, down[0]) for i in inner[1:]), *((inner[0], d) for d in down[1:])]
    for batch in (8, 64):
        prompts = prompts_of(model.config.vocab_size, batch, length)
        for settings in (*tried, tried[0]):
            for target, values in zip((kernels.INNER, kernels.DOWN), settings):
                target.update(zip(names, values))
            engine = started(model, prompts, WARM_UP + given.steps + 2)
            steps_of(engine, WARM_UP)
            table.add(batch, *settings, median_text(steps_of(engine, given.steps - 2)))


# ---- tables ---------------------------------------------------------------------------------------

ARMS: dict[str, Callable[[argparse.Namespace], Iterator[dict]]] = {
    "speed": time_ours,
    "transformers": time_theirs,
    "logprobs": compare_logprobs,
}


def rows_of(arm: str, given: argparse.Namespace) -> list[dict]:
    """Figures of one arm in a process of its own; what it had when it ran out of time too."""
    command = [sys.executable, __file__, "--arm", arm, "--steps", str(given.steps)]
    command += ["--batches", *map(str, given.batches), "--prompts", *map(str, given.prompts)]
    command += ["--no-capture"] if given.no_capture else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
        out, problem = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as late:
        out, problem = late.stdout or b"", [f"{arm}: over {LIMIT_S} s"]
        out = out.decode() if isinstance(out, bytes) else out
    if problem:
        print(f"{arm}: {problem[0][:300]}", flush=True)
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def speed_table(given: argparse.Namespace) -> None:
    rows = rows_of("speed", given) + ([] if given.ours_only else rows_of("transformers", given))
    theirs = {(r["batch"], r["prompt"]): r for r in rows if r["arm"] == "transformers" and "ms" in r}
    table = Table(
        "batch", "prompt", "arm", "ms a step", "tokens/s", "x transformers", "of copy", "GiB", "= eager"
    )
    for r in sorted(rows, key=lambda r: (r["prompt"], r["batch"])):
        head = (r["batch"], r["prompt"], r["arm"])
        if "error" in r:
            table.add(*head, r["error"], *[""] * 5)
            continue
        median, other = statistics.median(r["ms"]), theirs.get(head[:2])
        times = f"{statistics.median(other['ms']) / median:.1f}" if other else ""
        share = f"{r['bytes'] / r['copy'] / median * 1e3:.0%}" if "bytes" in r else ""
        memory = f"{r['peak'] / 2**30:.1f}"
        shown = (median_text(r["ms"]), f"{head[0] / median * 1e3:,.0f}", times, share, memory)
        table.add(*head, *shown, r.get("equal", ""))
    copies = [r["copy"] for r in rows if "copy" in r]
    if copies:
        table.note(
            f"copy {copies[0] / 1e12:.2f} TB/s; a step reads {rows[0]['bytes'] / 1e9:.2f} GB at batch "
            f"{rows[0]['batch']}."
        )


def logprob_table(given: argparse.Namespace) -> None:
    table = Table("batch", "prompt", "arm", "tokens", "largest", "mean", "KL", "equal bits")
    for r in rows_of("logprobs", given):
        numbers = [r["error"]] if "error" in r else [f"{r[k]:.3g}" for k in ("max", "mean", "kl")]
        table.add(r["batch"], r["prompt"], r["arm"], r.get("tokens", ""), *numbers, r.get("equal", ""))


def main() -> None:
    parser = arguments(__doc__)
    tables = {"speed": speed_table, "logprobs": logprob_table}
    parser.add_argument("--tables", nargs="+", choices=list(tables), default=list(tables))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 4096])
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--no-capture", action="store_true", help="no CUDA graphs: is it they that fail?")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arm", choices=list(ARMS))
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if given.profile or given.sweep:
        (show_profile if given.profile else sweep)(given)
    elif given.arm:
        for row in ARMS[given.arm](given):
            print(json.dumps(row), flush=True)
    else:
        for name in given.tables:
            tables[name](given)


if __name__ == "__main__":
    main()
