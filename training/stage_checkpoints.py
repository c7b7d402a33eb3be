"""Checkpoints of a running stage: save now and then, resume exactly, leave one at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from consilience.training.checkpoint import (
    CheckpointMeta,
    latest_checkpoint,
    load_checkpoint,
    load_engine_state,
    prune_checkpoints,
    save_checkpoint,
    step_folder,
    v4_format,
)
from consilience.training.engine import TrainEngine


class StageCheckpoints:
    """`checkpoints/step-NNNNNN` of one stage.

    every_s  seconds between two saves while the stage runs (state included)
    meta     what every checkpoint of the stage says of itself; step and cursor are filled in
    """

    def __init__(
        self,
        folder: Path,
        engine: TrainEngine,
        tokenizer: Path,
        meta: CheckpointMeta,
        *,
        every_s: float = 60.0,
    ) -> None:
        self.folder, self.engine, self.tokenizer, self.meta = Path(folder), engine, tokenizer, meta
        self.every_s = every_s
        self._saved_at = time.monotonic()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint into the engine; (finished updates, cursor), (0, {}) without one."""
        newest = latest_checkpoint(self.folder)
        if newest is None:
            return 0, {}
        model, meta = load_checkpoint(newest)
        model_format = v4_format()
        model_format.load_official(self.engine.model, model_format.to_official(model))
        load_engine_state(newest, self.engine)
        return meta.step, dict(meta.cursor)

    def save_if_due(self, step: int, cursor: Mapping[str, Any]) -> None:
        """Save when `every_s` have passed since the last save."""
        if time.monotonic() - self._saved_at >= self.every_s:
            self.save(step, cursor)

    def save(self, step: int, cursor: Mapping[str, Any]) -> Path:
        """Save weights and state now, keeping the two newest."""
        folder = step_folder(self.folder, step)
        meta = replace(self.meta, step=step, cursor=dict(cursor))
        save_checkpoint(folder, self.engine.model, self.tokenizer, meta, self.engine)
        prune_checkpoints(self.folder, keep=2)
        self._saved_at = time.monotonic()
        return folder
