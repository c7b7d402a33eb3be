"""Settings of what samples: workers, engines, prompts' states. `schema.py` puts the groups together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consilience.conf.fields import setting


@dataclass(frozen=True)
class PrefixStoreConfig:
    """States of prompts on disk: what one engine has computed, any other takes from there."""

    path: str | None = setting(
        None, "folder, shared by all workers that can reach it; null: off", speed_only=True
    )
    window: str = setting(
        "whole",
        "sliding windows kept: one a block, one every period_tokens, or none (computed again)",
        choices=("whole", "checkpointed", "recomputed"),
        speed_only=True,
    )
    period_tokens: int = setting(
        2048, "between windows of 'checkpointed', whole blocks of 128", unit="tokens", low=1, speed_only=True
    )
    limit_bytes: int = setting(
        16 << 30, "the folder's size; oldest entries go first", unit="bytes", low=1 << 20, speed_only=True
    )


@dataclass(frozen=True)
class VllmConfig:
    """vLLM behind the workers, where `rollout.engine=vllm`."""

    python: str | None = setting(
        None, "interpreter of the environment that has vLLM (.venv-vllm/bin/python); null: the driver's own"
    )
    checkpoint: str | None = setting(
        None,
        "folder that vLLM starts from, in a layout it reads; null: random weights, until an update",
    )
    max_mismatch: float = setting(
        0.35,
        "mean |log-probability − reference| over an update's probes above which it failed; 0.35 lets V4's "
        "FP8 kernels pass and no stale sink",
        unit="nats",
        above=0,
    )
    sleep: int | None = setting(
        None,
        "how deep GRPO's workers sleep while the trainer learns: caches given back (0), weights moved to the "
        "host (1) or dropped (2); null: awake",
        low=0,
        high=2,
        speed_only=True,
    )
    settings: dict[str, Any] = setting({}, "further arguments of vLLM (rollout/vllm_settings.py says which)")


@dataclass(frozen=True)
class RolloutConfig:
    """The workers that sample."""

    num_workers: int = setting(
        2, "Ray actors, each with its own engine", unit="processes", low=1, high=4096, speed_only=True
    )
    max_batch: int = setting(128, "streams a worker decodes at once", unit="streams", low=1, speed_only=True)
    threads_per_worker: int = setting(1, "CPU threads of a worker", unit="threads", low=1, speed_only=True)
    max_length: int = setting(1024, "longest stream, prompt included", unit="tokens", low=16)
    durability: str = setting(
        "process",
        "what sampled tokens survive before anybody sees them: kill -9 of any process, or a power cut too",
        choices=("process", "power"),
        speed_only=True,
    )
    log_copy: str | None = setting(
        None,
        "folder, on another disk or node, for a second copy of the token logs; null: there is none",
        speed_only=True,
    )
    stall_s: float = setting(
        900.0, "a worker silent for so long is named, ended and replaced", unit="s", low=10, speed_only=True
    )
    pause_limit_s: float = setting(
        8.0,
        "saving running streams when the run is stopped, so that nothing is computed again; 0: not at all",
        unit="s",
        low=0,
        speed_only=True,
    )
    transport: str = setting(
        "auto",
        "how weights reach the workers; auto: shared memory where all of them can map it, else Ray's store",
        choices=("auto", "shared_memory", "object_store", "broadcast"),
        speed_only=True,
    )
    proof: str = setting(
        "start",
        "start: each stage first proves that its workers compute with the trainer's weights, or stops",
        choices=("start", "off"),
        speed_only=True,
    )
    quantization: str | None = setting(
        None,
        "how workers compute, as in engine.quantization; null: as the trainer; else the mismatch is logged",
        choices=("off", "fp4", "fp8", "fp4_fp8"),
    )
    publish_limit_s: float = setting(
        600.0, "the same, while it takes over new weights", unit="s", low=1, speed_only=True
    )
    tool_limit_s: float = setting(
        600.0,
        "a tool call; then the sample is given out again",
        unit="s",
        low=1,
        speed_only=True,
    )
    lease_limit_s: float = setting(
        1800.0, "a box and its files; then the sample is given out again", unit="s", low=1, speed_only=True
    )
    most_redispatches: int = setting(
        2,
        "times that a stalled sample is given out again; then it is dropped with its group",
        unit="times",
        low=0,
        speed_only=True,
    )
    engine: str = setting(
        "native", "what decodes: the exact engine of this project, or vLLM", choices=("native", "vllm")
    )
    vllm: VllmConfig = setting(VllmConfig, "vLLM's own settings")
    speculative: bool = setting(
        False, "the MTP block drafts, the model verifies: same distribution, other tokens for a seed"
    )
    prefix_store: PrefixStoreConfig = setting(PrefixStoreConfig, "prompts' states on disk")
