"""One rollout phase as a trainer sees it: publish the weights, sample, keep what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from consilience.conf.errors import EngineError
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.rollout.deadlines import read_stalls
from consilience.rollout.dispatch import drop_groups
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phase_health import phase_health
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

    New records are stored before anything trains on them, each as it arrives: a phase that was cut short goes
    on with the jobs that have no record yet, and those with the tokens that their log has.
    Samples that were dropped are in the store with their reason; they and their groups are not returned.
    EngineError where that leaves nothing.
    """
    phase = f"{step:06d}"
    if phase in store.phases():
        store.clear_partial(phase)
        records = list(store.read(phase))
        store.ledger.issued(step, [r.uid for r in records])
        store.ledger.stored(r.uid for r in records)
        return _without_dropped(store, step, records)
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
        made = {r.uid: r for r in sampler.generate(missing, durable=durable)}
        records = [partial.records.get(job.uid) or made[job.uid] for job in jobs]
        if jobs and not drop_groups(records)[0]:
            raise EngineError(
                f"step {step}: every group has a sample that never came back; see stalls.jsonl and run "
                "again: what has a record is kept, the others are tried anew"
            )
        keep(records)
    finally:
        partial.close()
    store.append(phase, records)
    store.clear_partial(phase)
    return _without_dropped(store, step, records)


def _without_dropped(store: RolloutStore, step: int, records: list[RolloutRecord]) -> list[RolloutRecord]:
    store.health = phase_health(records, read_stalls(store.stalls) if store.stalls else ())
    kept, dropped = drop_groups(records)
    store.ledger.dropped(step, [r.uid for r in dropped])
    return kept
