"""The checkpoints of one stage: a folder for each number of updates, the newest, and which may go."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from consilience.training.durable_files import restore_folder

_STEP = re.compile(r"step-(\d{6,})")


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` updates: step-000040."""
    return Path(checkpoints) / f"step-{step:06d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the most updates under a stage's `checkpoints/`, None when there is none."""
    checkpoints = Path(checkpoints)
    if not checkpoints.is_dir():
        return None
    for aside in checkpoints.glob(".step-*.replaced"):
        restore_folder(checkpoints / aside.name.removeprefix(".").removesuffix(".replaced"))
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _STEP.fullmatch(p.name)) and p.is_dir()]
    return max(found)[1] if found else None


def prune_checkpoints(checkpoints: Path, keep: int, points_every: int = 0) -> None:
    """Remove all but the `keep` (at least 1) latest step folders, and as many latest rollback points.

    points_every  rollback points are the multiples of so many steps; 0: there are none
    """
    found = _step_folders(checkpoints)
    points = [step for step in found if points_every and step % points_every == 0]
    kept = {*list(found)[-max(keep, 1) :], *points[-max(keep, 1) :]}
    for step, folder in found.items():
        if step not in kept:
            _remove(folder)


def remove_later_checkpoints(checkpoints: Path, step: int) -> None:
    """Remove the step folders of more than `step` updates, latest first."""
    for later, folder in reversed(_step_folders(checkpoints).items()):
        if later > step:
            _remove(folder)


def _step_folders(checkpoints: Path) -> dict[int, Path]:
    """Updates -> folder, ascending."""
    named = ((_STEP.fullmatch(p.name), p) for p in Path(checkpoints).iterdir())
    return dict(sorted((int(found[1]), p) for found, p in named if found))


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")  # a half-removed folder is debris
    os.rename(folder, doomed)
    shutil.rmtree(doomed)
