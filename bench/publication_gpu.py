"""Weights published from one GPU to a worker on another of the same host: NCCL, shared memory, the ceiling.

    PYTHONPATH=. python bench/publication_gpu.py [--models small flash4] [--rounds 5]
    PYTHONPATH=. python bench/publication_gpu.py --device cpu --models tiny      (what it does, by gloo)

Two processes, publisher and worker, no Ray. Arms in turns, their order reversed every other round; seconds
from the publisher's start until the worker says that everything is on its device:

    broadcast      rollout/weight_broadcast.py, buckets of 64 MiB
    shared memory  rollout/shared_segment.py, mapped by the worker and copied to its device
    bare           one broadcast of as many bytes in the same group: the ceiling

Models: a preset, or flash4 (4 layers of Flash's width with 16 experts); random numbers, on a GPU in bf16. In
the first and the last round the worker verifies the digest of every tensor, other bytes each time. At the end
the worker falls silent, and the publisher's broadcast must break off within the group's limit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from consilience.model.checkpoint import to_official
from consilience.model.config import PRESETS, ModelConfig
from consilience.model.transformer import Transformer
from consilience.rollout.publishing import Publication, announce, verify
from consilience.rollout.shared_segment import SharedSegment, map_segment
from consilience.rollout.weight_broadcast import BroadcastBroken, BroadcastGroup, GroupAddress, open_store

LIMIT_S = 240.0
ARMS = ("broadcast", "shared memory", "bare")
SILENCE_BYTES = 1 << 28  # more than any buffer between the two


def config_of(name: str) -> ModelConfig:
    if name != "flash4":
        return PRESETS[name]
    from train_step_gpu import flash_width

    return flash_width()


def random_weights(config: ModelConfig, device: str, seed: int) -> dict[str, Tensor]:
    """The published tensors of a model, random numbers in them."""
    with torch.device("meta"):
        shapes = to_official(Transformer(config, torch.bfloat16 if device == "cuda" else torch.float32))
    generator = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, like in shapes.items():
        made = torch.empty(like.shape, dtype=like.dtype, device=device)
        integers = not like.is_floating_point()
        found[name] = (
            made.random_(0, 100, generator=generator) if integers else made.normal_(generator=generator)
        )
    return found


# ---- the worker -----------------------------------------------------------------------------------


def work(pipe: Any, device: str) -> None:
    """Answers one order after another until it is told to end or nobody speaks for `LIMIT_S`."""
    here = place(device, 1)
    group: BroadcastGroup | None = None
    pipe.send(None)  # imported all
    while pipe.poll(LIMIT_S):
        kind, *order = pipe.recv()
        if kind == "end":
            return
        try:
            if kind == "join":
                group, answer = BroadcastGroup(order[0], 1), None
            else:
                assert group is not None
                answer = receive(group, here, kind, *order)
        except Exception as error:
            answer = error
        pipe.send(None if callable(answer) else answer)
        if callable(answer):
            pipe.send(checked(answer))


def receive(group: BroadcastGroup, here: str, arm: str, what: Any, publication: Any, is_checked: bool) -> Any:
    """What verifies the digests, or None: it is not timed with the arrival."""
    if arm == "bare":
        group.broadcast(torch.zeros(what, dtype=torch.uint8, device=here))
        return None
    if arm == "broadcast":
        weights: Mapping[str, Tensor] = group.receive(publication)
    else:
        weights = {name: t.to(here) for name, t in map_segment(what, publication).items()}
        settle(here)
    return partial(verify, weights, publication) if is_checked else None


def checked(check: Callable[[], object]) -> Any:
    """Seconds it took, or its error."""
    began = time.perf_counter()
    try:
        check()
    except Exception as error:
        return error
    return time.perf_counter() - began


# ---- the publisher --------------------------------------------------------------------------------


class Worker:
    """The publisher's end: a process, and a group that both are members of."""

    def __init__(self, device: str, limit_s: float) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, device), daemon=True)
        self.process.start()
        self.hear()
        store = open_store(limit_s)
        backend = "nccl" if device == "cuda" else "gloo"
        address = GroupAddress("127.0.0.1", store.port, 2, backend, limit_s)
        self.pipe.send(("join", address))
        self.group = BroadcastGroup(address, 0, store)
        self.hear()

    def hear(self) -> Any:
        if not self.pipe.poll(LIMIT_S):
            raise SystemExit(f"FAIL: the worker said nothing for {LIMIT_S:g} s")
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise SystemExit(f"FAIL: {answer}")
        return answer

    def publish(
        self, arm: str, weights: Mapping[str, Tensor], publication: Publication, checked: bool
    ) -> float:
        """Seconds until the worker has all."""
        num_bytes = sum(t.numel() * t.element_size() for t in weights.values())
        here = next(iter(weights.values())).device
        settle(here.type)
        flat = torch.ones(num_bytes, dtype=torch.uint8, device=here) if arm == "bare" else None
        began = time.perf_counter()
        segment = SharedSegment(weights, publication) if arm == "shared memory" else None
        self.pipe.send((arm, num_bytes if segment is None else segment.address, publication, checked))
        if arm == "broadcast":
            self.group.send(weights, publication)
        elif flat is not None:
            self.group.broadcast(flat)
        self.hear()
        took = time.perf_counter() - began
        if checked and arm != "bare":
            print(f"  {arm}: {len(weights)} digests verified on arrival in {self.hear():.1f} s", flush=True)
        if segment is not None:
            segment.close()
        return took

    def fall_silent(self) -> None:
        """SystemExit unless a broadcast that the worker never joins breaks off within the group's limit."""
        limit_s, began = self.group.address.timeout_s, time.perf_counter()
        device = "cuda" if self.group.address.backend == "nccl" else "cpu"
        try:
            self.group.broadcast(torch.zeros(SILENCE_BYTES, dtype=torch.uint8, device=device))
        except BroadcastBroken as error:
            took = time.perf_counter() - began
            print(f"a silent worker: broken off after {took:.1f} s of {limit_s:g} s ({error})", flush=True)
            if took < 2 * limit_s:
                return
        raise SystemExit(f"FAIL: a silent worker was not noticed within {limit_s:g} s")

    def close(self) -> None:
        self.process.kill()
        self.process.join(30)


