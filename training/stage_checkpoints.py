"""Checkpoints of a running stage: save now and then, resume exactly, leave one at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.training.checkpoint import (
    CheckpointMeta,
    load_engine_state,
    load_weights,
    read_stage_tensors,
    save_checkpoint,
)
from consilience.training.engine import TrainEngine
from consilience.training.step_folders import (
    latest_checkpoint,
    prune_checkpoints,
    remove_later_checkpoints,
    step_folder,
)


class StageCheckpoints:
    """`checkpoints/step-NNNNNN` of one stage. Every rank makes the same calls; the first one's clock counts.

    every_s       seconds between two saves while the stage runs (state included)
    points_every  updates between two rollback points, saves at steps that do not depend on the clock;
                  0: none. The newest two are kept, so that a run cut short can go back as far as before
    meta          what every checkpoint of the stage says of itself; step and cursor are filled in
    tensors       the stage's own tensors of the checkpoint loaded last
    """

    def __init__(
        self,
        folder: Path,
        engine: TrainEngine,
        tokenizer: Path,
        meta: CheckpointMeta,
        *,
        every_s: float = 60.0,
        points_every: int = 0,
    ) -> None:
        self.folder, self.engine, self.tokenizer, self.meta = Path(folder), engine, tokenizer, meta
        self.ranks = engine.ranks
        self.every_s, self.points_every = every_s, points_every
        self.tensors: dict[str, Tensor] = {}
        self._saved_at = time.monotonic()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest checkpoint into the engine; (finished updates, cursor), (0, {}) without one."""
        newest = self.ranks.broadcast(latest_checkpoint(self.folder) if self.ranks.is_first else None)
        return (0, {}) if newest is None else self._load(newest)

    def go_back(self, step: int) -> tuple[int, dict[str, Any]]:
        """Load the rollback point before the last one at or before `step`, or the stage's first.

        It lies one to two times `points_every` updates back. Later checkpoints are removed. CheckpointError
        where there is none.
        """
        point = max(0, (step // self.points_every - 1) * self.points_every)
        found = self._load(step_folder(self.folder, point))
        self.ranks.barrier()  # none reads any more
        if self.ranks.is_first:
            remove_later_checkpoints(self.folder, point)
        return found

    def save_if_due(
        self, step: int, cursor: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save at a rollback point, or when `every_s` have passed since the last save."""
        is_point = self.points_every > 0 and step % self.points_every == 0
        is_due = is_point or time.monotonic() - self._saved_at >= self.every_s
        if self.ranks.broadcast(is_due):
            self.save(step, cursor, tensors)

    def save(self, step: int, cursor: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Path:
        """Save weights and state now, keeping the two newest and the two newest rollback points."""
        folder = step_folder(self.folder, step)
        meta = replace(self.meta, step=step, cursor=dict(cursor))
        save_checkpoint(folder, self.engine.model, self.tokenizer, meta, self.engine, stage_tensors=tensors)
        if self.ranks.is_first:
            prune_checkpoints(self.folder, keep=2, points_every=self.points_every)
        self._saved_at = time.monotonic()
        return folder

    def _load(self, folder: Path) -> tuple[int, dict[str, Any]]:
        meta = load_weights(folder, self.engine)
        load_engine_state(folder, self.engine)
        self.tensors = read_stage_tensors(folder)
        return meta.step, dict(meta.cursor)
