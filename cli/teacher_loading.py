"""What scores a teacher: our own forward for V4's folders, transformers' or vLLM for any other model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from consilience.cli.engines import device_of
from consilience.conf.schema import Config
from consilience.teachers.causal_folder import is_other_model
from consilience.teachers.causal_teacher import load_causal_teacher
from consilience.teachers.host_teachers import HOST_BYTES, HostTeachers
from consilience.teachers.registry import TeacherRecord
from consilience.teachers.scheduler import PlainLoader, TeacherLoader
from consilience.teachers.teacher import Teacher

Load = Callable[[TeacherRecord], Teacher]


def teacher_loader(cfg: Config) -> TeacherLoader:
    """Loads each teacher of the registry by what its folder holds. ConfigError on `teachers.settings`."""
    device = device_of(cfg)
    # Each rank keeps teachers of its own, several in the memory of one host.
    host_bytes = HOST_BYTES // cfg.engine.ranks
    own = HostTeachers(device, quantization=cfg.engine.quantization, host_bytes=host_bytes)
    other = _vllm_loader(cfg) if uses_vllm(cfg) else partial(load_causal_teacher, device=device)
    return ByFolder(own, PlainLoader(other))


class ByFolder:
    """`TeacherLoader`: `own` for a folder of V4 in any layout, `other` for that of another model."""

    def __init__(self, own: TeacherLoader, other: TeacherLoader) -> None:
        self._own, self._other = own, other

    def load(self, record: TeacherRecord) -> Teacher:
        return self._of(record).load(record)

    def announce(self, record: TeacherRecord) -> None:
        self._of(record).announce(record)

    def stop(self) -> None:
        self._own.stop()
        self._other.stop()

    def _of(self, record: TeacherRecord) -> TeacherLoader:
        return self._other if is_other_model(record.checkpoint) else self._own


def arithmetic(cfg: Config) -> str:
    """How teachers compute besides by their weights: states of one arithmetic are no states of another."""
    return "" if cfg.engine.quantization == "off" else cfg.engine.quantization


def uses_vllm(cfg: Config) -> bool:
    return cfg.teachers.engine == "vllm"


def _vllm_loader(cfg: Config) -> Load:
    from consilience.teachers.vllm_teacher import VllmLoader

    return VllmLoader(
        python=cfg.rollout.vllm.python or sys.executable,
        max_length=cfg.rollout.max_length,
        settings=cfg.teachers.settings,
    )
