"""A reward function in a process that can be killed: a wall limit a call, typed outcomes, no hang.

The child is a fresh interpreter (never a fork of a process that holds torch). One item's fault stays
with that item: a call that hangs is killed, its process replaced, and the rest of the batch goes on.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from consilience.conf.errors import RewardError, SandboxUnavailable
from consilience.rewards.child import completion_to_dict
from consilience.rewards.frames import SEND_TIMEOUT_S, FrameSocket
from consilience.rewards.interface import Completion
from consilience.rewards.judge_box import spec_to_dict
from consilience.rewards.verdict import failed, infra, tamper, verdict_of
from consilience.rollout.grading import Graded
from consilience.rollout.records import OutcomeKind
from consilience.sandboxes.protocol import SandboxSpec

MAX_REPLY_BYTES = 1 << 20
CHUNK = 256  # items sent at a time
QUEUE_LIMIT_S = 3600.0  # calls of others that are ahead
REAP_LIMIT_S = 10.0  # a killed process that a disk holds in the kernel is left to it
LAUNCH = "from consilience.rewards.child import main; main()"


@dataclass(frozen=True, slots=True)
class ScoreItem:
    """One call of the reward function. `metadata` is JSON-plain."""

    completion: Completion
    prompt: str
    metadata: dict[str, Any]


class RewardProcess:
    """Scores batches with one reward function in one child process.

    timeout_s       wall limit of one call
    load_timeout_s  wall limit of importing the function and of opening a judge box
    sandbox         the box to open in the child and hand to the function; None: it gets None
    gradings_per_box  how many calls one box may serve, emptied in between (`JudgeBox`)
    `num_restarts` counts children that had to be replaced. Thread-safe; calls queue.
    """

    def __init__(
        self,
        path: str,
        *,
        timeout_s: float = 10.0,
        load_timeout_s: float = 120.0,
        sandbox: SandboxSpec | None = None,
        gradings_per_box: int = 1,
    ) -> None:
        self.path = path
        self.num_restarts = 0
        self._timeout_s = timeout_s
        self._load_timeout_s = load_timeout_s
        self._sandbox, self._gradings_per_box = sandbox, gradings_per_box
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._was_ready = self._is_closing = False

    def start(self) -> None:
        """Load the function now, so that a wrong path is one clear error before any work.

        RewardError: it cannot be loaded. SandboxUnavailable: no box as strong as asked for.
        """
        with self._turn():
            self._ensure()

    def score(self, items: Sequence[ScoreItem]) -> list[Graded]:
        """One verdict per item, in order.

        FAILED: the call raised, timed out, crashed its process, or returned no finite number. INFRA:
        its sandbox was lost or cannot be opened again. RewardError or SandboxUnavailable only if the
        function could never be loaded.
        """
        verdicts: list[Graded] = []
        with self._turn():
            while len(verdicts) < len(items):
                if self._is_closing:
                    return verdicts + [infra("the reward process was closed")] * (len(items) - len(verdicts))
                try:
                    child = self._ensure()
                except (RewardError, SandboxUnavailable) as error:
                    if not self._was_ready:
                        raise
                    verdict = infra if isinstance(error, SandboxUnavailable) else failed
                    rest = len(items) - len(verdicts)
                    return verdicts + [verdict(f"the reward process did not come back: {error}")] * rest
                verdicts += self._score_chunk(child, items[len(verdicts) : len(verdicts) + CHUNK])
        return verdicts

    def close(self) -> None:
        """End the child, whatever it is at. The next `score` starts another."""
        self._is_closing = True
        child = self._child
        if child is not None:
            child.kill()  # a call that waits for it sees its end
        with self._turn():
            self._drop()
            self._is_closing = False

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This caller's turn. RewardError when those before take over an hour."""
        if not self._lock.acquire(timeout=QUEUE_LIMIT_S):
            raise RewardError(
                f"reward {self.path!r} was busy for {QUEUE_LIMIT_S:g} s; lower rewards.timeout_s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def limit_s(self, num_items: int) -> float:
        """What `score` of so many items may take at worst, alone: every one killed, every start slow."""
        return num_items * (self._timeout_s + self._load_timeout_s) + SEND_TIMEOUT_S

    def __enter__(self) -> RewardProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ensure(self) -> _Child:
        if self._child is None:
            if self._was_ready:
                self.num_restarts += 1
            spec = None if self._sandbox is None else spec_to_dict(self._sandbox)
            gradings = {"gradings_per_box": self._gradings_per_box}
            self._child = _Child({"path": self.path, "sandbox": spec, **gradings})
            try:
                self._await_ready(self._child)
            except BaseException:
                self._drop()
                raise
            self._was_ready = True
        return self._child

    def _await_ready(self, child: _Child) -> None:
        deadline = time.monotonic() + self._load_timeout_s
        while True:
            try:
                kind, *rest = child.frames.receive(deadline)
            except TimeoutError:
                raise RewardError(
                    f"reward {self.path!r} took over {self._load_timeout_s:g} s to load; repair its import"
                ) from None
            except (EOFError, ValueError):
                raise RewardError(
                    f"reward {self.path!r}: its process ended while loading ({child.how_it_ended()})"
                ) from None
            if kind == "ready":
                return
            if kind == "refused":
                name, text = rest
                raise SandboxUnavailable(text) if name.startswith("Sandbox") else RewardError(text)

    def _score_chunk(self, child: _Child, items: Sequence[ScoreItem]) -> list[Graded]:
        """Verdicts of the first items of the chunk: all, or up to and with the one that ended the child."""
        verdicts: list[Graded] = []
        try:
            child.frames.send({"items": [_row(item) for item in items]})
        except OSError:  # it died idle: nobody's fault, unless it does so straight after its start
            self._drop()
            return [] if child.has_served else [failed(f"the reward process died ({child.how_it_ended()})")]
        try:
            deadline = time.monotonic() + self._timeout_s
            while len(verdicts) < len(items):
                kind, *rest = child.frames.receive(deadline)
                limit_s = self._load_timeout_s if kind == "busy" else self._timeout_s
                deadline = time.monotonic() + limit_s
                if kind == "score":
                    verdicts.append(_verdict(*rest))
                    child.has_served = True
                if kind == "boxless":
                    break
            else:
                return verdicts
        except TimeoutError:
            verdicts.append(failed(f"the reward function took over {self._timeout_s:g} s and was killed"))
        except (EOFError, OSError):
            verdicts.append(failed(f"the reward process crashed ({child.how_it_ended()})"))
        except (ValueError, TypeError, KeyError) as error:
            verdicts.append(failed(f"the reward process broke its protocol: {error}"))
        self._drop()
        return verdicts

    def _drop(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None


class _Child:
    """The process and our end of its socket; killed with all its descendants."""

    def __init__(self, settings: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                start_new_session=True,
            )
        self.has_served = False
        self.frames = FrameSocket(ours, max_bytes=MAX_REPLY_BYTES)
        self._finalizer = weakref.finalize(self, _kill_group, self.process, ours)
        with suppress(OSError):  # a child that is already gone shows at the first receive
            self.frames.send(settings)

    def how_it_ended(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1.0)
        code = self.process.returncode
        if code is None:
            return "it closed its connection"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def kill(self) -> None:
        self._finalizer()


def _kill_group(process: subprocess.Popen[bytes], ours: socket.socket) -> None:
    ours.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=REAP_LIMIT_S)


def _row(item: ScoreItem) -> dict[str, Any]:
    return {
        "completion": completion_to_dict(item.completion),
        "prompt": item.prompt,
        "metadata": item.metadata,
    }


def _verdict(reward: Any, parts: Any, kind: str, detail: str, label: str, ids: list[str]) -> Graded:
    """The child's words, checked again: a reward function may have written them itself."""
    if OutcomeKind(kind) is OutcomeKind.GRADED:
        verdict = verdict_of({**parts, "reward": reward})
        if verdict.outcome.is_scored:
            verdict = replace(verdict, parts={name: float(parts[name]) for name in parts})
    else:
        others = {OutcomeKind.INFRA: infra, OutcomeKind.TAMPER: tamper}
        verdict = others.get(OutcomeKind(kind), failed)(str(detail))
    return replace(verdict, isolation=str(label), sandbox_ids=tuple(str(i) for i in ids))
