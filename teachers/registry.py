"""Who teaches what: one owner teacher for each domain (post-training notes 6.1), or several by request.

A teacher is a name, the checkpoint folder it is read from, the domains it owns and the weight w_e of its
KL in the loss. Every prompt has its teachers from the start, by its domain: one, unless domains may be
shared; then the loss of its tokens is the sum of w_e KL_e over them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.conf.fields import nearest


@dataclass(frozen=True)
class TeacherRecord:
    """One teacher. Example: TeacherRecord("math", Path("runs/a/…/math"), ("math",), 1.0).

    weight is w_e, finite and above 0.
    """

    name: str
    checkpoint: Path
    domains: tuple[str, ...]
    weight: float = 1.0


class TeacherRegistry:
    """All teachers of a run, looked up by name or by the domain they own.

    is_shared  a domain may have several teachers; else that is taken for a mistake

    ConfigError: no teacher at all, a name given twice or with a "+" or "@" in it, a domain given twice that
    is not to be shared, a teacher without domains, a weight that is not finite and above 0.
    CheckpointError: a checkpoint folder that is missing or holds no config.json.
    """

    def __init__(self, records: Iterable[TeacherRecord], is_shared: bool = False) -> None:
        self._by_name: dict[str, TeacherRecord] = {}
        self._owners: dict[str, list[str]] = {}
        self._is_shared = is_shared
        for record in records:
            self._add(record)
        if not self._by_name:
            raise ConfigError(
                "the teacher registry is empty; name at least one: teachers.registry.NAME.domains=[…]"
            )

    def _add(self, record: TeacherRecord) -> None:
        if record.name in self._by_name:
            raise ConfigError(f"teacher '{record.name}' is registered twice; names must differ")
        if set("+@") & set(record.name):
            raise ConfigError(f"teacher '{record.name}': a name has no '+' and no '@'")
        if not record.domains:
            raise ConfigError(f"teacher '{record.name}' owns no domain; give it at least one")
        if not (math.isfinite(record.weight) and record.weight > 0):
            raise ConfigError(
                f"teacher '{record.name}' has weight {record.weight}; it must be finite and above 0"
            )
        for domain in record.domains:
            owners = self._owners.setdefault(domain, [])
            if owners and (not self._is_shared or record.name in owners):
                raise ConfigError(
                    f"domain '{domain}' has two teachers, '{owners[0]}' and '{record.name}'; a domain has "
                    "one owner, unless teachers.shared=true makes their weighted KLs add up"
                )
            owners.append(record.name)
        check_checkpoint(record)
        self._by_name[record.name] = record

    def __iter__(self) -> Iterator[TeacherRecord]:
        """Records in the order they were registered."""
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def get(self, name: str) -> TeacherRecord:
        """The teacher of that name. ConfigError names the nearest if there is none."""
        if name not in self._by_name:
            raise ConfigError(f"unknown teacher '{name}'; {nearest(name, self._by_name)}")
        return self._by_name[name]

    def owners(self, domain: str) -> tuple[TeacherRecord, ...]:
        """The teachers of a domain, as registered. ConfigError names the nearest domain if it has none."""
        if domain not in self._owners:
            raise ConfigError(f"no teacher owns domain '{domain}'; {nearest(domain, self._owners)}")
        return tuple(self._by_name[name] for name in self._owners[domain])

    def names(self, domain: str) -> str:
        """What a prompt of the domain carries as its teacher: "math", or "math+style"."""
        return "+".join(record.name for record in self.owners(domain))


def check_checkpoint(record: TeacherRecord) -> None:
    """CheckpointError unless the teacher's folder exists and holds a config.json."""
    folder = Path(record.checkpoint)
    key = f"teachers.registry.{record.name}.checkpoint"
    if not folder.is_dir():
        raise CheckpointError(
            f"teacher '{record.name}': no checkpoint folder {folder}; train it or set {key}"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"teacher '{record.name}': {folder} has no config.json, so it is no checkpoint; set {key}"
        )
