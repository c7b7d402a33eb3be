"""Rollout records on disk: one `<phase>.jsonl` a phase in a stage's `rollouts/` folder."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from consilience.conf.errors import RunError
from consilience.rollout.records import RolloutRecord


class RolloutStore:
    """Writes each phase at once, beside and renamed: a file that exists is complete."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def append(self, phase: str, records: Sequence[RolloutRecord]) -> Path:
        """Store the records of `phase` (letters, digits, "-", "_", "."); an equal phase is replaced.

        RunError when the disk does not take it; then no file of this phase is left half-written.
        """
        if not re.fullmatch(r"[\w-][\w.-]*", phase):
            raise RunError(f"phase name {phase!r}: use letters, digits, '-', '_' and '.'")
        final = self.folder / f"{phase}.jsonl"
        beside = self.folder / f".{phase}.jsonl.{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with beside.open("w", encoding="utf-8", errors="surrogatepass") as file:
                for record in records:
                    file.write(record.to_json() + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, final)
        except BaseException as error:  # Ctrl-C too leaves nothing half-written
            with contextlib.suppress(OSError):
                beside.unlink()
            if not isinstance(error, OSError):
                raise
            raise RunError(f"cannot write {final}: {error.strerror}; free space there and resume") from None
        return final

    def phases(self) -> list[str]:
        """Names of the stored phases, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.jsonl") if not path.name.startswith("."))

    def read(self, phase: str | None = None) -> Iterator[RolloutRecord]:
        """Records of one phase, or of all in order. RunError names file and line of a damaged one."""
        for name in [phase] if phase is not None else self.phases():
            path = self.folder / f"{name}.jsonl"
            try:
                with path.open(encoding="utf-8", errors="surrogatepass") as file:
                    yield from _parse(path, file)
            except OSError as error:
                raise RunError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: Path, lines: Iterator[str]) -> Iterator[RolloutRecord]:
    for number, line in enumerate(lines, 1):
        try:
            yield RolloutRecord.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} line {number} is no rollout record: {error}") from None
