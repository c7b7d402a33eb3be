"""How a model becomes config and tensors and back: V4's own, and a dense one of transformers.

Models are imported where they are needed, so that reading a checkpoint's meta stays light.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError


@dataclass(frozen=True)
class ModelFormat:
    """How a model becomes config and tensors and back; `format_of` chooses.

    to_official    its tensors, in its own memory
    load_official  copies such tensors into it
    check          CheckpointError if what was read into it cannot be computed with
    """

    config_dict: Callable[[nn.Module], dict[str, Any]]
    build: Callable[[Mapping[str, Any], torch.dtype], nn.Module]
    to_official: Callable[[nn.Module], dict[str, Tensor]]
    load_official: Callable[[nn.Module, Mapping[str, Tensor]], None]
    check: Callable[[nn.Module], None]
    digest: Callable[[Mapping[str, Tensor]], str]


def v4_format() -> ModelFormat:
    """The V4 `Transformer`."""
    from consilience.model.checkpoint import check_hash_tables, load_official, to_official
    from consilience.model.config import ModelConfig
    from consilience.model.digest import weights_digest
    from consilience.model.transformer import Transformer

    return ModelFormat(
        config_dict=lambda model: model.config.to_json_dict(),  # type: ignore[union-attr, operator]
        build=lambda row, dtype: Transformer(ModelConfig.from_json_dict(row), dtype),
        to_official=to_official,  # type: ignore[arg-type]
        load_official=load_official,  # type: ignore[arg-type]
        check=check_hash_tables,  # type: ignore[arg-type]
        digest=weights_digest,
    )


def dense_format() -> ModelFormat:
    """A `DenseModel`, under the names of its own checkpoint."""
    from consilience.model.dense import DenseModel
    from consilience.model.digest import weights_digest

    return ModelFormat(
        config_dict=lambda model: model.config.to_json_dict(),  # type: ignore[union-attr, operator]
        build=DenseModel,
        to_official=lambda model: dict(model.state_dict()),
        load_official=_load,
        check=lambda model: model.check(),  # type: ignore[operator]
        digest=weights_digest,
    )


def format_of(row: Mapping[str, Any]) -> ModelFormat:
    """That of the model which a config.json describes."""
    from consilience.model.dense import is_dense

    return dense_format() if is_dense(row) else v4_format()


def format_for(model: nn.Module) -> ModelFormat:
    """That of a model in memory."""
    from consilience.model.dense import DenseModel

    return dense_format() if isinstance(model, DenseModel) else v4_format()


def _load(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"these tensors are not those of the model: {error}") from error
