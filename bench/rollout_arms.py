"""The arms of rollout.py, a process each: weights from a folder, a digest of what it holds, batches.

    native         NativeEngine on a V4 checkpoint
    transformers   `generate` on the same V4 checkpoint, or on a dense one
    vllm           VllmEngine, which proves its weights by log-probabilities: dense on a CPU, V4 on a GPU

One JSON line in (rows, tokens), one out (`Marks.measured`). An arm is started by rollout.py only.

B rows, P tokens of a prompt.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from against_transformers import resident, settle
from torch import Tensor

ROOT = Path(__file__).parents[1]
SKIPPED = 4  # tokens of each row that are not timed: prompts, and steps that capture or compile
V4 = "DeepseekV4ForCausalLM"
# vLLM and the reference add up in other orders; fp32 was seen 7e-6 nats off on a CPU, FP8 0.28 on an H100.
MAX_MISMATCH = {"cpu": 1e-4, "cuda": 0.35}
Weights = Mapping[str, Tensor]


class Marks:
    """When how many tokens of a batch had been sampled, in wall and processor seconds."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.marks: list[tuple[float, float, int]] = []
        self.add(0)

    def add(self, tokens: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append((time.perf_counter(), time.process_time(), tokens))

    def measured(self) -> dict[str, float]:
        """s, cpu_s, tokens of decoding behind the first tokens of all rows; all_s, all_tokens: all."""
        began = next(mark for mark in self.marks if mark[2] >= SKIPPED * self.rows)
        first, last = self.marks[0], self.marks[-1]
        return {
            "s": last[0] - began[0],
            "cpu_s": last[1] - began[1],
            "tokens": last[2] - began[2],
            "all_s": last[0] - first[0],
            "all_tokens": last[2],
        }


Run = Callable[[list[list[int]], int, int], Marks]
"""Prompts [B][P], new tokens of each, seed."""


# ---- checkpoints ----------------------------------------------------------------------------------


def write_v4(folder: Path, name: str) -> None:
    """A V4 checkpoint with random weights: `flash4` (on a GPU) in the released layout, a preset as it is."""
    from consilience.model.config import PRESETS
    from consilience.model.initialize import initialize
    from consilience.model.release import from_model, write_release
    from consilience.model.transformer import Transformer

    folder.mkdir()
    if name != "flash4":
        model = initialize(Transformer(PRESETS[name]), seed=0)
        return write_release(folder, from_model(model), layout="native", dtype=torch.float32)
    from train_step_gpu import fill, flash_width, spread_hash

    # vLLM's compiled kernels exist for these sizes.
    sizes = {"vocab_size": 32768, "n_routed_experts": 32, "moe_intermediate_size": 1024, "num_hash_layers": 2}
    config = replace(flash_width(), **sizes)
    with torch.device("cuda"):
        model = Transformer(config, torch.bfloat16)
    fill(model)
    spread_hash(model, config)
    with torch.no_grad():
        for parameter in model.parameters():  # what stays fp32 must be the same where all is bf16
            parameter.copy_(parameter.bfloat16())
    return write_release(folder, from_model(model), layout="official", experts="fp4")


def write_dense(folder: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.1,  # peaked enough that log-probabilities, which prove an update, vary
    )
    Qwen3ForCausalLM(config).float().save_pretrained(folder)


def stored_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a V4 checkpoint, released names, quantised ones as the values they stand for; of another
    checkpoint, its tensors as they are."""
    from consilience.model.released_checkpoint import TensorsOnDisk, open_checkpoint

    if architecture(folder) == V4:
        on_disk = TensorsOnDisk(open_checkpoint(folder))
        return {name: on_disk[name] for name in on_disk}
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def architecture(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def digest_of_values(weights: Weights, dtype: torch.dtype) -> str:
    """`weights_digest` with floating-point tensors as `dtype`, the one that all arms compute in."""
    from consilience.model.digest import weights_digest

    cast = lambda t: t.to(dtype) if t.is_floating_point() else t.long()
    return weights_digest({name: cast(tensor) for name, tensor in weights.items()})


# ---- arms: (folder, device, dtype, batches to come, tokens of a row) -> run, digest, seconds to publish


def native_model(folder: Path, device: str, dtype: torch.dtype) -> Any:
    from consilience.model.checkpoint import load_official
    from consilience.model.released_checkpoint import open_checkpoint
    from consilience.model.transformer import Transformer

    config = open_checkpoint(folder).config
    with torch.device(device):
        model = Transformer(config, dtype)
    load_official(model, stored_weights(folder))
    return model.requires_grad_(False).eval()


def native(
    folder: Path, device: str, dtype: torch.dtype, batches: list[int], length: int
) -> tuple[Run, str, float]:
    from consilience.model.checkpoint import to_official
    from consilience.rollout.native_engine import NativeEngine

    model = native_model(folder, device, dtype)
    weights = stored_weights(folder)
    published_s = seconds_to_publish(NativeEngine(model, max_rows=1, max_length=length), weights)

    def run(prompts: list[list[int]], tokens: int, seed: int) -> Marks:
        engine = NativeEngine(
            model, max_rows=len(prompts), max_length=length, prefill_tokens=max(batches) * len(prompts[0])
        )
        return step_through(engine, prompts, tokens, seed)

    return run, digest_of_values(to_official(model), dtype), published_s


def vllm(
    folder: Path, device: str, dtype: torch.dtype, batches: list[int], length: int
) -> tuple[Run, str, float]:
    from consilience.model.released_checkpoint import open_checkpoint
    from consilience.rollout.vllm_engine import VllmEngine
    from consilience.rollout.vllm_launch import probe_sequences, v4_export
    from consilience.rollout.vllm_reference import reference_of

    is_v4, probe_length = architecture(folder) == V4, min(length, 64)
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    if is_v4:
        from vllm_gpu import SETTINGS

        memory = {"gpu_memory_utilization": 0.4, "enforce_eager": False, "cudagraph_capture_sizes": batches}
        settings = SETTINGS | memory
    else:
        cache = {"kv_cache_memory_bytes": 256 << 20, "enable_prefix_caching": False}
        settings = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_batched_tokens": max(batches) * length,
        } | cache
    engine = VllmEngine(
        folder,
        max_rows=max(batches),
        max_length=length,
        probes=probe_sequences(min(vocab_size, 2000), probe_length),
        reference=reference_of(folder, device),
        max_mismatch=MAX_MISMATCH[device],
        export=v4_export(open_checkpoint(folder).config) if is_v4 else None,
        settings=settings,
    )
    weights = stored_weights(folder)
    published_s = seconds_to_publish(engine, weights)
    return lambda *what: step_through(engine, *what), digest_of_values(weights, dtype), published_s


def transformers(folder: Path, device: str, dtype: torch.dtype, batches: list[int], length: int) -> Any:
    from transformers import StoppingCriteria

    model, digest = v4_twin(folder, device, dtype) if architecture(folder) == V4 else dense(folder, dtype)
    model.generation_config.eos_token_id = None

    class Clock(StoppingCriteria):
        def __init__(self, marks: Marks) -> None:
            self.marks, self.count = marks, 0

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.count += len(input_ids)
            self.marks.add(self.count)
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def run(prompts: list[list[int]], tokens: int, seed: int) -> Marks:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts, device=device)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}
        marks, mask = Marks(len(prompts)), torch.ones_like(ids)
        watch = [Clock(marks)]
        model.generate(ids, attention_mask=mask, pad_token_id=0, stopping_criteria=watch, **sampling)
        assert watch[0].count == len(prompts) * tokens
        return marks

    return run, digest, None


def v4_twin(folder: Path, device: str, dtype: torch.dtype) -> tuple[Any, str]:
    """transformers' model with the checkpoint's values; the digest of what it holds, under released names."""
    sys.path.insert(0, str(ROOT / "tests" / "model"))
    from transformers import DeepseekV4ForCausalLM
    from transformers_oracle import hf_config, hf_state, under_our_names

    from consilience.model.checkpoint import to_official

    model = native_model(folder, "cpu", dtype)
    torch.set_default_dtype(dtype)  # in bf16 it must be bf16 throughout, or its products refuse their factors
    with torch.device(device):
        twin = DeepseekV4ForCausalLM(hf_config(model.config))
    torch.set_default_dtype(torch.float32)
    twin.load_state_dict(hf_state(model), strict=True)
    for tensor in model.state_dict().values():
        tensor.zero_()  # so that what is digested comes from the twin
    model.load_state_dict(under_our_names(model.state_dict(), twin.state_dict()), strict=True)
    return twin.requires_grad_(False).eval(), digest_of_values(to_official(model), dtype)


def dense(folder: Path, dtype: torch.dtype) -> tuple[Any, str]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False).eval()
    return model, digest_of_values(model.state_dict(), dtype)


def step_through(engine: Any, prompts: list[list[int]], tokens: int, seed: int) -> Marks:
    """All prompts at once through a `RolloutEngine`, each sampled to the same length."""
    from consilience.rollout.engine import Request, SamplingParams

    name, done, count = f"{seed}/{time.monotonic_ns()}", 0, 0
    requests = [
        Request(f"{name}/{i}", tuple(ids), SamplingParams(1.0, tokens, (), seed * len(prompts) + i))
        for i, ids in enumerate(prompts)
    ]
    marks = Marks(len(prompts))
    engine.submit(requests)
    while done < len(prompts):
        done += len(engine.step())
        count += len(engine.new_tokens().uids)
        marks.add(count)
    assert count == len(prompts) * tokens
    return marks


def seconds_to_publish(engine: Any, weights: Weights) -> float:
    from consilience.model.digest import weights_digest

    digest = weights_digest(weights)
    began = time.perf_counter()
    engine.publish(weights, digest, 1)
    return time.perf_counter() - began


ARMS = {"native": native, "transformers": transformers, "vllm": vllm}


def serve(order: dict[str, Any]) -> None:
    """Make the arm, then a batch a line, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    say = lambda row: print(json.dumps(row), file=answers, flush=True)
    torch.set_num_threads(order["threads"])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    device, dtype = order["device"], getattr(torch, order["dtype"])
    if order["kind"] == "vllm":
        from consilience.rollout.vllm_settings import prepare_environment

        prepare_environment()
    if order["kind"] != "native":
        import_module(order["kind"])
    libraries = settle()
    began = time.perf_counter()
    run, digest, published_s = ARMS[order["kind"]](
        Path(order["folder"]), device, dtype, order["batches"], order["length"]
    )
    vocab_size = json.loads((Path(order["folder"]) / "config.json").read_text())["vocab_size"]
    say({"digest": digest, "published_s": published_s, "start_s": time.perf_counter() - began})
    for line in sys.stdin:
        wanted = json.loads(line)
        generator = torch.Generator().manual_seed(wanted["seed"])
        prompts = torch.randint(3, vocab_size, (wanted["rows"], wanted["prompt"]), generator=generator)
        settle()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            found = run(prompts.tolist(), wanted["tokens"], wanted["seed"]).measured()
        except torch.OutOfMemoryError:
            say({"failed": "out of memory"})
            continue
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - libraries
        say({**found, "peak": peak})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(json.loads(sys.argv[1]))
    else:
        print("the arms of bench/rollout.py; nothing to measure alone")
