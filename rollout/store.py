"""Rollout records on disk: one `<phase>.jsonl` a phase in a stage's `rollouts/` folder.

While a phase is being sampled, its records so far are frames of `<phase>.partial`, the tokens of its
unfinished episodes lie in `token_log/<phase>/`; both go when the phase is whole. The per-token fields of long
records stay where their workers put them, in `<phase>.tokens/`. `ledger.log` says what was trained on,
`publications.log` which weights each version is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Container, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from consilience.conf.errors import RunError
from consilience.rollout.frame_file import FrameFile
from consilience.rollout.ledger import PromptLedger
from consilience.rollout.publication_log import PublicationLog
from consilience.rollout.records import RolloutRecord


class RolloutStore:
    """Writes each phase at once, beside and renamed: a file that exists is complete.

    survives_power  token logs of an unfinished phase survive the machine's end, not only the processes'
    quantization    how the workers compute with what is published
    log_copy        folder for second copies of the token logs, one folder a phase; None: there are none
    stalls          file in which the run's workers note what was over its limit
    health          step -> numbers for its metrics, of phases that were asked for (`phases.py`)
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        survives_power: bool = False,
        quantization: str = "off",
        stalls: Path | None = None,
        log_copy: Path | None = None,
    ) -> None:
        self.folder, self.survives_power, self.stalls = Path(folder), survives_power, stalls
        self.quantization, self.log_copy = quantization, log_copy
        self.health: dict[int, dict[str, float]] = {}

    @cached_property
    def publications(self) -> PublicationLog:
        """The stage's record of published weights, opened when first asked for."""
        return PublicationLog(self.folder / "publications.log")

    @cached_property
    def ledger(self) -> PromptLedger:
        """The stage's prompt ledger, opened when first asked for."""
        return PromptLedger(self.folder / "ledger.log")

    def log_folder(self, phase: str) -> Path:
        """Where the workers of an unfinished phase log their tokens."""
        return self.folder / "token_log" / phase

    def log_copy_folder(self, phase: str) -> Path | None:
        """Where a second copy of these logs goes (`log_copy.py`)."""
        return None if self.log_copy is None else self.log_copy / phase

    def columns_folder(self, phase: str) -> Path:
        """Where its workers put the per-token fields of long records (`columns.py`)."""
        return self.folder / f"{phase}.tokens"

    def partial(self, phase: str) -> PartialPhase:
        """The records of an unfinished phase, to be added to. EngineError where its file is damaged."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return PartialPhase(self.folder / f"{phase}.partial")

    def clear_partial(self, phase: str) -> None:
        """Remove what a phase no longer needs once its file is whole."""
        (self.folder / f"{phase}.partial").unlink(missing_ok=True)
        for unfinished in self.folder.glob(f".{phase}.jsonl.*"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        for folder in (self.log_folder(phase), self.log_copy_folder(phase)):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

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
                    yield from _parse(path, file)  # references are to this folder
            except OSError as error:
                raise RunError(f"cannot read {path}: {error.strerror}") from None


def _parse(path: Path, lines: Iterator[str]) -> Iterator[RolloutRecord]:
    for number, line in enumerate(lines, 1):
        try:
            yield RolloutRecord.from_json(line, path.parent)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} line {number} is no rollout record: {error}") from None


class PartialPhase:
    """Records of one phase as they arrive, each call's on the disk when it returns.

    records  by uid, those found at the opening included
    """

    def __init__(self, path: Path) -> None:
        self._file, payloads = FrameFile.reopen(path)
        lines = (payload.decode("utf-8", "surrogatepass") for payload in payloads)
        self.records = {record.uid: record for record in _parse(path, lines)}

    def add(self, records: Sequence[RolloutRecord], again: Container[str] = ()) -> None:
        """EngineError when the disk does not take them. A record of a known uid is taken only if `again` has
        it; the newer one then counts."""
        new = {r.uid: r for r in records if r.uid not in self.records or r.uid in again}
        if new:
            self._file.append([r.to_json().encode("utf-8", "surrogatepass") for r in new.values()])
            self._file.sync()
            self.records |= new

    def close(self) -> None:
        self._file.close()