def table(name: str, worker: Worker, device: str, rounds: int) -> None:
    weights: dict[str, Tensor] = {}
    times: dict[str, list[float]] = {arm: [] for arm in ARMS}
    publication = None
    for turn in range(rounds + 1):
        if turn in (0, rounds) or publication is None:
            weights.clear()
            weights |= random_weights(config_of(name), device, turn)
            began = time.perf_counter()
            publication = announce(weights, turn)
            num_bytes = sum(t.numel() * t.element_size() for t in weights.values())
            took = time.perf_counter() - began
            size = f"{len(weights)} tensors, {num_bytes / 1e9:.3f} GB"
            print(f"{name}, version {turn}: {size}, announced in {took:.1f} s", flush=True)
        for arm in ARMS if turn % 2 else ARMS[::-1]:
            took = worker.publish(arm, weights, publication, turn in (0, rounds))
            if turn:  # the first one connects and touches pages
                times[arm].append(took)
    print(
        "\n| model | arm | ms until all has arrived | GB/s | of the bare broadcast |\n|---|---|---|---|---|"
    )
    ceiling = statistics.median(times["bare"])
    for arm, found in times.items():
        middle = statistics.median(found)
        text = f"{1000 * middle:.1f} ({1000 * min(found):.1f}–{1000 * max(found):.1f})"
        print(f"| {name} | {arm} | {text} | {num_bytes / middle / 1e9:.2f} | {ceiling / middle:.2f} |")
    print(flush=True)


def place(device: str, rank: int) -> str:
    """This process's device; on a CPU one thread."""
    if device == "cuda":
        torch.cuda.set_device(rank)
        return f"cuda:{rank}"
    torch.set_num_threads(1)
    return device


def settle(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--models", nargs="+", default=["small", "flash4"], choices=["flash4", *PRESETS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds that the group waits for a member")
    given = parser.parse_args()
    if given.device == "cuda" and torch.cuda.device_count() < 2:
        print("not measured: needs two GPUs")
        return
    what = torch.cuda.get_device_name() if given.device == "cuda" else "CPU, gloo"
    print(f"{what}, torch {torch.__version__}, {given.rounds} rounds", flush=True)
    place(given.device, 0)
    worker = Worker(given.device, given.limit)
    try:
        for name in given.models:
            table(name, worker, given.device, given.rounds)
        worker.fall_silent()
    finally:
        worker.close()


if __name__ == "__main__":
    main()
