"""One rollout phase as a trainer sees it: publish the weights, sample, keep what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import read_stalls
from consilience.rollout.dispatch import DROPPED
from consilience.rollout.drops import drop_groups, drop_report
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease, fence, take_lease
from consilience.rollout.phase_health import phase_health
from consilience.rollout.publishing import Announced, announce
from consilience.rollout.records import RolloutRecord
from consilience.rollout.store import RolloutStore


@dataclass(frozen=True)
class Durable:
    """Where the work of a phase goes while it is done, so that a crash loses none of it.

    log_folder      token logs of the workers
    keep            called with records as they arrive; they are on the disk when it returns
    survives_power  what the token logs must survive: the machine's end, or only the processes'
    columns_folder  where workers put the per-token fields of long records; None: all travel in the record
    copy_folder     where a second copy of the token logs goes; None: nowhere
    """

    log_folder: Path
    keep: Callable[[Sequence[RolloutRecord]], None]
    survives_power: bool = False
    columns_folder: Path | None = None
    copy_folder: Path | None = None

    def take_lease(self, owner: str) -> Lease:
        """A lease for one worker's stream. EngineError where the folder takes none."""
        return take_lease(
            self.log_folder,
            owner,
            survives_power=self.survives_power,
            columns_folder=self.columns_folder,
            copy_folder=self.copy_folder,
        )

    def fence(self) -> None:
        """End the say of whoever still writes there: it belongs to a driver that is gone."""
        fence(self.log_folder, copy_folder=self.copy_folder)


class Publisher(Protocol):
    """Whoever samples with weights that a trainer publishes."""

    def publish(self, weights: Mapping[str, Tensor], announced: Announced, version: int) -> None: ...


class Sampler(Publisher, Protocol):
    """What a training loop needs of the rollout workers (`ray_workers.RolloutPool`)."""

    def generate(
        self, jobs: Sequence[RolloutJob], on_progress: Any = None, *, durable: Durable | None = None
    ) -> list[RolloutRecord]: ...


def publish(
    sampler: Publisher, weights: Mapping[str, Tensor] | None, version: int, store: RolloutStore
) -> int:
    """Give the workers the weights, by their official names, as a publication; returns the version.

    The publication is in the store before any worker has the weights, so that every token's version can be
    traced to bytes, whoever dies. Errors are those of `PublicationLog.record` and of the sampler.
    weights  None on all ranks of the trainer but the first, who alone publishes
    """
    if weights is None:
        return version
    publication = announce(weights, version, store.quantization)
    store.publications.record(publication)
    sampler.publish(weights, publication, version)
    return version


class OpenPhase:
    """A phase between its first job and its whole file; records enter the store as they arrive.

    missing  jobs without a record; those of a phase that was cut short go on with the tokens their log has
    durable  what the sampler of these jobs needs to keep them
    """

    def __init__(self, store: RolloutStore, step: int, jobs_of: Callable[[int], list[RolloutJob]]) -> None:
        self._store, self._step, self._name = store, step, _name_of(step)
        self._jobs = jobs_of(step)
        store.ledger.issued(step, [job.uid for job in self._jobs])
        self._partial = store.partial(self._name)
        columns = store.columns_folder(self._name)
        logs, copy = store.log_folder(self._name), store.log_copy_folder(self._name)
        self.durable = Durable(logs, self.keep, store.survives_power, columns, copy)
        try:
            store.ledger.stored(self._partial.records)
        except BaseException:
            self.close()
            raise
        known = self._partial.records
        is_barren = len(known) == len(self._jobs) and _is_barren(list(known.values()))
        self._anew = {uid for uid, r in known.items() if is_barren and DROPPED in r.metadata}

    @property
    def missing(self) -> list[RolloutJob]:
        return [j for j in self._jobs if j.uid not in self._partial.records or j.uid in self._anew]

    def keep(self, records: Sequence[RolloutRecord]) -> None:
        """Store these records; on the disk when it returns."""
        self._partial.add(records, again=self._anew)
        self._anew.difference_update(r.uid for r in records)
        self._store.ledger.stored(r.uid for r in records)

    def keep_last(self, records: Sequence[RolloutRecord]) -> None:
        """Store what a call returned that sampled all that was missing.

        EngineError, and what was given up is not stored, where that leaves no group: the next attempt has
        another try.
        """
        made = {record.uid: record for record in records}
        whole = [self._partial.records.get(job.uid) or made[job.uid] for job in self._jobs]
        self._must_have_groups(whole)
        self.keep(records)

    def finish(self) -> list[RolloutRecord]:
        """Its records in job order, once they are the store's file of this phase; groups that lost an
        environment are in the file and not returned. KeyError while one is missing; EngineError, and no file,
        where workers lost samples of every group: the next attempt has another try."""
        records = [self._partial.records[job.uid] for job in self._jobs]
        self._must_have_groups(records)
        self.close()
        self._store.append(self._name, records)
        self._store.clear_partial(self._name)
        return _without_dropped(self._store, self._step, records)

    def _must_have_groups(self, records: list[RolloutRecord]) -> None:
        if _is_barren(records):
            raise EngineError(
                f"step {self._step}: every group has a sample that never came back; see stalls.jsonl and run "
                "again: what has a record is kept, the others are tried anew"
            )

    def close(self) -> None:
        """Leave it as it is, to be gone on with by another process. Safe to call twice."""
        self._partial.close()


def stored_phase(store: RolloutStore, step: int) -> list[RolloutRecord] | None:
    """The records of a phase that was whole when a run was cut short, None for any other."""
    if _name_of(step) not in store.phases():
        return None
    store.clear_partial(_name_of(step))
    records = list(store.read(_name_of(step)))
    store.ledger.issued(step, [r.uid for r in records])
    store.ledger.stored(r.uid for r in records)
    return _without_dropped(store, step, records)


def sample_phase(
    store: RolloutStore, step: int, sampler: Sampler, jobs_of: Callable[[int], list[RolloutJob]]
) -> list[RolloutRecord]:
    """The records of phase `step`: those in the store if the run was cut short after sampling, else new ones.

    New records are stored before anything trains on them, each as it arrives.
    Groups that lost an environment, or a sample for good, are in the store and not among what is returned
    (`drops.py`). EngineError where workers lost samples of every group.
    """
    if (records := stored_phase(store, step)) is not None:
        return records
    phase = OpenPhase(store, step, jobs_of)
    try:
        phase.keep_last(sampler.generate(phase.missing, durable=phase.durable))
        return phase.finish()
    finally:
        phase.close()


def _without_dropped(store: RolloutStore, step: int, records: list[RolloutRecord]) -> list[RolloutRecord]:
    kept, dropped = drop_groups(records)
    for reason, group in dropped.items():
        store.ledger.dropped(step, [r.uid for r in group], reason)
    health = phase_health(records, read_stalls(store.stalls) if store.stalls else ())
    store.health[step] = health | drop_report(step, dropped)
    return kept


def _is_barren(records: list[RolloutRecord]) -> bool:
    """Whether no group is left, and workers have a part in that."""
    return any(DROPPED in r.metadata for r in records) and not drop_groups(records)[0]


def _name_of(step: int) -> str:
    return f"{step:06d}"
