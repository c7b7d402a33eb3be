"""Problems to rollout jobs: which problems, uids, groups, seeds, tools."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from consilience.conf.schema import Config
from consilience.rollout.engine import SamplingParams
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.tools import TOOLS
from consilience.tasks.domain import Domain, Problem


def seed_of(run_seed: int, uid: str) -> int:
    """63-bit seed of one sample: a function of the run's seed and its uid alone."""
    return (
        int.from_bytes(hashlib.blake2b(f"{run_seed}/{uid}".encode(), digest_size=8).digest(), "little") >> 1
    )


def rollout_jobs(
    domain: Domain,
    problems: Sequence[Problem],
    *,
    prefix: str,
    samples: int,
    temperature: float,
    run_seed: int,
    teacher: str | None = None,
    is_graded: bool = True,
    cut: Mapping[str, Any] | None = None,
) -> list[RolloutJob]:
    """`samples` jobs for each problem; uid "<prefix>/<n>/<sample>", group "<prefix>/<n>".

    n counts the problems of this call. Ungraded jobs (distillation) name no reward.
    cut: top_k, top_p, min_p of the sampling, where given.
    """
    jobs = []
    common = SamplingParams(temperature, domain.max_tokens, **(cut or {}))
    for n, problem in enumerate(problems):
        group = f"{prefix}/{n}"
        declared = [t["function"]["name"] for m in problem.messages for t in m.get("tools") or ()]
        for sample in range(samples):
            uid = f"{group}/{sample}"
            jobs.append(
                RolloutJob(
                    uid=uid,
                    group=group,
                    domain=domain.name,
                    effort=domain.effort,
                    messages=problem.messages,
                    teacher=teacher,
                    metadata={**problem.metadata, "problem": problem.id},
                    files=problem.files,
                    reward=domain.reward if is_graded else "",
                    max_turns=domain.max_turns,
                    max_tokens=domain.max_tokens,
                    tools=tuple(name for name in declared if name in TOOLS),
                    sampling=replace(common, seed=seed_of(run_seed, uid)),
                    needs_sandbox=domain.needs_sandbox and is_graded,
                    user_turns=problem.user_turns,
                    branches=problem.branches,
                )
            )
    return jobs


def fresh_problems(cfg: Config, domain: Domain, num: int, step: int) -> list[Problem]:
    """Training problems of one phase, after those whose solutions base and SFT have seen, then around again.

    Where the training split ends before that, from its beginning.
    """
    first = max(cfg.base.num_examples, cfg.sft.num_examples)
    room = cfg.task.num_train - first
    if room < num:
        first, room = 0, max(cfg.task.num_train, num)
    return domain.problems("train", num, start=first + step * num % (room - num + 1))
