"""What a vLLM engine is told, and what would change the law it samples by. Imports vLLM only to start it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from consilience.conf.errors import ConfigError
from consilience.conf.fields import nearest

V4 = "DeepseekV4ForCausalLM"
# Arguments of vLLM that leave the sampled distribution alone: where and how fast it computes.
ALLOWED = (
    "attention_backend", "block_size", "compilation_config", "cudagraph_capture_sizes",
    "disable_custom_all_reduce", "distributed_executor_backend", "dtype", "enable_chunked_prefill",
    "enable_expert_parallel", "enable_prefix_caching", "enable_return_routed_experts",
    "enable_sleep_mode", "enforce_eager", "gpu_memory_utilization", "hf_overrides", "kv_cache_dtype",
    "kv_cache_memory_bytes", "load_format",
    "max_num_batched_tokens", "model_impl", "moe_backend", "quantization", "tensor_parallel_size",
    "trust_remote_code",
)  # fmt: skip
# Arguments that would: each with what is wrong with it.
REFUSED = {
    "logprobs_mode": "log-probabilities are those of the sampled distribution (processed_logprobs), always",
    "generation_config": "its top-p, top-k and penalties would change the sampled distribution",
    "override_generation_config": "its top-p, top-k and penalties would change the sampled distribution",
    "logits_processors": "they change the sampled distribution",
    "speculative_config": "its log-probabilities were never checked here; the native engine drafts",
    "async_scheduling": "a step would return tokens of the step before, which may have had other weights",
    "return_sampling_mask": "it is for top-k, which importance sampling refuses: no kept set is recorded",
    "enable_lora": "published weights are whole models",
}
DEFAULT_STEP_TOKENS = 4096  # prefilled and decoded in one step on a CPU
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own choice puts the workers of one machine on the same cores
}


def start_vllm(
    checkpoint: Path, architecture: str, settings: Mapping[str, Any], max_rows: int, max_length: int
) -> Any:
    """vLLM's own engine, told what `VllmEngine` relies on. ConfigError on a setting that may not be."""
    prepare_environment()
    from vllm import EngineArgs  # pyright: ignore
    from vllm.platforms import current_platform  # pyright: ignore
    from vllm.v1.engine.llm_engine import LLMEngine  # pyright: ignore

    check_settings(settings, architecture, current_platform.is_cpu())
    if current_platform.is_cpu():
        settings = {**whole_prompts(max_rows, max_length), **settings}
    unknown = settings.keys() - {field.name for field in fields(EngineArgs)}
    if unknown:
        raise ConfigError(
            f"this vLLM has no {', '.join(sorted(unknown))}; leave it out, or take another version"
        )
    args = EngineArgs(
        model=str(checkpoint),
        skip_tokenizer_init=True,
        max_num_seqs=max_rows,
        max_model_len=max_length,
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        async_scheduling=False,
        worker_extension_cls="consilience.rollout.vllm_weights.WeightReceiver",
        **settings,
    )
    return LLMEngine.from_engine_args(args)


def whole_prompts(max_rows: int, max_length: int) -> dict[str, Any]:
    """Settings under which a prompt is prefilled in one step, which vLLM's CPU build needs.

    Where it cuts one in two, it winds a seeded request's generator back, which a CPU's generator refuses:
    the engine would end with "CPU Generator does not use offset".
    """
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(DEFAULT_STEP_TOKENS, max_rows, max_length),
    }


def prepare_environment() -> None:
    """What vLLM reads when it is first imported; other values that are set already stay."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a step is a step, and an update falls between two


def check_settings(settings: Mapping[str, Any], architecture: str, is_cpu: bool) -> None:
    """ConfigError on an argument that is unknown here, that changes what is sampled, or that V4 has not."""
    for name, value in settings.items():
        if name in REFUSED:
            raise ConfigError(f"rollout.vllm.settings.{name} is refused: {REFUSED[name]}")
        if name not in ALLOWED:
            raise ConfigError(f"rollout.vllm.settings.{name} is no setting that is known to be safe; "
                              f"{nearest(name, ALLOWED)}")  # fmt: skip
        if name == "enable_chunked_prefill" and value and is_cpu:
            raise ConfigError(
                "rollout.vllm.settings.enable_chunked_prefill: vLLM's CPU build cannot wind back the random "
                "numbers of a prompt in two parts; leave it out"
            )
        if name == "enable_sleep_mode" and value and is_cpu:
            raise ConfigError(
                "rollout.vllm.settings.enable_sleep_mode: vLLM's CPU build has none; leave it out"
            )
    if architecture == V4:
        if is_cpu:
            raise ConfigError(
                "vLLM's CPU build cannot serve DeepSeek-V4: its metadata kernels are Triton's and its reload "
                "spoils packed experts; take rollout.engine=native, or a GPU"
            )
        if settings.get("kv_cache_dtype") != "fp8":
            raise ConfigError(
                f"rollout.vllm.settings.kv_cache_dtype is {settings.get('kv_cache_dtype')!r}; V4 has an FP8 "
                "cache in vLLM and no other: set it to fp8"
            )


def seed_at(seed: int, position: int) -> int:
    """Seed of a request that has sampled `position` tokens: [0, 2^63).

    vLLM draws a request's numbers from a generator that starts afresh with the request. Going on with the
    same seed would draw the numbers of the prefix again, which the prefix's tokens depend on.
    """
    digest = hashlib.sha256(f"{seed}/{position}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
