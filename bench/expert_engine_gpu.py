"""Training with experts divided over the GPUs of one host, against one GPU: gradients, weights, bits, memory.

    PYTHONPATH=. python bench/expert_engine_gpu.py [--preset small] [--ranks 2] [--tokens 16384]
    PYTHONPATH=. python bench/expert_engine_gpu.py --device cpu --preset tiny --tokens 1024    (by gloo)

Supervised steps (balance and indexer losses, Muon and AdamW) from equal weights on the same random tokens, by
`TorchEngine` on one process and by `ExpertEngine` on all ranks, optimiser state whole and divided:

    gradients   of the first step's clipped norm, relative
    weights     after three steps, a tensor's largest difference over its largest value; the largest of all.
                Mixing weights of hyper-connections are left out: Muon raises the rounding in them
    same bits   two runs, and one that goes on from a checkpoint after two steps
    peak        GiB of the fullest rank, from the end of the building on;  step  seconds of the last one

fp32 throughout, where the order of sums is all that differs.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from torch import Tensor

from consilience.grpo.sft import SupervisedSettings, supervised_step
from consilience.model.config import PRESETS
from consilience.model.initialize import initialize
from consilience.model.ranks import ALONE, Ranks, open_ranks
from consilience.model.transformer import Transformer
from consilience.training.checkpoint import CheckpointMeta, load_engine_state, load_weights, save_checkpoint
from consilience.training.engine import TrainEngine, official_weights
from consilience.training.expert_engine import ExpertEngine
from consilience.training.packing import PackedRows, pack
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

LIMIT_S = 240.0
NUM_STEPS = 3
ROW = 512
META = CheckpointMeta(stage="bench", seed=0, step=0)


def rows(step: int, num_tokens: int, vocab_size: int) -> PackedRows:
    rng = np.random.default_rng(step)
    ids = [rng.integers(2, vocab_size, n) for n in rng.integers(ROW // 4, ROW, num_tokens * 8 // (5 * ROW))]
    return pack(ids, max_row_tokens=ROW)


def run(engine: TrainEngine, options: argparse.Namespace, first: int, last: int) -> tuple[list[float], float]:
    """Gradient norms of the steps, and the seconds of the last one."""
    settings = SupervisedSettings(
        NUM_STEPS, options.tokens, ROW, 4 * ROW, warmup=0, balance_weight=0.01, indexer_weight=0.1
    )
    norms, seconds = [], 0.0
    for step in range(first, last):
        packed = rows(step, options.tokens, engine.model.config.vocab_size)  # type: ignore[union-attr]
        began = time.perf_counter()
        norms.append(supervised_step(engine, packed, settings, step)["grad_norm"])
        seconds = time.perf_counter() - began
    return norms, seconds


def build(ranks: Ranks, options: argparse.Namespace, is_sharded: bool) -> TrainEngine:
    config = replace(PRESETS[options.preset], torch_dtype="float32")
    model = initialize(Transformer(config), 0)
    settings = OptimizerSettings(lr=1e-4, eps=1e-6, is_sharded=is_sharded)
    if ranks.size == 1:
        return TorchEngine(model.to(options.device), settings)
    return ExpertEngine(model, settings, ranks=ranks, expert_ranks=ranks.size, timeout_s=LIMIT_S)


def off(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference, and whose it is."""
    names = [name for name in expected if not re.search(r"hc_\w+_fn$", name)]
    compared = [(found[n].double().cpu(), expected[n].double().cpu(), n) for n in names]
    return max((float((a - b).abs().max() / b.abs().max().clamp(min=0.01)), n) for a, b, n in compared)


def divided(ranks: Ranks, options: argparse.Namespace, folder: Path, is_sharded: bool) -> None:
    """One line of the table."""
    is_gpu = options.device == "cuda"
    engine = build(ranks, options, is_sharded)
    if is_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    norms, _ = run(engine, options, 0, 2)
    checkpoint = folder / f"checkpoint-{is_sharded}"
    save_checkpoint(checkpoint, engine.model, None, META, engine)
    more, seconds = run(engine, options, 2, NUM_STEPS)
    peak = max(ranks.gather(torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0))
    weights = official_weights(engine)
    del engine
    again = build(ranks, options, is_sharded)
    load_weights(checkpoint, again)
    load_engine_state(checkpoint, again)
    is_same = run(again, options, 2, NUM_STEPS)[0] == more
    resumed = official_weights(again)
    del again
    twice = build(ranks, options, is_sharded)
    is_same = is_same and run(twice, options, 0, NUM_STEPS)[0] == norms + more
    repeated = official_weights(twice)
    if weights is None or resumed is None or repeated is None:
        return
    for others in (resumed, repeated):
        is_same = is_same and all(torch.equal(others[name], value) for name, value in weights.items())
    alone = torch.load(folder / "alone.pt")
    norm_off = abs(norms[0] - alone["norm"]) / alone["norm"]
    weight_off, name = off(dict(weights), alone["weights"])
    state = "divided" if is_sharded else "whole"
    cells = (state, f"{norm_off:.1e}", f"{weight_off:.1e} ({name})", is_same, f"{peak:.2f}", f"{seconds:.2f}")
    print(f"| {ranks.size} ranks, state {' | '.join(map(str, cells))} |", flush=True)


def work(rank: int, size: int, folder: Path, options: argparse.Namespace) -> None:
    """One rank."""
    is_gpu = options.device == "cuda"
    if is_gpu:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    if size == 1:
        engine = build(ALONE, options, is_sharded=False)
        if is_gpu:
            torch.cuda.reset_peak_memory_stats()
        norms, seconds = run(engine, options, 0, NUM_STEPS)
        weights = {name: value.cpu() for name, value in (official_weights(engine) or {}).items()}
        torch.save({"norm": norms[0], "weights": weights}, folder / "alone.pt")
        peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else 0.0
        print(f"| one process | | | | {peak:.2f} | {seconds:.2f} |", flush=True)
        return
    address = f"file://{folder}/meeting"
    ranks = open_ranks(address, rank, size, backend="nccl" if is_gpu else "gloo", timeout_s=LIMIT_S)
    for is_sharded in (False, True):
        divided(ranks, options, folder, is_sharded)
    ranks.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=("tiny", "mini", "small"), default="small")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384, help="of a step, padding included; about")
    options = parser.parse_args()
    name = "CPU" if options.device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, preset {options.preset}, {options.tokens} tokens a step, fp32")
    print("| | gradient norm | weights | same bits | peak GiB | s a step |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for size in (1, options.ranks):
            given = (size, Path(folder), options)
            torch.multiprocessing.spawn(work, args=given, nprocs=size)  # pyright: ignore[reportPrivateImportUsage]


if __name__ == "__main__":
    main()
