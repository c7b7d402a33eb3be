"""Checkpoints for a model cut over ranks: none of them ever has all weights, on its host or its device.

A model is made of shapes alone, then cut, then each rank reads from the files what it has of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from consilience.model.dense import is_dense
from consilience.model.quantization import Quantization
from consilience.model.ranks import Ranks
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.shards import read_folder
from consilience.training.checkpoint import (
    CONFIG,
    META,
    STATE,
    CheckpointMeta,
    check_weights,
    load_checkpoint,
    main_dtype,
    read_config,
    read_meta,
    verify_files,
)
from consilience.training.fsdp_checkpoint import read_weights
from consilience.training.fsdp_model import cut_model
from consilience.training.model_format import format_of
from consilience.training.released_weights import empty_model, released_digest
from consilience.training.tensor_files import check_tensors


def model_to_cut(
    folder: Path, ranks: Ranks, *, verify: bool = True, reads_released: bool = False
) -> tuple[nn.Module, CheckpointMeta]:
    """A checkpoint's model without its weights (on the meta device, of their types), and its meta.

    All ranks call it. `verify` checks what `load_checkpoint` does, the weights on the first rank alone;
    CheckpointError on all. Weights are still to be read when the model is cut (`CutEngine.read_weights`).
    A folder that was not saved here has its weights converted as they are read: its model comes whole, unless
    the engine `reads_released` ones part by part, too. Dense models come whole.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file() and not (folder / META).is_file():
        if not reads_released or is_dense(read_config(folder)):
            return load_checkpoint(folder)
        digest = ranks.first(released_digest, folder) if verify else ""
        return empty_model(open_checkpoint(folder)), CheckpointMeta(
            "released", 0, 0, family=None, digest=digest
        )
    meta, config = read_meta(folder), read_config(folder)
    if is_dense(config):
        return load_checkpoint(folder, verify=verify)
    stored, model_format = read_folder(folder), format_of(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = model_format.build(config, getattr(torch, main_dtype(stored)))
    check_tensors(folder, stored, model_format.to_official(model))
    if verify:
        check_weights(folder, meta, ranks)
        verify_files(folder, {n: d for n, d in meta.files.items() if not n.startswith(f"{STATE}/")})
    return model, meta


def cut_reference(folder: Path, ranks: Ranks, quantization: str = "off") -> nn.Module:
    """A checkpoint's model that learns nothing, cut over the ranks; they run its forwards together.

    quantization  how it computes, by `Quantization.from_name`
    Embedding and head stay gathered from its first forward on. All ranks call it.
    """
    model, _ = model_to_cut(folder, ranks, verify=False)
    is_empty = next(model.parameters()).is_meta
    model.quantize(Quantization.from_name(quantization))  # type: ignore[operator]
    cut_model(model.requires_grad_(False), ranks)
    if is_empty:
        read_weights(folder, model, ranks)
    return model
