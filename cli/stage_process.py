"""One stage in a process of its own: forked from a warm server, heard through a pipe, never left behind.

The server is multiprocessing's fork server with the heavy imports done and no thread started; torch is
imported once, and a stage starts in tens of milliseconds. Where a platform has no fork server, a child
is a fresh interpreter. Either way it gets this process's environment, import path and folder.

    the trainer tells  start, advance, finish  ──┐
    the stage ends     result | error | interrupted ─► pipe ─► StageProcess.messages(), then result()

A child ends at SIGINT and SIGTERM the way a stage in the main process does (KeyboardInterrupt, once:
what it clears up afterwards is not disturbed), and at once when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

from consilience.cli.stage import StageContext
from consilience.conf.errors import RunError
from consilience.rollout.deadlines import ENDED, STALLS, Stall, StallLog

PRELOAD = (
    "torch",
    "consilience.cli.supervised_stages",
    "consilience.cli.grpo_stage",
    "consilience.cli.distill_stage",
    "consilience.cli.evaluate",
    "reasoning_gym",
    "torch._dynamo",  # imported by the first optimiser
    "wandb.sdk.launch",  # imported by the first wandb run
)
"""Seconds of imports, each, that stages make; none of them may start a thread."""
_HAS_SERVER = "forkserver" in multiprocessing.get_all_start_methods()
PROCESSES = multiprocessing.get_context("forkserver") if _HAS_SERVER else multiprocessing.get_context("spawn")
BEAT_S = 2.0
_LOOK_S = 1.0
_STOPS = (signal.SIGINT, signal.SIGTERM)
NO_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a pool would not survive the fork


def warm_up(preload: Sequence[str] = PRELOAD) -> None:
    """Start the fork server, which imports while this process goes on; harmless where it runs.

    It blocks SIGINT and SIGTERM, and so do its children until they have handlers: a Ctrl-C at any moment
    is neither lost nor a traceback. It finds modules exactly where this process does.
    """
    if not _HAS_SERVER:
        return
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    resource_tracker.ensure_running()  # otherwise the server starts it, and unblocks the signals
    forkserver.set_forkserver_preload(list(preload))
    with _environment({**NO_THREADS, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StageProcess:
    """A stage function at work in a child process, from construction on.

    run      a function that can be pickled: one of a module, or a partial of one
    context  its `progress` is replaced by one whose messages come back from `messages`
    environment  the child's environment variables, all of them
    RunError if the function or the settings cannot travel.
    """

    def __init__(
        self,
        run: Callable[[StageContext], Mapping[str, Any]],
        context: StageContext,
        environment: Mapping[str, str],
    ) -> None:
        warm_up()
        self.name = context.name
        self._ending: tuple[Any, ...] | None = None
        self._messages, theirs = PROCESSES.Pipe(duplex=False)
        self._beats, beat = PROCESSES.Pipe(duplex=False)
        self._stalls = StallLog(context.run.path / STALLS)
        self._silence_s = context.cfg.run.silence_limit_s
        sent = replace(context, progress=SentProgress(theirs))
        self._process = PROCESSES.Process(
            target=_work, args=(run, sent, dict(environment), beat), name=self.name
        )
        try:
            self._process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RunError(
                f"stage '{self.name}' cannot run in a process of its own: {error}; make its function a "
                "module's, or set run.parallel=1"
            ) from error
        finally:
            theirs.close()
            beat.close()
        threading.Thread(target=self._listen, name=f"hear {self.name}", daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def has_ended(self) -> bool:
        """Whether the process is gone. Read `messages` after this, not before."""
        return self._process.exitcode is not None

    def messages(self) -> Iterator[tuple[Any, ...]]:
        """What its trainer told since the last call, as (verb, arguments …); never waits."""
        with contextlib.suppress(EOFError, OSError):
            while self._messages.poll():
                message = self._messages.recv()  # no limit: a sender that stops in the middle is ended
                if message[0] in ("result", "error", "interrupted"):
                    self._ending = message
                else:
                    yield message

    @property
    def has_spoken(self) -> bool:
        """Whether the stage has said how it ended; its process may live a moment longer."""
        return self._ending is not None

    @property
    def has_result(self) -> bool:
        return self._ending is not None and self._ending[0] == "result"

    def result(self) -> Mapping[str, Any]:
        """The stage's result, or raise what it raised; RunError if its process ended without a word."""
        if self._ending is None and self._stalls.stalls:
            raise RunError(f"{self._stalls.stalls[0]}; the same command goes on where the stage stopped")
        if self._ending is None:
            raise RunError(
                f"the process of stage '{self.name}' died without a word ({death(self._process.exitcode)}); "
                "if memory ran out, lower run.parallel; the same command goes on where the stage stopped"
            )
        if self._ending[0] == "interrupted":
            raise KeyboardInterrupt
        if self._ending[0] == "error":
            raise self._ending[1]
        return self._ending[1]

    def interrupt(self) -> None:
        """Ask the stage to end, as Ctrl-C does. It may be asked again."""
        self._signal(signal.SIGINT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def close(self) -> None:
        """Give back what the ended process held here. Whatever of it still lives ends now."""
        self._messages.close()
        self._process.close()

    def _listen(self) -> None:
        """(a thread) End the process when it gives no sign of life: frozen, or deaf in some library.

        Looks are counted, not hours: a Ctrl-Z stops this process too.
        """
        pid, silent_s = self.pid, 0.0
        try:
            while silent_s < self._silence_s:
                if self._beats.poll(_LOOK_S):
                    self._beats.recv_bytes()  # no limit: a byte that was written as one
                    silent_s = 0.0
                else:
                    silent_s += _LOOK_S
        except (EOFError, OSError):
            return  # it has ended
        finally:
            if silent_s < self._silence_s:
                self._beats.close()
        stacks = stacks_file(self._stalls, self.name, pid)
        with contextlib.suppress(ProcessLookupError):
            if stacks is not None and stacks.exists():  # its handler is there, so the signal ends nothing
                os.kill(pid, signal.SIGUSR1)
                os.kill(pid, signal.SIGCONT)
                time.sleep(_LOOK_S)
            self._stalls.add(
                Stall(
                    "stage",
                    silent_s,
                    self._silence_s,
                    f"stage {self.name}",
                    action=ENDED,
                    pid=pid,
                    stacks="" if stacks is None else str(stacks),
                )
            )
            os.kill(pid, signal.SIGKILL)
        self._beats.close()

    def _signal(self, number: signal.Signals) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def sources(self) -> list[Any]:
        """What `connection.wait` takes: ready when there is something to read, or the process has ended."""
        return [self._messages, self._process.sentinel]


def wait_for(processes: Iterable[StageProcess], timeout_s: float) -> None:
    """Return when one of them says something or ends, at the latest after `timeout_s`."""
    connection.wait([source for process in processes for source in process.sources()], timeout_s)


@dataclass(frozen=True)
class SentProgress:
    """The progress a trainer in a child sees; what it tells goes to the process that draws."""

    connection: Any

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.connection.send(("start", total, unit))

    def advance(self, n: int = 1, **info: Any) -> None:
        self.connection.send(("advance", n, info))

    def finish(self) -> None:
        self.connection.send(("finish",))


# ---- in the child ---------------------------------------------------------------------------------


def _work(
    run: Callable[[StageContext], Mapping[str, Any]],
    context: StageContext,
    environment: Mapping[str, str],
    beat: Any,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    stacks = stacks_file(StallLog(context.run.path / STALLS), context.name, os.getpid())
    with signal_dumps(stacks):
        _run_stage(run, context, beat)


def _run_stage(run: Callable[[StageContext], Mapping[str, Any]], context: StageContext, beat: Any) -> None:
    threading.Thread(target=_beat, args=(beat,), name="beat", daemon=True).start()
    threading.Thread(target=die_with_parent, name="die-with-parent", daemon=True).start()
    send: Callable[[tuple[Any, ...]], None] = context.progress.connection.send  # type: ignore[attr-defined]
    try:
        for number in _STOPS:
            signal.signal(number, _interrupt_once)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
        ending = ("result", dict(run(context)))
        pickle.dumps(ending)
    except Exception as error:
        ending = ("error", portable(error, context.name))
    except BaseException:
        ending = ("interrupted",)
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    send(ending)
    # atexit does not run in a child of multiprocessing; only a stage that sampled has a session open.
    session = sys.modules.get("consilience.cli.ray_session")
    if session is not None:
        session.close_session()


def _interrupt_once(_signum: int, _frame: FrameType | None) -> None:
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _beat(connection: Any) -> None:
    """A sign of life every few seconds, as long as any thread of this process gets its turn."""
    with contextlib.suppress(OSError):
        while True:
            connection.send_bytes(b".")
            time.sleep(BEAT_S)


def stacks_file(log: StallLog, name: str, pid: int) -> Path | None:
    return None if log.stacks is None else log.stacks / f"stage-{name.replace('/', '-')}-{pid}.txt"


@contextlib.contextmanager
def signal_dumps(path: Path | None) -> Iterator[None]:
    """SIGUSR1 writes the stacks of all threads to `path`; an empty file is removed at the end."""
    with contextlib.ExitStack() as stack:
        if path is not None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("w"))
                faulthandler.register(signal.SIGUSR1, file, all_threads=True)
        yield
    with contextlib.suppress(OSError):
        if path is not None and not path.stat().st_size:
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink()
            path.parent.rmdir()


def die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # no limit: waiting for that end is what this thread is for
    os.kill(os.getpid(), signal.SIGKILL)


def portable(error: Exception, stage: str) -> Exception:
    """The error with its traceback as a note; if it does not survive the pipe, one that says the same."""
    said = "".join(traceback.format_exception(error)).rstrip()
    error.add_note(f"In the process of stage '{stage}':\n{said}")
    with contextlib.suppress(Exception):
        received = pickle.loads(pickle.dumps(error))
        if type(received) is type(error) and str(received) == str(error):
            return error
    other = RuntimeError(f"{type(error).__name__}: {error}")
    other.add_note(error.__notes__[-1])
    return other


def death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """These environment variables for the block."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
