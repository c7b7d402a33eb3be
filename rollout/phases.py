"""One rollout phase as a trainer sees it: publish the weights, sample, keep what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore


class Sampler(Protocol):
    """What a training loop needs of the rollout workers (`ray_workers.RolloutPool`)."""

    def generate(self, jobs: Sequence[RolloutJob], on_progress: Any = None) -> list[RolloutRecord]: ...

    def publish(self, weights: Mapping[str, Tensor], digest: str, version: int) -> None: ...


def publish(sampler: Sampler, model: nn.Module, version: int) -> int:
    """Give the workers the model's weights under their digest; returns the version."""
    weights = to_official(model)  # type: ignore[arg-type]
    sampler.publish(weights, weights_digest(weights), version)
    return version


def sample_phase(
    store: RolloutStore, step: int, sampler: Sampler, jobs_of: Callable[[int], list[RolloutJob]]
) -> list[RolloutRecord]:
    """The records of phase `step`: those in the store if the run was cut short after sampling, else new ones.

    New records are stored before anything trains on them.
    """
    phase = f"{step:06d}"
    if phase in store.phases():
        return list(store.read(phase))
    records = sampler.generate(jobs_of(step))
    store.append(phase, records)
    return records
