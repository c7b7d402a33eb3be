"""Stored rollouts of an earlier stage, trained on again with another loss or other weights.

The states of its teachers are read from its store (`distill.keep_states=true` left them), so nothing is
sampled and no teacher is loaded.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from consilience.conf.errors import ConfigError, RunError
from consilience.rollout.store import RolloutStore

STATES = "hidden_states"
"""Folder of a distillation stage in which its states are."""


def replay_phases(stage: Path, store: RolloutStore, num_phases: int) -> int:
    """Give `store` the first phases of another stage's rollouts, as if they had been sampled; how many.

    Phases that it has already, and those that are of no use, are left alone. ConfigError if the stage has
    no rollouts or too few, RunError if they cannot be copied.
    """
    earlier = RolloutStore(stage / "rollouts")
    names = earlier.phases()[:num_phases]
    if len(names) < num_phases:
        raise ConfigError(
            f"distill.replay is '{stage}', which has {len(names)} phases of rollouts, but distill.steps is "
            f"{num_phases}; name a stage folder with as many, or lower distill.steps"
        )
    present = set(store.phases())
    missing = [name for name in names if name not in present]
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
        for name in missing:
            columns, own = earlier.columns_folder(name), store.columns_folder(name)
            if columns.is_dir():
                shutil.copytree(columns, own, dirs_exist_ok=True)
            beside = store.folder / f".{name}.jsonl.{os.getpid()}"
            shutil.copyfile(earlier.folder / f"{name}.jsonl", beside)
            os.replace(beside, store.folder / f"{name}.jsonl")
    except OSError as error:
        raise RunError(f"rollouts of {stage} cannot be copied: {error.strerror or error}") from error
    return len(missing)
