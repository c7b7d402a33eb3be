"""Named tensors in safetensors files: shards with an index, and errors that name file and tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.shards import INDEX, Stored


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file. Tensors are brought to the CPU, contiguous, sharing no memory."""
    save_file(
        {name: _own_memory(tensor) for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one file. CheckpointError when it is missing, truncated or not safetensors."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is not complete, restore or remake it")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged, "
            "restore or remake it"
        ) from error


def shards(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(file name, its tensors) in the order given; a shard is over the limit only if one tensor is."""
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    for number, group in enumerate(groups, 1):
        yield f"model-{number:05d}-of-{len(groups):05d}.safetensors", group


def index_text(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """The index file: which shard holds which tensor."""
    return json.dumps({"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}, indent=1)


def check_tensors(folder: Path, stored: Mapping[str, Stored], expected: Mapping[str, Tensor]) -> None:
    """CheckpointError unless names, shapes and types are those of `expected`; says file and tensor."""
    for name in sorted(expected.keys() - stored.keys()):
        raise CheckpointError(
            f"{folder / INDEX}: tensor {name} is missing, config.json asks for it with shape "
            f"{list(expected[name].shape)}; the weights belong to another model"
        )
    for name in sorted(stored.keys() - expected.keys()):
        raise CheckpointError(
            f"{stored[name].file}: tensor {name} is unexpected, the model of config.json has none "
            "of that name; the weights belong to another model"
        )
    for name, tensor in stored.items():
        wanted = expected[name]
        if tensor.shape != tuple(wanted.shape):
            raise CheckpointError(
                f"{stored[name].file}: tensor {name} has shape {list(tensor.shape)}, the model of "
                f"config.json needs {list(wanted.shape)}; the weights belong to another model"
            )
        if tensor.dtype != wanted.dtype:
            raise CheckpointError(
                f"{stored[name].file}: tensor {name} has type {_dtype(tensor.dtype)}, the model of "
                f"config.json needs {_dtype(wanted.dtype)}; convert the weights first"
            )


def _own_memory(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if (
        tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    ):
        return tensor
    return tensor.to("cpu", copy=True).contiguous()


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def as_bytes_tensor(data: bytes) -> Tensor:
    """Bytes as a uint8 tensor [n]: how small non-tensor state travels in a safetensors file."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """Inverse of `as_bytes_tensor`."""
    return tensor.to("cpu").numpy().tobytes()
