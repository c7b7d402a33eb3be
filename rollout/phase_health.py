"""What went wrong in one rollout phase and was mended, as numbers for its metrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from consilience.rollout.deadlines import REDISPATCHED, Stall, num_stalls, stalls_of
from consilience.rollout.drops import drop_groups
from consilience.rollout.records import RolloutRecord

HEALTH = (
    "stalls",
    "redispatches",
    "dropped_samples",
    "dropped_groups",
    "resumed_samples",
    "resumed_tokens",
    "log_faults",
)
"""Names of the numbers; all are 0 in a phase that nobody disturbed."""


def phase_health(records: Sequence[RolloutRecord], stalls: Iterable[Stall]) -> dict[str, float]:
    """By the names of `HEALTH`. `records` are all of the phase, dropped ones too; `stalls` may be the run's.

    stalls            waits over their limit that samples of the phase were in
    redispatches      samples that such a wait had given out again, each time counted
    dropped_…         samples without a record, with the rest of their groups
    resumed_…         samples that another worker went on with, and the tokens they had
    log_faults        samples whose token log was damaged
    """
    own = stalls_of(stalls, [record.uid for record in records])
    uids = {record.uid for record in records}
    dropped = [record for group in drop_groups(records)[1].values() for record in group]
    resumed = [r.metadata["resumed_at"] for r in records if "resumed_at" in r.metadata]
    again = [len(uids.intersection(stall.uids)) for stall in own if stall.action == REDISPATCHED]
    numbers = (
        num_stalls(own),
        sum(again),
        len(dropped),
        len({record.group for record in dropped}),
        len(resumed),
        sum(resumed),
        sum("log_fault" in record.metadata for record in records),
    )
    return dict(zip(HEALTH, map(float, numbers), strict=True))
