"""The parts of a distillation step with a clock at their seams, for `bench/opd_step.py`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.teachers.hidden_store import HiddenStore
from consilience.teachers.host_teachers import HostTeachers
from consilience.teachers.registry import TeacherRecord
from consilience.training.stage_clock import StageClock
from consilience.training.torch_engine import TorchEngine

PARTS = ("student", "loss", "update", "teacher")
FILES = ("load", "write", "read", "head")


class Accounts:
    """Seconds of the step's thread by part, and of files by kind whoever spent them."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self.files: dict[str, float] = dict.fromkeys(FILES, 0.0)
        self.clock = StageClock(now=self._now)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        return time.perf_counter()

    @contextmanager
    def file(self, kind: str) -> Iterator[None]:
        """Seconds on files, in any thread; those of the step's own thread are its part "wait …" too."""
        began = time.perf_counter()
        try:
            if threading.current_thread() is threading.main_thread():
                with self.clock.phase(f"wait {kind}"):
                    yield
            else:
                yield
        finally:
            with self._lock:
                self.files[kind] += time.perf_counter() - began


class TimedStore(HiddenStore):
    def __init__(self, accounts: Accounts, folder: Path) -> None:
        super().__init__(folder)
        self._accounts = accounts

    def put(self, *given: Any) -> None:
        with self._accounts.file("write"):
            super().put(*given)

    def take(self, key: str) -> Tensor:
        with self._accounts.file("read"):
            return super().take(key)


class TimedTeacher:
    """A teacher whose scoring is compute."""

    def __init__(self, teacher: Any, accounts: Accounts) -> None:
        self._teacher, self._accounts = teacher, accounts
        self.name, self.digest, self.head_digest = teacher.name, teacher.digest, teacher.head_digest

    def score(self, *given: Any) -> list[Tensor]:
        with self._accounts.clock.phase("teacher"):
            return self._teacher.score(*given)

    def head(self) -> Tensor:
        return self._teacher.head()


class TimedTeachers(HostTeachers):
    def __init__(self, accounts: Accounts, device: torch.device, batch_tokens: int) -> None:
        super().__init__(device, batch_tokens=batch_tokens)
        self._accounts = accounts

    def load(self, record: TeacherRecord) -> Any:
        with self._accounts.clock.phase("wait load"):
            return TimedTeacher(super().load(record), self._accounts)

    def _read(self, folder: Path) -> Any:
        with self._accounts.file("load"):
            return super()._read(folder)


class TimedModel:
    """The model as the loss function sees it: its forward is the student's, what is around it the loss's."""

    def __init__(self, model: Any, clock: StageClock) -> None:
        self._model, self._clock = model, clock

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._model, name)
        if name not in ("streams", "mtp_hidden", "norm", "hc_head"):
            return found

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._clock.phase("student"):
                return found(*args, **kwargs)

        return timed


class TimedEngine(TorchEngine):
    clock: StageClock

    def forward_backward(
        self, loss_fn: Callable[..., Any], batch: Any, denominators: Any
    ) -> dict[str, float]:
        def timed(model: Any, micro: Any) -> Any:
            with self.clock.phase("loss"):
                return loss_fn(TimedModel(model, self.clock), micro)

        with self.clock.phase("student"):
            return super().forward_backward(timed, batch, denominators)

    def step(self, lr_scale: float = 1.0, expert_load: Any = None) -> dict[str, float]:
        with self.clock.phase("update"):
            return super().step(lr_scale, expert_load)
