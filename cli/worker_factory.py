"""Builds a rollout worker inside its own process: engine, boxes, graders. Named by `ray_workers.py`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import Limits
from consilience.rollout.engine import RolloutEngine
from consilience.rollout.worker import RolloutWorker
from consilience.sandboxes.blocking import BlockingPool
from consilience.sandboxes.host import HostLimits
from consilience.sandboxes.host_client import HostPool
from consilience.sandboxes.protocol import SandboxSpec


def build_worker(
    model: Mapping[str, Any],
    tokenizer_path: str,
    max_rows: int,
    max_length: int,
    sandbox: SandboxSpec,
    warm: int,
    rewards: tuple[tuple[str, bool], ...],
    reward_timeout_s: float,
    reward_processes: int,
    needs_boxes: bool,
    family: str,
    speculative: bool = False,
    prefixes: Mapping[str, Any] | None = None,
    exact: bool = False,
    quantization: str = "off",
    records_routing: bool = False,
    limits: Limits | None = None,
    engine: str = "native",
    vllm: Mapping[str, Any] | None = None,
    gradings_per_box: int = 1,
    log_folder: str | None = None,
    device: str = "cpu",
) -> RolloutWorker:
    """A RolloutWorker over an engine with random weights; real ones arrive by `publish`.

    model      config.json fields
    sandbox    SandboxSpec of agent boxes and of the judge's box
    family     checkpoint family whose prompts the model knows (v4_model.md 13.3)
    speculative  the prediction block drafts; EngineError if the model has none
    prefixes  fields of a `PrefixCaching`, or None: no prefix store
    exact, quantization  how the model computes, as the trainer's does (`engine.exact`, `engine.quantization`)
    records_routing  records carry the experts that each token visited
    engine     "native", or "vllm" with the arguments `vllm` of `vllm_launch.launch`
    rewards    (reward path, needs sandbox) pairs to load before the first episode
    limits     how long an episode's threads may take
    device     where the native engine's weights are: "cpu", or "cuda" for the GPU that this process has
    gradings_per_box, log_folder  of the judge's box, and of the agents' boxes (`sandbox.*`)
    Raises what a part that can never work raises: RewardError, SandboxUnavailable.
    """
    import torch

    from consilience.rewards.grader import RewardGrader
    from consilience.rollout.tokenizer import Tokenizer

    torch.set_grad_enabled(False)
    sizes = {"max_rows": max_rows, "max_length": max_length}
    if engine == "vllm":
        from consilience.rollout.vllm_launch import launch

        sampler = launch(model, records_routing=records_routing, **sizes, **(vllm or {}))
    else:
        how = {"speculative": speculative, "exact": exact, "records_routing": records_routing}
        sampler = _native(model, quantization, device, prefixes, **how, **sizes)
    grading = {"sandbox": sandbox, "gradings_per_box": gradings_per_box}
    grader = RewardGrader(timeout_s=reward_timeout_s, num_processes=reward_processes, **grading)
    wait_s = (limits or Limits()).lease_s + 60.0  # the worker's own look at its threads comes first
    boxes = _boxes(sandbox, warm, wait_s, log_folder) if needs_boxes else None

    def close() -> None:
        grader.close()
        if boxes is not None:
            boxes.close()

    try:
        grader.start(rewards)
    except BaseException:
        close()
        raise
    return RolloutWorker(
        sampler,
        Tokenizer.load(tokenizer_path),
        boxes,
        grader,
        family=family,
        max_context=max_length,
        limits=limits,
        on_close=close,
    )


def _boxes(sandbox: SandboxSpec, warm: int, wait_s: float, log_folder: str | None) -> Any:
    """A new box for each lease: from this node's host, where Ray runs, and boxes outlive the worker; or from
    a pool of its own."""
    if "ray" in sys.modules:
        from consilience.sandboxes.ray_host import host_of_this_node, is_here

        if is_here():
            return HostPool(
                host_of_this_node(HostLimits(log_folder=log_folder)), sandbox, warm=warm, lease_limit_s=wait_s
            )
    logs = None if log_folder is None else Path(log_folder)
    return BlockingPool(sandbox, max(warm, 1), 1, lease_limit_s=wait_s, log_folder=logs)


def _native(
    model: Mapping[str, Any],
    quantization: str,
    device: str,
    prefixes: Mapping[str, Any] | None,
    **settings: Any,
) -> RolloutEngine:
    import torch

    from consilience.model.config import ModelConfig
    from consilience.model.initialize import initialize
    from consilience.model.quantization import Quantization
    from consilience.model.transformer import Transformer
    from consilience.rollout.native_engine import NativeEngine
    from consilience.rollout.prefix_reuse import PrefixCaching

    if device == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "cluster.worker_gpus gives this rollout worker a GPU, but its torch finds none; install a torch "
            "with CUDA there, or set cluster.worker_gpus=0"
        )
    policy = initialize(Transformer(ModelConfig.from_json_dict(model)), seed=0)
    policy.to(device).quantize(Quantization.from_name(quantization))
    caching = PrefixCaching(**{**prefixes, "folder": Path(prefixes["folder"])}) if prefixes else None
    return NativeEngine(policy, prefixes=caching, **settings)
