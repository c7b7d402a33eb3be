"""The actor around a plain RolloutWorker, where its process is, and how that is ended when it is silent."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from consilience.conf.errors import ConfigError, ConsilienceError
from consilience.rollout.continuous import Inbox, serve
from consilience.rollout.deadlines import open_stacks
from consilience.rollout.engine import EngineState
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.lease import Lease
from consilience.rollout.proof import Evidence
from consilience.rollout.publishing import Publication, verify
from consilience.rollout.records import RolloutRecord
from consilience.rollout.weight_transport import WeightReceiver
from consilience.rollout.worker import RolloutWorker

_STACKS_S = 1.0  # a process that is not stopped has written its stacks by then
_REMOTE_LIMIT_S = 30.0
_LEAVE_S = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """A worker's process. `stacks` is the file that its SIGUSR1 fills, "" for its error output."""

    host: str
    pid: int
    node: str
    began: float  # ticks since the machine started: process ids are used again
    stacks: str = ""


class Mailbox:
    """The actor. `build` is not the constructor, so that its errors arrive typed."""

    def __init__(self, factory: str, kwargs: Mapping[str, Any]) -> None:
        self._factory, self._kwargs = factory, kwargs
        self._worker: RolloutWorker
        self._inbox: Inbox | None = None  # of a stream that never ends
        self._recompute = False
        self._receiver = WeightReceiver()
        self._is_sampling = self._is_leaving = False
        self._end_at_once: Any = None
        with contextlib.suppress(ValueError):  # not in the main thread: Ray ends the process as it likes
            self._end_at_once = signal.signal(signal.SIGTERM, self._on_sigterm)

    def build(self, stacks: str | None) -> Place:
        place, file = own_place(stacks, "rollout-worker")
        self._worker = load_factory(self._factory)(**self._kwargs)
        self._worker.stacks = file
        return place

    def generate(self, jobs: Sequence[RolloutJob], lease: Lease | None) -> Iterator[list[RolloutRecord]]:
        with self._sampling():
            yield from self._worker.stream(jobs, lease)

    def open(self, recompute: bool) -> None:
        self._inbox, self._recompute = Inbox(), recompute

    def serve(self) -> Iterator[list[RolloutRecord]]:
        assert self._inbox is not None  # opened before
        try:
            with self._sampling():
                yield from serve(self._worker, self._inbox)
        finally:
            self._inbox = None

    def hand_over(self, jobs: Sequence[RolloutJob], lease: Lease | None) -> None:
        if self._inbox is not None:  # else the stream is over, which its reader hears
            self._inbox.submit(jobs, lease)

    def end(self) -> None:
        if self._inbox is not None:
            self._inbox.end()

    def can_map(self, payload: Any, publication: Publication) -> str:
        try:
            verify(self._receiver.open(payload, publication), publication)
        except ConsilienceError as error:
            return str(error)
        return ""

    def has_gpu(self) -> bool:
        return torch.cuda.is_available()

    def join(self, address: Any, rank: int) -> None:
        self._receiver.join(address, rank)

    def publish(self, payload: Any, publication: Publication) -> None:
        weights, version = self._receiver.open(payload, publication), publication.version
        if (inbox := self._inbox) is not None:
            inbox.publish(weights, publication, version, recompute=self._recompute)
        else:
            self._worker.publish(weights, publication, version)

    def evidence(self, prompts: Sequence[Sequence[int]], exact: bool) -> Evidence:
        return self._worker.evidence(prompts, exact)

    def sleep(self, level: int) -> None:
        self._worker.sleep(level)

    def wake(self) -> None:
        self._worker.wake()

    def state(self) -> EngineState:
        return self._worker.state()

    def close(self) -> None:
        self._worker.close()

    @contextlib.contextmanager
    def _sampling(self) -> Iterator[None]:
        """SIGTERM, as of a machine that is taken away, ends the process only once the streams are saved."""
        self._is_sampling = True
        try:
            yield
        finally:
            self._is_sampling = False
            if self._is_leaving:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(_LEAVE_S)  # the main thread ends the process; a stream that ended would be done
                os._exit(1)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        if self._is_sampling and not self._is_leaving:
            self._is_leaving = True
            self._worker.pause()
        elif callable(self._end_at_once):
            self._end_at_once(number, frame)
        else:
            raise SystemExit(1)


def own_place(stacks: str | None, who: str) -> tuple[Place, IO[str] | None]:
    """Where this process is; its SIGUSR1 fills a file of `who` in the folder `stacks`, which is open then."""
    file = None
    if stacks is not None:
        with contextlib.suppress(OSError):
            file = open_stacks(Path(stacks), who)
    if file is None:
        faulthandler.register(signal.SIGUSR1, all_threads=True)
    else:
        faulthandler.register(signal.SIGUSR1, file, all_threads=True)
    node, name = ray.get_runtime_context().get_node_id(), "" if file is None else file.name
    return Place(socket.gethostname(), os.getpid(), node, _began(os.getpid()), name), file


def load_factory(path: str) -> Callable[..., RolloutWorker]:
    """The function that "import.path:function" names. ConfigError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"worker factory {path!r}: {error}; give it as import.path:function") from None


def is_running_here(place: Place) -> bool:
    """Whether it is a process of this machine that has not ended."""
    return place.host == socket.gethostname() and _began(place.pid) == place.began


def end_process(place: Place, *, has_stacks: bool = True) -> None:
    """Have a worker write its stacks, then end it, on whatever machine of the cluster it is.

    Ray asks a process to end, which a stopped one does not hear. Nothing happens where it is gone; a machine
    that does not answer in half a minute is taken for gone.
    """
    if place.host == socket.gethostname():
        _end_here(place, has_stacks)
        _clear(place)
        return
    with contextlib.suppress(Exception):
        ray.get(_there(place, _end_here).remote(place, has_stacks), timeout=_REMOTE_LIMIT_S)
    _clear(place)


def ask_for_stacks(place: Place) -> None:
    """Have a process write its stacks, on whatever machine it is; nobody waits for it."""
    if place.host == socket.gethostname():
        _dump_here(place)
    else:
        _there(place, _dump_here).remote(place)


def _there(place: Place, work: Callable[..., None]) -> Any:
    """A task on the machine of a process."""
    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=there)  # type: ignore[attr-defined]


def _end_here(place: Place, has_stacks: bool) -> None:
    if _began(place.pid) != place.began:
        return
    if has_stacks:
        _dump_here(place)
        time.sleep(_STACKS_S)
    with contextlib.suppress(ProcessLookupError):
        os.kill(place.pid, signal.SIGKILL)


def _dump_here(place: Place) -> None:
    if _began(place.pid) != place.began:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(place.pid, signal.SIGUSR1)
        os.kill(place.pid, signal.SIGCONT)  # a stopped process takes its signals when it goes on


def _began(pid: int) -> float:
    """When a process began, in ticks; 0 where there is none (or no /proc to tell)."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return 0.0


def _clear(place: Place) -> None:
    """Remove a file of stacks that nobody filled."""
    with contextlib.suppress(OSError):
        if place.stacks and not os.path.getsize(place.stacks):
            os.unlink(place.stacks)
