"""Groups that leave training because they lost an environment or a sample (post-training notes 9.3, 9.2).

A box that dies does not look at the reward, but an episode with more calls is exposed to it for longer. To
leave out that sample alone would select the short ones of its group and move the group's mean, so the whole
group goes, and a kept group is what was sampled. Between groups the exposure still counts: `dropped_length`
beside `length` shows by how much. What goes is a function of the records: a resumed run drops the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from consilience.rollout.dispatch import DROPPED
from consilience.rollout.records import OutcomeKind, RolloutRecord

_LOG = logging.getLogger(__name__)


def why_dropped(record: RolloutRecord) -> str:
    """Why this sample takes its group out of training, "" if it does not."""
    if why := record.metadata.get(DROPPED):
        return f"{record.uid}: never came back: {why}"[:300]
    if record.outcome.kind in (OutcomeKind.LOST, OutcomeKind.UNKNOWN):
        return f"{record.uid}: {record.outcome.kind.value}: {record.outcome.detail}"[:300]
    return ""


def drop_groups(
    records: Sequence[RolloutRecord],
) -> tuple[list[RolloutRecord], dict[str, list[RolloutRecord]]]:
    """(kept, {reason: samples}): a group with a lost environment goes as a whole; the first loss says why."""
    reasons: dict[str, str] = {}  # group -> why
    for record in records:
        if why := why_dropped(record):
            reasons.setdefault(record.group, why)
    dropped: dict[str, list[RolloutRecord]] = {}
    for record in records:
        if record.group in reasons:
            dropped.setdefault(reasons[record.group], []).append(record)
    return [record for record in records if record.group not in reasons], dropped


def drop_report(step: int, dropped: dict[str, list[RolloutRecord]]) -> dict[str, float]:
    """Numbers for the metrics, and a line in the log for each group.

    dropped_groups, dropped_samples   what left training
    lost_environments, unknown_calls  samples that were the reason: box gone or none to be had; a call whose
                                      result nobody knows
    dropped_length                    sampled tokens of a dropped sample, mean; only where there are any
    """
    samples = [record for group in dropped.values() for record in group]
    kinds = [record.outcome.kind for record in samples]
    report = {
        "dropped_groups": float(len(dropped)),
        "dropped_samples": float(len(samples)),
        "lost_environments": float(kinds.count(OutcomeKind.LOST)),
        "unknown_calls": float(kinds.count(OutcomeKind.UNKNOWN)),
    }
    if samples:
        report["dropped_length"] = sum(r.num_sampled for r in samples) / len(samples)
    for reason, group in dropped.items():
        _LOG.warning("step %d: group %s of %d samples dropped: %s", step, group[0].group, len(group), reason)
    return report
