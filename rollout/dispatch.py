"""Which samples of a call are out, done, given out again, given up. No Ray here.

A sample is given out again when its own stage stalled in a worker, or when its worker was lost before it had
said a word about the stream. After `most_redispatches` of these the sample is dropped, and its group with it.
A worker lost in the middle of good work counts against nobody: its samples go on from their logs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import Stall
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.records import FinishReason, Outcome, OutcomeKind, RolloutRecord

STALLED = "stalled"  # metadata key: the Stall of an episode that its worker gave up, JSON-plain
DROPPED = "dropped"  # metadata key: why the sample was given up for good
REDISPATCHES = "redispatches"  # metadata key: how often it was given out again


class Dispatch:
    """The state of one call over `num_slots` workers. EngineError when two jobs share a uid.

    records  by uid; final. pending  by slot: jobs without one
    """

    def __init__(self, jobs: Sequence[RolloutJob], num_slots: int, most_redispatches: int) -> None:
        if len({job.uid for job in jobs}) != len(jobs):
            raise EngineError("two jobs share a uid; uids are unique over a run")
        self._jobs, self._most = jobs, most_redispatches
        self.pending = [{job.uid: job for job in share} for share in split_by_group(jobs, num_slots)]
        self.records: dict[str, RolloutRecord] = {}
        self._lost: Counter[str] = Counter()
        self._dropped: dict[str, str] = {}  # group -> why

    @property
    def num_dropped(self) -> int:
        """Groups that were given up so far."""
        return len(self._dropped)

    def add(self, slot: int, jobs: Sequence[RolloutJob]) -> None:
        """More jobs for a slot, of a call that does not end."""
        self.pending[slot] |= {job.uid: job for job in jobs}

    def take(self, slot: int, batch: Sequence[RolloutRecord]) -> tuple[list[RolloutRecord], list[Stall]]:
        """New final records of a worker, and the stalls that it reported.

        A stalled sample has no record: it stays pending, or `give_up` is due for it.
        """
        new, stalls = [], []
        for record in batch:
            if record.uid not in self.pending[slot]:
                continue
            if STALLED in record.metadata:
                stalls.append(Stall.from_dict(record.metadata[STALLED]))
                continue
            del self.pending[slot][record.uid]
            if times := self._lost[record.uid]:
                record = replace(record, metadata={**record.metadata, REDISPATCHES: times})
            new.append(record)
        self.records |= {record.uid: record for record in new}
        return new, stalls

    def lost(self, slot: int, uids: Sequence[str], why: str) -> tuple[list[str], list[str]]:
        """(to be given out again, dropped) of these pending samples; each was lost once more."""
        out = [uid for uid in uids if uid in self.pending[slot]]
        self._lost.update(out)
        for uid in out:
            if self._lost[uid] > self._most:
                self._dropped.setdefault(self.pending[slot][uid].group, why)
        dropped = [uid for uid in out if self.pending[slot][uid].group in self._dropped]
        for uid in dropped:
            self._drop(slot, uid)
        return [uid for uid in out if uid not in dropped], dropped

    def next_jobs(self, slot: int) -> list[RolloutJob]:
        """What a worker is to get now; samples whose group was dropped meanwhile are not asked for."""
        for uid, job in list(self.pending[slot].items()):
            if job.group in self._dropped:
                self._drop(slot, uid)
        return list(self.pending[slot].values())

    def in_order(self) -> list[RolloutRecord]:
        """One record a job. EngineError when every one was dropped: that is the workers' fault."""
        if self._dropped and all(DROPPED in record.metadata for record in self.records.values()):
            raise EngineError(
                f"all {len(self.records)} samples were given out {self._most + 1} times and never came "
                f"back: {next(iter(self._dropped.values()))}; see stalls.jsonl and the stacks beside it"
            )
        return [self.records[job.uid] for job in self._jobs]

    def _drop(self, slot: int, uid: str) -> None:
        job = self.pending[slot].pop(uid)
        self.records[uid] = dropped_record(job, self._dropped[job.group], self._lost[uid])


def dropped_record(job: RolloutJob, why: str, num_redispatches: int = 0) -> RolloutRecord:
    """The record of a sample that was given up: no tokens, no reward, the reason in its metadata."""
    return RolloutRecord(
        uid=job.uid,
        group=job.group,
        domain=job.domain,
        effort=job.effort,
        teacher=job.teacher,
        prompt_ids=(),
        token_ids=(),
        logprobs=(),
        loss_mask=(),
        weight_version=(),
        finish=FinishReason.ABORT,
        outcome=Outcome(OutcomeKind.INFRA, f"dropped: {why}"[:300]),
        metadata={DROPPED: why[:200], REDISPATCHES: num_redispatches},
    )


def split_by_group(jobs: Sequence[RolloutJob], num_shares: int) -> list[list[RolloutJob]]:
    """Shares of about equal token budgets; a group stays together, so that its prefill is shared.

    Larger groups are placed first, each with the least loaded share; job order is kept inside a share.
    """
    costs: dict[str, int] = {}
    for job in jobs:
        costs[job.group] = costs.get(job.group, 0) + job.max_tokens
    loads = [0] * num_shares
    share_of: dict[str, int] = {}
    for group in sorted(costs, key=lambda g: -costs[g]):
        share_of[group] = min(range(num_shares), key=lambda s: loads[s])
        loads[share_of[group]] += costs[group]
    shares: list[list[RolloutJob]] = [[] for _ in range(num_shares)]
    for job in jobs:
        shares[share_of[job.group]].append(job)
    return shares
