"""The vLLM engine over DeepSeek-V4 on a GPU: updates, what it is off by, sleep (speed: rollout.py).

    python bench/vllm_gpu.py A B [--graphs] [--batch-invariant] [--prove] [--routing] [--sleep]

A and B are two checkpoints of one model in the released FP8/FP4 layout with random weights, so with different
sinks. On a machine without vLLM, or without A and B, it says so and measures nothing.

Bounds: an update passes at 0.35 nats of mean difference to our own fp32 forward; a fresh load gave 0.22 to
0.28, stale sinks 0.4 to 1.0, the more the shorter the sequence (vLLM 0.24 on an H100).
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from rollout_arms import native_model, stored_weights

from consilience.conf.errors import EngineError
from consilience.model.config import ModelConfig
from consilience.model.digest import weights_digest
from consilience.model.released_checkpoint import open_checkpoint
from consilience.rollout.engine import Request, SamplingParams
from consilience.rollout.routing_capture import RoutingCapture
from consilience.rollout.vllm_engine import VllmEngine
from consilience.rollout.vllm_launch import probe_sequences, v4_export
from consilience.rollout.vllm_proof import compare
from consilience.rollout.vllm_reference import reference_of
from consilience.rollout.vllm_routing import CAPTURE

MAX_LENGTH = 2048
# As seen to serve V4 on an H100 (vLLM 0.24).
SETTINGS = {
    "dtype": "bfloat16",
    "kv_cache_dtype": "fp8",
    "max_num_batched_tokens": 2048,
    "gpu_memory_utilization": 0.4,
    "enable_prefix_caching": False,
}
KINDS = (
    "layers.*.attn.attn_sink",
    "layers.*.attn_norm.weight",
    "layers.*.attn.compressor.ape",
    "head.weight",
)


def build(folder: Path, arguments: argparse.Namespace) -> VllmEngine:
    config = open_checkpoint(folder).config
    settings = SETTINGS | {"enforce_eager": not arguments.graphs}
    if arguments.graphs:
        settings["cudagraph_capture_sizes"] = [1, 8, 64]
    if arguments.sleep:
        settings["enable_sleep_mode"] = True
    if arguments.routing:  # it wants prefix caching
        settings |= CAPTURE
    return VllmEngine(
        folder,
        max_rows=64,
        max_length=MAX_LENGTH,
        probes=probe_sequences(min(config.vocab_size, 2000), MAX_LENGTH),
        reference=reference_of(folder, "cuda"),
        max_mismatch=0.35,
        export=v4_export(config),
        settings=settings,
        records_routing=arguments.routing,
    )


def updates(engine: VllmEngine, checkpoints: dict[str, dict[str, torch.Tensor]]) -> None:
    print(
        "\n| update | mean off, nats | most | correlation | reference moved | s |\n|---|---|---|---|---|---|"
    )
    for version, name in enumerate(("A", "B", "A"), 1):
        weights = checkpoints[name]
        digest = weights_digest(weights)
        began = time.perf_counter()
        engine.publish(weights, digest, version)
        m, took = engine.mismatches[-1], time.perf_counter() - began
        row = f"{m.mean:.3f} | {m.largest:.2f} | {m.correlation:.4f} | {m.moved:.2f} | {took:.1f}"
        print(f"| to {name} | {row} |", flush=True)


def repeats(engine: VllmEngine, probes: list[list[int]]) -> None:
    runs = [engine.score(probes) for _ in range(4)]
    off = [np.abs(np.concatenate(run) - np.concatenate(runs[0])) for run in runs[1:]]
    print(
        f"\nscored again: {np.mean(off):.4f} nats on average, {np.max(off):.3f} at most (4 times)", flush=True
    )


def sample(engine: VllmEngine, batch: int, num_new: int, name: str) -> list:
    generator = torch.Generator().manual_seed(batch)
    prompts = [torch.randint(3, 2000, (64,), generator=generator).tolist() for _ in range(batch)]
    sampling = [SamplingParams(max_tokens=num_new, seed=i) for i in range(batch)]
    engine.submit([Request(f"{name}/{i}", tuple(p), s) for i, (p, s) in enumerate(zip(prompts, sampling))])
    done = []
    while len(done) < batch:
        done += engine.step()
    return [(prompts[int(c.uid.rpartition("/")[2])], c) for c in done]


def decoding(engine: VllmEngine, reference, weights) -> None:
    """Sampled log-probabilities against our forward over the same tokens, and against vLLM's own scoring."""
    turns = sample(engine, 8, 128, "decode")
    streams = [[*prompt, *turn.token_ids] for prompt, turn in turns]
    own = [np.array(turn.logprobs) for _, turn in turns]
    for name, scores in (
        ("our forward", reference(weights, streams)),
        ("its scoring", engine.score(streams)),
    ):
        m = compare(0, own, [row[-128:] for row in scores], None)
        print(f"decoding against {name}: {m.mean:.3f} nats, {m.largest:.2f} at most, r {m.correlation:.4f}")


