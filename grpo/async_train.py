"""GRPO that samples ahead: the workers decode while the trainer learns, and no token is older than `max_age`.

    one step off   weights change when nothing is being sampled: each phase is sampled whole by one version,
                   but one that a resumed run found open is finished with that run's version
    asynchronous   weights change between two engine steps: requests go on with the new ones, and each token
                   carries the version that sampled it

The loss needs no other form: the old log-probabilities of its ratio are the sampler's, recorded token by
token under the version that drew it. Step p trains on phase p; at a max_age of 0 this is `train.py`'s run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from consilience.grpo.train import GrpoStage
from consilience.rollout.ahead import PhasesAhead, PhasesElsewhere, RolloutStreams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.phases import publish
from consilience.training.engine import official_weights


def train_grpo_ahead(
    stage: GrpoStage,
    streams: RolloutStreams,
    jobs_of: Callable[[int], list[RolloutJob]],
    *,
    max_age: int,
    is_whole: bool = False,
    start: int = 0,
) -> dict[str, Any]:
    """Run the steps from `start`; returns what `train_grpo` does, and may be cut short as that may.

    Of several ranks the first alone samples; `streams` and `jobs_of` of the others are not looked at.

    max_age   oldest token a step trains on, in versions; jobs are admitted accordingly, none is discarded
    is_whole  publish only when nothing is being sampled (one step off, with a max_age of 1)
    """
    clock, engine, ranks = stage.clock, stage.engine, stage.engine.ranks
    phases: PhasesAhead | PhasesElsewhere = PhasesElsewhere()
    if ranks.is_first:
        stage.store.ledger.resumed(start)
        num_steps = stage.settings.steps
        phases = PhasesAhead(stage.store, streams, jobs_of, start=start, num_steps=num_steps, max_age=max_age)
    try:
        version = publish(streams, official_weights(engine), start, stage.store)
        phases.admit(version)
        for step in range(start, stage.settings.steps):
            with clock.phase("wait"):
                records = ranks.first(phases.take, step)
            report = stage.learn(step, records)
            if is_whole:
                with clock.phase("wait"):
                    phases.complete_all()
            with clock.phase("publish"):
                version = publish(streams, official_weights(engine), version + 1, stage.store)
            phases.admit(version)
            stage.note(step, records, report)
    finally:
        phases.close()
    return stage.summary()
