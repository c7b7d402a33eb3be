"""Quick instructions of a job: short side answers on the stream that is there anyway (report 5.1.2, table 5).

    …<｜User｜>{p} ─┬─ <｜query｜> …   and authority, domain, action
                    ├─ <｜domain｜> …
                    └─ answer ─┬─ the rest of the episode
                               └─ <｜title｜> …     behind the first answer's end; a fork of its state

Where each one's token stands, the protocol knows. A branch is an episode of its own, with a seed, a log and a
recovery of its own, and no part of its parent's stream: what it says is in the record's metadata, so no loss
sees it.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from consilience.conf.errors import EngineError
from consilience.rollout.engine import Request
from consilience.rollout.episode import Episode
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.protocol import TASK_TOKENS
from consilience.rollout.records import RolloutRecord

if TYPE_CHECKING:
    from consilience.rollout.worker import RolloutWorker

BRANCHES = "branches"  # metadata key: name -> {"text", "token_ids", "finish"}, None without an answer

TITLE = "title"
_SEED_STRIDE = 0xD1B54A32D192ED03  # odd, and not the one between turns
_MAX_SEED = 1 << 63


def prompt_branches(job: RolloutJob) -> list[RolloutJob]:
    """The branches that begin with the job's prompt; the protocol puts each one's token into its place."""
    *before, last = job.messages
    names = (name for name in job.branches if name != TITLE)
    return [replace(_branch_of(job, name), messages=(*before, {**last, "task": name})) for name in names]


def _branch_of(job: RolloutJob, name: str) -> RolloutJob:
    """Seeds depend on the parent's and the name alone, so that another choice of branches changes none."""
    seed = (job.sampling.seed + zlib.crc32(name.encode()) * _SEED_STRIDE) % _MAX_SEED
    return replace(
        job,
        uid=f"{job.uid}%{name}",
        group=f"{job.group}%{name}",
        branches=(),
        reward="",
        needs_sandbox=False,
        files={},
        metadata={},
        user_turns=(),
        max_turns=1,
        max_tokens=job.branch_tokens,
        sampling=replace(job.sampling, seed=seed, max_tokens=job.branch_tokens),
    )


class OpenBranches:
    """The branches of one stream's jobs, and which records wait for which answers."""

    def __init__(self, worker: RolloutWorker) -> None:
        self._worker = worker
        self._answers: dict[str, dict[str, dict[str, Any] | None]] = {}  # by the parent's uid
        self._open: dict[str, tuple[str, str]] = {}  # branch's uid -> parent's, name
        self._waiting: dict[str, RolloutRecord] = {}  # parents that are over

    def beside(self, jobs: Sequence[RolloutJob]) -> list[RolloutJob]:
        """Jobs of the branches that begin with these."""
        branches = [branch for job in jobs for branch in prompt_branches(job)]
        for branch in branches:
            self._begin(branch)
        return branches

    def title_of(self, episode: Episode) -> Episode | None:
        """The branch behind an episode's first answer; None: not asked for, not yet, no room."""
        ids, worker = episode.first_answer_ids, self._worker
        if TITLE not in episode.job.branches or ids is None:
            return None
        prompt = (*ids, worker.tokenizer.special_ids[TASK_TOKENS[TITLE]])
        if worker.max_context is not None and len(prompt) >= worker.max_context:
            return None
        job = _branch_of(episode.job, TITLE)
        self._begin(job)
        return self._episode(job, prompt)

    def again(self, title: Episode) -> Episode:
        """The same branch, not begun."""
        return self._episode(title.job, title.prompt_ids)

    def fork(self, parent: str, request: Request) -> bool:
        """Send a title's request as a fork of the held stream `parent`; False where that cannot be."""
        fork = getattr(self._worker.engine, "fork", None)
        if fork is None:
            return False
        try:
            fork(parent, [replace(request, prompt_ids=request.prompt_ids[-1:], group=None)])
        except EngineError:  # no row is free
            return False
        return True

    def _begin(self, branch: RolloutJob) -> None:
        parent, _, name = branch.uid.rpartition("%")
        self._open[branch.uid] = parent, name

    def _episode(self, job: RolloutJob, prompt: tuple[int, ...]) -> Episode:
        worker = self._worker
        context, family = worker.max_context, worker.family
        return Episode(job, prompt, worker.tokenizer, max_context=context, family=family)

    def take(self, job: RolloutJob, record: RolloutRecord) -> RolloutRecord | None:
        """A record that is final: its own, its parent's, or none yet."""
        if job.uid in self._open:
            parent, name = self._open.pop(job.uid)
            said = [token for token, is_said in zip(record.token_ids, record.loss_mask) if is_said]
            text, finish = self._worker.tokenizer.decode(said), record.finish.value
            answer = {"text": text, "token_ids": said, "finish": finish} if said else None
            self._answers.setdefault(parent, {})[name] = answer
            waiting = self._waiting.pop(parent, None)
            return None if waiting is None else self._final(waiting)
        if not job.branches:
            return record
        self._answers[job.uid] = dict.fromkeys(job.branches) | self._answers.get(job.uid, {})
        return self._final(record)

    def _final(self, record: RolloutRecord) -> RolloutRecord | None:
        if any(parent == record.uid for parent, _ in self._open.values()):
            self._waiting[record.uid] = record
            return None
        answers = self._answers.pop(record.uid)
        return replace(record, metadata={**record.metadata, BRANCHES: dict(sorted(answers.items()))})