def sleeping(engine: VllmEngine, weights) -> None:
    for level in (1, 2):
        before = torch.cuda.mem_get_info()[0]
        engine.sleep(level)
        gc.collect()
        freed = torch.cuda.mem_get_info()[0] - before
        engine.wake()
        engine.publish(weights, weights_digest(weights), 10 + level)
        print(
            f"sleep {level}: {freed / 2**30:.1f} GiB freed; awake {engine.mismatches[-1].mean:.3f} nats off"
        )


def routing(engine: VllmEngine, folder: Path, tables: dict[str, torch.Tensor]) -> None:
    """Whether the recorded experts of hash layers are those of their tables, and how many of the others' our
    own forward over the same tokens chooses."""
    assert engine.captured is not None
    engine.captured = replace(engine.captured, layers=tuple(range(engine.captured.num_layers)))
    ((prompt, turn),) = sample(engine, 1, 32, "routing")
    tokens = torch.tensor([*prompt, *turn.token_ids])[:-1]
    found = turn.routing.experts()
    print(f"routing: {found.shape} of {len(tokens)} tokens fed, {(found < 0).any((1, 2)).sum()} without")
    model = native_model(folder, "cuda", torch.bfloat16)
    capture = RoutingCapture(model.config, torch.device("cuda"), True)
    ours = capture.routing(len(tokens))
    assert ours is not None and ours.into is not None
    with torch.no_grad():
        model.hidden(tokens[None].cuda(), routing=ours)
    chosen = {layer: ours.into[:, i].cpu().numpy() for i, layer in enumerate(capture.layers)}
    named = {int(name.split(".")[1]): table for name, table in tables.items() if name.endswith("tid2eid")}
    chosen |= {layer: table[tokens].numpy() for layer, table in named.items()}
    for layer in sorted(chosen):
        pairs = zip(found[:, layer].tolist(), chosen[layer].tolist())
        share = np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs])
        what = "its hash table's" if layer in named else "our forward's too"
        print(f"  layer {layer}: {share:.4f} of its experts are {what}")
        if layer in named and share < 1:
            raise SystemExit("FAIL: the experts of a hash layer are not its table's")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path)
    for flag in ("graphs", "batch-invariant", "prove", "routing", "sleep"):
        parser.add_argument(f"--{flag}", action="store_true")
    arguments = parser.parse_args()
    if find_spec("vllm") is None or len(arguments.checkpoints) != 2:
        print("not measured: needs vLLM and two checkpoints (docs/rollouts.md, vLLM)")
        return
    if arguments.batch_invariant:
        os.environ["VLLM_BATCH_INVARIANT"] = "1"
    first, second = arguments.checkpoints
    checkpoints = {"A": stored_weights(first), "B": stored_weights(second)}
    config = ModelConfig.from_json_dict(open_checkpoint(first).row)
    print(f"{torch.cuda.get_device_name()}, {config.num_hidden_layers} layers, {vars(arguments)}")
    began = time.perf_counter()
    engine = build(first, arguments)
    print(f"engine: {time.perf_counter() - began:.0f} s", flush=True)
    probes = probe_sequences(min(config.vocab_size, 2000), MAX_LENGTH)
    updates(engine, checkpoints)
    repeats(engine, probes)
    decoding(engine, reference_of(first, "cuda"), checkpoints["A"])
    if arguments.routing:
        routing(engine, first, checkpoints["A"])
    if arguments.sleep:
        sleeping(engine, checkpoints["A"])
    if arguments.prove:
        try:
            proofs = engine.prove(checkpoints["A"], KINDS)
        except EngineError as error:
            raise SystemExit(f"FAIL: {error}") from None
        for proof in proofs:
            print(f"{proof.kind}: moved {proof.expected:.2f} nats, vLLM followed by {proof.followed:.2f}")
    engine.close()


if __name__ == "__main__":
    main()
