"""How many of the exact top-k entries the indexer still picks with FP4 queries and keys and bf16 scores.

    python bench/indexer_recall.py [--steps 200] [--lengths 1024 2048 4096] [--json FILE]

A small model with the released index width (128, FP4 blocks of 32) and random weights, its entries scaled so
that attention has favourites. The indexer learns them by the warm-up of specification 5.3: the index loss
over all visible entries, everything else frozen; measured before and after. Exact picks have fp32 scores.
Recall is the share of them that is picked again, over queries that see more than k entries:

    bf16 cut             scores cut to bf16 before top-k (the report: 99.7 %)
    bf16 q, k, w         queries, keys and head weights rounded to bf16, scores in fp32
    FP4                  queries and keys in FP4 as they are
    Hadamard + FP4       as the released model computes them
    Hadamard + FP4, cut  and scores cut to bf16: what `Transformer.quantize(FP4)` does

The last lines have four channels of the keys 16 times larger and of the queries 16 times smaller: the same
exact scores, but channels that FP4 alone cannot hold beside their neighbours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from consilience.model.config import TINY, ModelConfig
from consilience.model.forward_trace import Trace
from consilience.model.indexer import Indexer, IndexQueries
from consilience.model.initialize import initialize
from consilience.model.layout import Layout
from consilience.model.quantization import fake_bf16, fake_fp4, index_values
from consilience.model.transformer import Transformer

CONFIG = replace(
    TINY, vocab_size=256, hidden_size=96, num_hidden_layers=3, compress_ratios=(0, 4, 4), q_lora_rank=64,
    index_n_heads=16, index_head_dim=128, index_topk=64, sliding_window=32, max_position_embeddings=16384,
)  # fmt: skip
LEARN_TOKENS, SHARPNESS = 512, 4.0
OUTLIERS, OUTLIER_SIZE = [3, 40, 77, 120], 16.0


def with_both(index: IndexQueries, change: Callable[[Tensor], Tensor], is_cut: bool = False) -> IndexQueries:
    return replace(index, query=change(index.query), keys=change(index.keys), is_cut=is_cut)


VARIANTS: dict[str, Callable[[IndexQueries], IndexQueries]] = {
    "bf16 cut": lambda index: replace(index, is_cut=True),
    "bf16 q, k, w": lambda index: replace(with_both(index, fake_bf16), weight=fake_bf16(index.weight)),
    "FP4": lambda index: with_both(index, fake_fp4),
    "Hadamard + FP4": lambda index: with_both(index, index_values),
    "Hadamard + FP4, cut": lambda index: with_both(index, index_values, is_cut=True),
}


def with_outliers(index: IndexQueries) -> IndexQueries:
    """The same exact scores from keys with large channels and queries with small ones."""
    factor = torch.ones(index.keys.shape[-1])
    factor[OUTLIERS] = OUTLIER_SIZE
    return replace(index, query=index.query / factor, keys=index.keys * factor)


def recall(indexer: Indexer, exact: IndexQueries, found: IndexQueries, layout: Layout) -> float:
    """Share of the exact picks that are found, over valid queries that see more than k entries."""
    picks, again = indexer.pick(exact, layout), indexer.pick(found, layout)
    assert picks is not None and again is not None
    windows = layout.windows[4]
    has_choice = layout.is_valid & (windows.stop - windows.first > indexer.topk)
    same = [torch.isin(a, b).sum() for a, b in zip(picks[has_choice], again[has_choice])]
    return float(torch.stack(same).sum()) / (len(same) * indexer.topk)


def text(config: ModelConfig, length: int, generator: torch.Generator) -> Tensor:
    """Tokens [length] by Zipf's law, half of them in spans of 24 copied from anywhere before."""
    odds = 1 / torch.arange(1.0, config.vocab_size + 1)
    ids = torch.multinomial(odds, length, replacement=True, generator=generator)
    for start in range(48, length - 24, 48):
        source = int(torch.randint(0, start - 24, (1,), generator=generator))
        ids[start : start + 24] = ids[source : source + 24].clone()
    return ids


def sharp_model() -> Transformer:
    """Entries of CSA layers are SHARPNESS times larger than a norm leaves them, and logits with them."""
    model = initialize(Transformer(CONFIG), 0)
    with torch.no_grad():
        for block in model.layers:
            if block.attn.compressor is not None:
                block.attn.compressor.norm.weight.fill_(SHARPNESS)
    return model


def warm_up(model: Transformer, steps: int) -> tuple[float, float]:
    """Train the indexers alone: the mean index loss of the first and of the last step."""
    generator = torch.Generator().manual_seed(1)
    model.requires_grad_(False)
    indexers = [block.attn.indexer for block in model.layers if block.attn.indexer is not None]
    optimizer = torch.optim.AdamW([p for x in indexers for p in x.requires_grad_().parameters()], lr=3e-3)
    losses = []
    for indexer in indexers:
        indexer.sees_all = True
    for _ in range(steps):
        trace = Trace(wants_losses=True)
        model.hidden(text(model.config, LEARN_TOKENS, generator)[None], trace=trace)
        loss = torch.stack(trace.indexer_loss).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for indexer in indexers:
        indexer.sees_all = False
    return losses[0], losses[-1]


@torch.no_grad()
def scored(model: Transformer, length: int) -> list[tuple[Indexer, IndexQueries, Layout]]:
    """What the indexer of every CSA layer scored in one forward over fresh text."""
    kept = []
    indexers = [block.attn.indexer for block in model.layers if block.attn.indexer is not None]
    for indexer in indexers:

        def pick(index: IndexQueries, layout: Layout, indexer: Indexer = indexer) -> Tensor | None:
            kept.append((indexer, index, layout))
            return Indexer.pick(indexer, index, layout)

        indexer.pick = pick
    model.hidden(text(model.config, length, torch.Generator().manual_seed(2))[None])
    for indexer in indexers:
        del indexer.pick
    return kept


def measure(model: Transformer, length: int) -> dict[str, float]:
    """Recall of each variant, averaged over layers."""
    recalls: dict[str, list[float]] = {}
    for indexer, index, layout in scored(model, length):
        for name, change in VARIANTS.items():
            recalls.setdefault(name, []).append(recall(indexer, index, change(index), layout))
        spread = with_outliers(index)
        for name in ("FP4", "Hadamard + FP4"):
            found = recall(indexer, index, VARIANTS[name](spread), layout)
            recalls.setdefault(f"{name}, outliers", []).append(found)
    return {name: sum(values) / len(values) for name, values in recalls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = sharp_model()
    results = {"as initialised": {n: measure(model, n) for n in options.lengths}}
    first, last = warm_up(model, options.steps)
    trained = f"after {options.steps} steps (index loss {first:.2f} to {last:.2f})"
    results[trained] = {n: measure(model, n) for n in options.lengths}
    for title, by_length in results.items():
        print(f"\nrecall of the exact top {CONFIG.index_topk}, {title}")
        print(f"{'tokens (entries)':26s}" + "".join(f"{f'{n} ({n // 4})':>14s}" for n in by_length))
        for name in next(iter(by_length.values())):
            print(f"{name:26s}" + "".join(f"{100 * found[name]:13.2f}%" for found in by_length.values()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
