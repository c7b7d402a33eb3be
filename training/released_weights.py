"""Weights of a folder that was not saved here, released or of transformers, as a model to train from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.released_checkpoint import ReleasedCheckpoint, TensorsOnDisk, open_checkpoint
from consilience.model.released_loading import load_released
from consilience.model.transformer import Transformer


def read_released(folder: Path) -> tuple[Transformer, str]:
    """The model, in the type of its embedding and not quantised, and the digest of its weights.

    CheckpointError as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    load_released(model, checkpoint)
    return model, weights_digest(to_official(model))


def released_digest(folder: Path) -> str:
    """The digest alone: all weights are read, one tensor in memory at a time. CheckpointError as above."""
    checkpoint = open_checkpoint(folder)
    model = empty_model(checkpoint)
    return weights_digest(TensorsOnDisk(checkpoint, {n: t.dtype for n, t in to_official(model).items()}))


def empty_model(checkpoint: ReleasedCheckpoint) -> Transformer:
    """The model without its weights, on the meta device."""
    with torch.device("meta"):
        config = replace(checkpoint.config, expert_dtype=None)  # what is in memory is not quantised
        return Transformer(config, checkpoint.entries["embed.weight"].payload.dtype)
