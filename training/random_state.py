"""The state of every global random generator, as tensors, for exact resume."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.training.tensor_files import as_bytes, as_bytes_tensor


def random_state_tensors() -> dict[str, Tensor]:
    """rng.{torch, numpy, python, cuda.<i>} -> uint8 tensors (numpy's and python's state as JSON)."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    numpy_state = [str(kind), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)]
    tensors = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": as_bytes_tensor(json.dumps(numpy_state).encode()),
        "rng.python": as_bytes_tensor(json.dumps(random.getstate()).encode()),
    }
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"rng.cuda.{index}"] = state
    return tensors


def restore_random_state(tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `random_state_tensors`; states of devices this machine lacks are left out.

    CheckpointError when a state is missing or does not read; nothing is restored then.
    """
    try:
        torch_state = tensors["rng.torch"]
        kind, keys, position, has_gauss, gauss = json.loads(as_bytes(tensors["rng.numpy"]))
        numpy_state = (kind, np.asarray(keys, np.uint32), position, has_gauss, gauss)
        version, internal, next_gauss = json.loads(as_bytes(tensors["rng.python"]))
        random.Random().setstate((version, tuple(internal), next_gauss))  # raises before anything is set
        np.random.RandomState().set_state(numpy_state)
        torch.set_rng_state(torch_state)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"random state cannot be restored ({type(error).__name__}: {error}); remake the checkpoint"
        ) from error
    np.random.set_state(numpy_state)
    random.setstate((version, tuple(internal), next_gauss))
    for index in range(torch.cuda.device_count()):
        if f"rng.cuda.{index}" in tensors:
            torch.cuda.set_rng_state(tensors[f"rng.cuda.{index}"], index)
