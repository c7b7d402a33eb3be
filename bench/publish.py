"""Seconds from a trainer's weights to workers that have verified and loaded them, by each transport.

    python bench/publish.py [millions of parameters] [workers] [rounds]       # 30, 2, 7

Real Ray actors with real engines on this machine; the model is the tiny one with wider layers. A round
publishes once through every transport, in an order that turns about; shown are medians and extremes in
milliseconds of wall time, the trainer's part (announce: two digests; ship: copy into the transport) apart,
and beside them what one pass of sha256 and one copy of as many bytes cost in this process.
"""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from consilience.model.checkpoint import to_official
from consilience.model.config import TINY, ModelConfig
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.native_engine import NativeEngine
from consilience.rollout.publishing import announce
from consilience.rollout.ray_workers import RolloutPool, ray_cluster
from consilience.rollout.worker import RolloutWorker

TRANSPORTS = ("shared_memory", "object_store", "broadcast")


def config(millions: float) -> ModelConfig:
    """The tiny model with its experts widened until it has about so many parameters."""
    few = sum(t.numel() for t in to_official(Transformer(TINY)).values())
    width = TINY.moe_intermediate_size
    one_more = replace(TINY, moe_intermediate_size=width + 8)
    slope = (sum(t.numel() for t in to_official(Transformer(one_more)).values()) - few) / 8
    return replace(TINY, moe_intermediate_size=width + 8 * max(0, round((millions * 1e6 - few) / slope / 8)))


def build(millions: float) -> RolloutWorker:
    """A worker with an engine of this size; named as the pool's factory."""
    torch.set_num_threads(1)
    model = initialize(Transformer(config(millions)), seed=1)
    return RolloutWorker(NativeEngine(model, max_rows=2, max_length=64), byte_tokenizer())


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def text(values: list[float]) -> str:
    ms = [1000 * v for v in values]
    return f"{statistics.median(ms):.0f} ({min(ms):.0f}–{max(ms):.0f})"


def main(millions: float, workers: int, rounds: int) -> None:
    torch.set_num_threads(1)
    model = initialize(Transformer(config(millions)), seed=0)
    weights = to_official(model)
    num_bytes = sum(t.numel() * t.element_size() for t in weights.values())
    data = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    hash_s = [seconds(lambda: hashlib.sha256(data.numpy().data).digest()) for _ in range(3)]
    copy_s = [seconds(data.clone) for _ in range(3)]
    print(
        f"{sum(t.numel() for t in weights.values()) / 1e6:.1f} M parameters, {len(weights)} tensors, "
        f"{num_bytes / 1e6:.0f} MB, {workers} workers; one sha256 pass {text(hash_s)} ms, one copy "
        f"{text(copy_s)} ms"
    )
    found: dict[str, dict[str, list[float]]] = {
        name: {"announce": [], "publish": [], "ship": []} for name in TRANSPORTS
    }
    with ray_cluster(workers * len(TRANSPORTS), object_store_bytes=max(100 << 20, 4 * num_bytes)):
        given: dict[str, Any] = {"millions": millions}
        pools = {t: RolloutPool(workers, "bench.publish:build", given, transport=t) for t in TRANSPORTS}
        for turn in range(rounds + 1):
            with torch.no_grad():
                model.head.weight.add_(1e-3)  # every version has other bytes
            order = TRANSPORTS if turn % 2 else TRANSPORTS[::-1]
            for name in order:
                began = time.perf_counter()
                publication = announce(weights, turn)
                announced = time.perf_counter()
                pools[name].publish(weights, publication, turn)
                done = time.perf_counter()
                if turn:  # the first one forms groups and touches pages
                    found[name]["announce"].append(announced - began)
                    found[name]["publish"].append(done - announced)
                    if name != "broadcast":  # its copies and its sending are one
                        transport: Any = pools[name]._transport
                        ship = partial(transport.ship, weights, publication, [])
                        found[name]["ship"].append(seconds(ship))
        for pool in pools.values():
            pool.close()
    print(
        "\n| transport | announce, ms | publish until all have loaded, ms | of that the trainer's copy, ms |"
    )
    print("|---|---|---|---|")
    for name, parts in found.items():
        ship = text(parts["ship"]) if parts["ship"] else "–"
        print(f"| {name} | {text(parts['announce'])} | {text(parts['publish'])} | {ship} |")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        float(given[0]) if given else 30.0,
        int(given[1]) if len(given) > 1 else 2,
        int(given[2]) if len(given) > 2 else 7,
    )
