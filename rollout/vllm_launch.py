"""A vLLM engine for a rollout worker: what it starts from, what proves it, how weights reach its layout."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.model.config import ModelConfig
from consilience.model.dense import build_causal, is_dense
from consilience.model.initialize import initialize
from consilience.model.release import Source, from_model, write_release
from consilience.model.transformer import Transformer
from consilience.rollout.vllm_engine import VllmEngine
from consilience.rollout.vllm_reference import reference_of
from consilience.rollout.vllm_settings import V4

PROBE_LENGTHS = (12, 60, 140, 300)  # across V4's window of 128 and its compression by 4 and by 128
Export = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


def launch(
    model: Mapping[str, Any],
    *,
    max_rows: int,
    max_length: int,
    checkpoint: str | None = None,
    max_mismatch: float = 0.35,
    settings: Mapping[str, Any] | None = None,
    record: str | None = None,
    records_routing: bool = False,
) -> VllmEngine:
    """An engine over `checkpoint`, or over random weights of the model that `model` describes.

    model       config.json fields; of no use where a checkpoint is given
    checkpoint  folder in a layout that vLLM reads; any causal language model that vLLM serves
    max_mismatch, settings, record, records_routing  see `VllmEngine`
    """
    with tempfile.TemporaryDirectory(prefix="vllm-start-") as made:
        folder = Path(checkpoint or made)
        if checkpoint is None:
            _write_start(folder, model)
        row = json.loads((folder / "config.json").read_text())
        return VllmEngine(
            folder,
            max_rows=max_rows,
            max_length=max_length,
            probes=probe_sequences(int(row["vocab_size"]), max_length),
            reference=reference_of(folder),
            max_mismatch=max_mismatch,
            export=v4_export(ModelConfig.from_json_dict(row)) if row["architectures"] == [V4] else None,
            settings=settings,
            record=None if record is None else Path(record),
            records_routing=records_routing,
        )


def _write_start(folder: Path, row: Mapping[str, Any]) -> None:
    """Random weights for vLLM to start from, in the layout that it reads."""
    if is_dense(row):
        build_causal(row).save_pretrained(folder)
    else:
        config = ModelConfig.from_json_dict(row)
        write_release(folder, from_model(initialize(Transformer(config), seed=0)))


def probe_sequences(vocab_size: int, max_length: int) -> list[list[int]]:
    """Random token ids, the same at every call; no longer than the engine holds with a token behind them."""
    generator = torch.Generator().manual_seed(5)
    lengths = sorted({min(length, max_length - 1) for length in PROBE_LENGTHS})
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]


def v4_export(config: ModelConfig) -> Export:
    """Published weights (released names, nothing quantised) -> the released FP8 and packed FP4 tensors.

    The quantiser is the one of training (`model/number_formats.py`): a model trained with it loses nothing.
    The tensors stay in memory, in a file that is gone with them.
    """

    def export(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        source = Source(config, shapes, lambda name, first, last: weights[name][first:last].cpu())
        with tempfile.TemporaryDirectory(prefix="vllm-update-") as made:
            write_release(Path(made), source, experts=config.expert_dtype)
            files = sorted(Path(made).glob("*.safetensors"))
            return {name: t.clone() for file in files for name, t in load_file(file).items()}

    return export
