"""Which checkpoint family's prompts a model gets: the one it was released in (v4_model.md 13.3)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from consilience.conf.errors import ConfigError
from consilience.conf.schema import Config
from consilience.rollout.prompts import checkpoint_family
from consilience.rollout.protocol import EFFORT_PREFIXES
from consilience.tasks.domain import Domain
from consilience.training.checkpoint import CheckpointMeta

NEW_MODEL = "official"
"""Family of a model that starts from random weights, unless `task.family` names another."""


def prompt_family(
    cfg: Config, folder: Path, meta: CheckpointMeta | None, domains: Iterable[Domain] = ()
) -> str:
    """ "preview" or "official", for the model of a checkpoint folder and whatever is trained from it.

    meta     that of the folder; None for a model from random weights. What it says was handed down from
             the released checkpoint that training began with; where it says nothing, the encoder that
             lies in the folder does, and without one `task.family` has to
    domains  whose prompts will be written
    CheckpointError if nobody says. ConfigError if `task.family` says otherwise, or for a domain whose
    effort the family does not have.
    """
    given = cfg.task.family
    if meta is None:
        family = given or NEW_MODEL
    elif meta.family is not None:
        family = meta.family
    else:
        family = given if given and not (folder / "encoding").is_dir() else checkpoint_family(folder)
    if given not in (None, family):
        raise ConfigError(
            f"task.family is {given}, but the checkpoint {folder} is of the {family} family; leave it out"
        )
    for domain in domains:
        if domain.effort not in EFFORT_PREFIXES[family]:
            raise ConfigError(
                f"task.domains.{domain.name}.effort is {domain.effort}, which the {family} family of "
                f"checkpoints does not have; take one of {', '.join(EFFORT_PREFIXES[family])}"
            )
    return family
