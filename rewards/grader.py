"""The `Grader` behind which reward functions live: items go to processes by their reward path."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from consilience.conf.errors import SandboxLost
from consilience.rewards.interface import Completion, ToolCall
from consilience.rewards.process import QUEUE_LIMIT_S, RewardProcess, ScoreItem
from consilience.rewards.verdict import failed, infra
from consilience.rewards.workspace import workspace_patch
from consilience.rollout.grading import Graded, GradeItem
from consilience.sandboxes.protocol import SandboxSpec


class RewardGrader:
    """Implements rollout/grading.py's `Grader` with killable processes.

    timeout_s      wall limit of one score
    num_processes  reward processes for each reward function
    sandbox        the judge box of functions that run code (`GradeItem.needs_sandbox`)
    gradings_per_box  of that box (`JudgeBox`)
    `close` ends the processes; a grader in a `with` block is closed at its end.
    """

    def __init__(
        self,
        *,
        timeout_s: float = 10.0,
        num_processes: int = 1,
        sandbox: SandboxSpec | None = None,
        gradings_per_box: int = 1,
    ) -> None:
        self._timeout_s = timeout_s
        self._num_processes = num_processes
        self._sandbox = sandbox or SandboxSpec()
        self._gradings_per_box = gradings_per_box
        self._processes: dict[tuple[str, bool], list[RewardProcess]] = {}
        self._threads = ThreadPoolExecutor(max_workers=32, thread_name_prefix="grader")

    def start(self, rewards: Sequence[tuple[str, bool]]) -> None:
        """Load (reward path, needs sandbox) pairs now, in parallel.

        RewardError or SandboxUnavailable: one of them can never work; nothing has been sampled yet.
        """
        processes = [process for path, boxed in rewards for process in self._of(path, boxed)]
        limit_s = sum(process.limit_s(1) for process in processes)  # all after each other
        for future in [self._threads.submit(process.start) for process in processes]:
            future.result(timeout=limit_s)

    def grade(self, items: Sequence[GradeItem]) -> list[Graded]:
        """One verdict per item, in order.

        A failing call is an Outcome. RewardError or SandboxUnavailable only for a function that could
        never be loaded (call `start` first to have that early).
        """
        verdicts: list[Graded | None] = [None] * len(items)
        places: dict[tuple[str, bool], list[int]] = {}
        rows: dict[int, ScoreItem] = {}
        for i, item in enumerate(items):
            if not item.reward:
                verdicts[i] = failed("the job names no reward function")
                continue
            try:
                rows[i] = score_item(item)
            except SandboxLost as error:
                verdicts[i] = infra(f"SandboxLost: {error}")
                continue
            places.setdefault((item.reward, item.needs_sandbox), []).append(i)
        jobs = []
        for key, indices in places.items():
            processes = self._of(*key)
            for n, process in enumerate(processes):
                if share := indices[n :: len(processes)]:
                    scored = self._threads.submit(process.score, [rows[i] for i in share])
                    jobs.append((share, scored, process.limit_s(len(share)) + QUEUE_LIMIT_S))
        for share, scored, limit_s in jobs:
            try:
                found = scored.result(timeout=limit_s)
            except TimeoutError:
                found = [infra(f"no verdict in {limit_s:g} s")] * len(share)
            for i, verdict in zip(share, found, strict=True):
                verdicts[i] = verdict
        return [verdict if verdict is not None else failed("no verdict") for verdict in verdicts]

    @property
    def num_restarts(self) -> int:
        """Reward processes that had to be replaced so far."""
        return sum(p.num_restarts for processes in self._processes.values() for p in processes)

    def close(self) -> None:
        for processes in self._processes.values():
            for process in processes:
                process.close()
        self._threads.shutdown(wait=True)  # no limit: the processes that its threads wait for have ended

    def __enter__(self) -> RewardGrader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _of(self, path: str, needs_sandbox: bool) -> list[RewardProcess]:
        key = (path, needs_sandbox)
        if key not in self._processes:
            self._processes[key] = [
                RewardProcess(
                    path,
                    timeout_s=self._timeout_s,
                    sandbox=self._sandbox if needs_sandbox else None,
                    gradings_per_box=self._gradings_per_box,
                )
                for _ in range(self._num_processes)
            ]
        return self._processes[key]


def score_item(item: GradeItem) -> ScoreItem:
    """The part of an item that a reward function sees. SandboxLost if the episode's own box is gone."""
    calls = tuple(ToolCall(call.name, call.arguments, call.result) for call in item.tool_calls)
    has_patch = item.needs_sandbox and item.sandbox is not None and bool(item.files)
    patch = workspace_patch(item.sandbox, item.files) if has_patch else None
    completion = Completion(item.text, item.thinking, item.token_ids, calls, item.finish, item.answers, patch)
    return ScoreItem(completion, item.prompt, dict(item.metadata))
