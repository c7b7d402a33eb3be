"""DeepSpeed brought up without what it does unasked: no JIT builds, no MPI, no log lines, no files."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from consilience.conf.errors import EngineError
from consilience.model.ranks import Ranks
from consilience.training.deepspeed_stage3 import mark_blocks

BUCKET_ELEMENTS = 1 << 26
VERSION = "0.19.8"


def open_deepspeed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    *,
    zero_stage: int,
    offload: bool,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> Any:
    """A DeepSpeed engine over the model's own types, gradients summed and not averaged over the ranks.

    DeepSpeed's bf16 mode casts every parameter. Its fp32 mode casts none, and keeps fp32 masters and
    gradients of whatever there is: so that is the mode, for bf16 models too.
    """
    check_installed()
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("DeepSpeed")
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its build takes 44 s
    _join(ranks)
    elements = min(bucket_elements, sum(p.numel() for p in model.parameters()))
    zero: dict[str, Any] = {
        "stage": zero_stage,
        "overlap_comm": False,
        "reduce_bucket_size": elements,
        "allgather_bucket_size": elements + elements % 2,
    }
    if zero_stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_reuse_distance": 0,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "gradient_allreduce_op": "mean" if zero_stage == 3 else "sum",  # 3 has no sums: the engine multiplies
        "managed_gradient_accumulation": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": None,
    }
    if zero_stage == 3:
        mark_blocks(model)
        _number_from_zero()
    logger.setLevel(logging.ERROR)  # it warns of every optimiser that is not its own
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    logger.setLevel(logging.WARNING)
    return engine


def check_possible(model: nn.Module, *, zero_stage: int, kind: str, expert_ranks: int) -> None:
    """EngineError, before anything is allocated, for what DeepSpeed cannot do right, naming what can."""
    check_installed()
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if zero_stage not in (1, 2, 3):
        raise EngineError(f"engine.zero_stage is {zero_stage}; DeepSpeed has 1, 2 and 3")
    if zero_stage == 3 and kind == "muon":
        raise EngineError(
            "optimizer.kind=muon with engine.zero_stage=3: every matrix is cut into pieces over all ranks, "
            "and Muon needs whole ones; use engine.zero_stage=2, engine.kind=fsdp or optimizer.kind=adamw"
        )
    if zero_stage == 3 and types - {torch.float32}:
        raise EngineError(
            "engine.zero_stage=3 with a bf16 model: DeepSpeed's ZeRO-3 keeps all parameters in one type, V4 "
            "keeps some in fp32; use engine.zero_stage=2, engine.kind=fsdp or model weights in fp32"
        )
    if zero_stage == 3 and not hasattr(model, "layers"):
        raise EngineError(
            f"engine.zero_stage=3 divides V4 models, not {type(model).__name__}; use stage 1 or 2"
        )
    if expert_ranks > 1:
        raise EngineError(
            f"engine.expert_ranks={expert_ranks} with engine.kind=deepspeed: ZeRO would add up the gradients "
            "of different experts; use engine.kind=fsdp or torch, or engine.expert_ranks=1"
        )
    if torch.float64 in types:
        raise EngineError(
            "DeepSpeed's masters are fp32, the model has fp64 parameters; use engine.kind=torch"
        )


def check_installed(find: Callable[[str], Any] = importlib.util.find_spec) -> None:
    """EngineError that says how to install DeepSpeed, where it is missing."""
    if find("deepspeed") is None:
        raise EngineError(
            "engine.kind=deepspeed needs DeepSpeed, which is not installed; "
            f"pip install 'deepspeed=={VERSION}', or use engine.kind=torch"
        )


def _join(ranks: Ranks) -> None:
    """DeepSpeed talks through the process group that is open; one process opens one of its own.

    It keeps groups in variables of its modules: those of an earlier stage in this process are gone.
    """
    from deepspeed import comm
    from deepspeed.utils import groups

    if ranks.group is None and not dist.is_initialized():
        backend = "nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    for name, value in (("RANK", ranks.rank), ("LOCAL_RANK", 0), ("WORLD_SIZE", ranks.size)):
        os.environ[name] = str(value)
    groups._release_process_group_references()
    comm.comm.cdb = None
    comm.init_distributed(
        dist.get_backend(), auto_mpi_discovery=False, dist_init_required=False, verbose=False
    )


def _number_from_zero() -> None:
    """ZeRO-3 counts modules and parameters over all engines of a process; ranks compare the numbers.

    A first rank that has trained a stage before and ranks that are new would disagree.
    """
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)
