"""What `engine.kind` and `engine.ranks` become: the train engine, and what the machine must have for it.

The one place that chooses an engine; its class is imported here and only when it is the chosen one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config
from consilience.model.ranks import Ranks
from consilience.training.engine import TrainEngine
from consilience.training.torch_engine import OptimizerSettings, TorchEngine


def build_engine(cfg: Config, model: Any, settings: OptimizerSettings, ranks: Ranks) -> TrainEngine:
    """The engine that `engine.kind` names, around `model`, which is on its device already.

    One that cuts the model brings it there itself, part by part.
    """
    engine = cfg.engine
    ranks = ranks.with_context(engine.context_ranks, timeout_s=engine.rank_limit_s)
    if engine.kind == "deepspeed":
        from consilience.training.deepspeed_engine import DeepSpeedEngine

        return DeepSpeedEngine(
            model,
            settings,
            ranks=ranks,
            zero_stage=engine.zero_stage,
            offload=engine.offload,
            exact=engine.exact,
        )
    if engine.kind == "fsdp":
        from consilience.training.fsdp_engine import FsdpEngine

        return FsdpEngine(model, settings, ranks=ranks)
    if engine.expert_ranks > 1:
        from consilience.training.expert_engine import ExpertEngine

        return ExpertEngine(
            model,
            settings,
            ranks=ranks,
            expert_ranks=engine.expert_ranks,
            exact=engine.exact,
            timeout_s=engine.rank_limit_s,
        )
    return TorchEngine(model, settings, exact=engine.exact, ranks=ranks)


def device_of(cfg: Config) -> torch.device:
    """Where the trainer's tensors live. ConfigError if a GPU is asked for and there is none."""
    wanted = cfg.engine.device
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("engine.device is cuda, but torch finds no GPU; take engine.device=auto")
    return torch.device("cuda" if has_gpu and wanted != "cpu" else "cpu")


def backend_of(cfg: Config, num_gpus: int | None = None, kinds: list[str] | None = None) -> str:
    """What carries tensors between the ranks of this machine: nccl where each has a GPU, else gloo.

    num_gpus, kinds  of this machine, one name a GPU; None: as torch finds them
    ConfigError, before anything is started, where the ranks that the settings ask for cannot train together.
    """
    size = cfg.engine.ranks
    if cfg.engine.kind == "deepspeed":
        from consilience.training.deepspeed_setup import check_installed

        check_installed()
    if cfg.engine.kind == "fsdp" and dist.is_available():
        from consilience.training.fsdp_model import check_version

        check_version()
    if size > 1 and not dist.is_available():
        raise ConfigError(
            f"engine.ranks is {size}, but this torch has no torch.distributed; set engine.ranks=1"
        )
    if device_of(cfg).type == "cpu" and num_gpus is None:
        return "gloo"
    found = torch.cuda.device_count() if num_gpus is None else num_gpus
    if size > found:
        raise ConfigError(
            f"engine.ranks is {size}, but a rank needs a GPU of its own and torch finds {found}; set "
            f"engine.ranks={found}, or engine.device=cpu"
        )
    names = [torch.cuda.get_device_name(i) for i in range(size)] if kinds is None else kinds[:size]
    if len(set(names)) > 1:
        listed = ", ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise ConfigError(
            f"engine.ranks is {size}, but the GPUs differ ({listed}): the slowest would set the pace and "
            "results would depend on who ran what; set CUDA_VISIBLE_DEVICES to GPUs of one kind"
        )
    if size > 1 and not dist.is_nccl_available():
        raise ConfigError("this torch has no NCCL, which GPUs need to train together; set engine.ranks=1")
    return "nccl"
