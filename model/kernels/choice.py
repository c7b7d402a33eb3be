"""Which code serves an operation: its Triton kernel on a GPU, its plain twin everywhere else.

Kernels live in files named `triton_*`, beside the twin that defines them; only those files import Triton.
Under Triton's interpreter (TRITON_INTERPRET=1, set before the first import) tests run them on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from consilience.model import exact


def uses_triton(*tensors: Tensor | None) -> bool:
    """`can_use_triton`, and exact mode is off."""
    return not exact.is_on() and can_use_triton(*tensors)


def can_use_triton(*tensors: Tensor | None) -> bool:
    """True if all tensors lie on a CUDA device of compute capability 8 or above, none is fp64 and Triton is
    installed. None stands for an argument that was not given."""
    given = [t for t in tensors if t is not None]
    if not all(t.is_cuda and t.dtype != torch.float64 for t in given):
        return False
    return _is_installed() and _is_capable(given[0].device.index or 0)


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_capable(index: int) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 8
