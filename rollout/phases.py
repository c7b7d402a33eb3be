"""One rollout phase as a trainer sees it: publish the weights, sample, keep what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from consilience.model.checkpoint import to_official
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.publishing import Announced, announce
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore


@dataclass(frozen=True)
class Durable:
    """Where the work of a phase goes while it is done, so that a crash loses none of it.

    log_folder      token logs of the workers
    keep            called with records as they arrive; they are on the disk when it returns
    survives_power  what the token logs must survive: the machine's end, or only the processes'
    """

    log_folder: Path
    keep: Callable[[Sequence[RolloutRecord]], None]
    survives_power: bool = False


class Sampler(Protocol):
    """What a training loop needs of the rollout workers (`ray_workers.RolloutPool`)."""

    def generate(
        self, jobs: Sequence[RolloutJob], on_progress: Any = None, *, durable: Durable | None = None
    ) -> list[RolloutRecord]: ...

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None: ...


def publish(sampler: Sampler, model: nn.Module, version: int, store: RolloutStore) -> int:
    """Give the workers the model's weights as a publication; returns the version.

    The publication is in the store before any worker has the weights, so that every token's version can be
    traced to bytes, whoever dies. Errors are those of `PublicationLog.record` and of the sampler.
    """
    weights = to_official(model)  # type: ignore[arg-type]
    publication = announce(weights, version, store.quantization)
    store.publications.record(publication)
    sampler.publish(weights, publication, version)
    return version


def sample_phase(
    store: RolloutStore, step: int, sampler: Sampler, jobs_of: Callable[[int], list[RolloutJob]]
) -> list[RolloutRecord]:
    """The records of phase `step`: those in the store if the run was cut short after sampling, else new ones.

    New records are stored before anything trains on them, each as it arrives: a phase that was cut short goes
    on with the jobs that have no record yet, and those with the tokens that their log has.
    """
    phase = f"{step:06d}"
    if phase in store.phases():
        store.clear_partial(phase)
        records = list(store.read(phase))
        store.ledger.issued(step, [r.uid for r in records])
        store.ledger.stored(r.uid for r in records)
        return records
    jobs = jobs_of(step)
    store.ledger.issued(step, [job.uid for job in jobs])
    partial = store.partial(phase)
    try:
        store.ledger.stored(partial.records)
        missing = [job for job in jobs if job.uid not in partial.records]

        def keep(records: Sequence[RolloutRecord]) -> None:
            partial.add(records)
            store.ledger.stored(r.uid for r in records)

        durable = Durable(store.log_folder(phase), keep, store.survives_power)
        keep(sampler.generate(missing, durable=durable))
        records = [partial.records[job.uid] for job in jobs]
    finally:
        partial.close()
    store.append(phase, records)
    store.clear_partial(phase)
    return records
