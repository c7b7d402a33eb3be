"""Who may write for which requests: a lease has an epoch, and a later epoch ends an earlier one's say.

    <folder>/00000003.lease    made exclusively, so no two owners have one epoch
    <folder>/00000003.fenced   made before anybody else takes over; from then on epoch 3 acknowledges nothing
    <folder>/00000003.pause    made by who gave the lease: its owner is to save its streams (streams/) and end

An owner writes first and looks for its fence afterwards; who takes over makes the fence first and reads
afterwards. So whatever an owner acknowledged is there for the reader, even if the owner was only frozen.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from consilience.conf.errors import EngineError
from consilience.rollout.frame_file import sync_folder


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write frames of one epoch into `folder`; plain data, travels to the worker that uses it.

    survives_power  what the worker's log must survive: the machine's end, or only its own
    columns_folder  where it puts the per-token fields of long records; None: nowhere
    copy_folder     where a second copy of its log goes; None: nowhere
    """

    folder: Path
    epoch: int
    survives_power: bool = False
    columns_folder: Path | None = None
    copy_folder: Path | None = None

    @property
    def is_fenced(self) -> bool:
        # Asked at every sync; through pathlib it takes ten times as long.
        return os.path.exists(f"{self.folder}/{_name(self.epoch, 'fenced')}")

    @property
    def is_to_pause(self) -> bool:
        """Whether who gave it asks its owner to save its streams and end."""
        return _file(self.folder, self.epoch, "pause").exists()

    @property
    def streams_folder(self) -> Path:
        """Where owners of this folder's leases leave the states of their streams when they pause."""
        return self.folder / "streams"

    def must_hold(self) -> None:
        """EngineError once somebody else has taken over."""
        if self.is_fenced:
            raise EngineError(
                f"lease {self.epoch} in {self.folder} was taken over by another worker; this one was taken "
                "for dead and stops, nothing of it is used from here on"
            )


def take_lease(
    folder: Path,
    owner: str,
    *,
    survives_power: bool = False,
    columns_folder: Path | None = None,
    copy_folder: Path | None = None,
) -> Lease:
    """A lease of an epoch above all others in the folder, which is made if need be, and in its copy."""
    folder.mkdir(parents=True, exist_ok=True)
    epoch = max([*_epochs(folder, "lease"), *_copied_epochs(copy_folder)], default=-1)
    while True:
        epoch += 1
        try:
            descriptor = os.open(_file(folder, epoch, "lease"), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            continue
        except OSError as error:
            raise EngineError(
                f"cannot take a lease in {folder}: {error.strerror}; free space there"
            ) from None
        # For people; nothing reads it, so a full disk may keep it empty: the log itself will say so.
        with contextlib.suppress(OSError), open(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps({"epoch": epoch, "owner": owner, "host": socket.gethostname()}) + "\n")
        sync_folder(folder)
        return Lease(folder, epoch, survives_power, columns_folder, copy_folder)


def fence(folder: Path, epochs: list[int] | None = None, *, copy_folder: Path | None = None) -> None:
    """End the say of `epochs`, of all epochs so far without it. What was fenced stays so.

    copy_folder  of the logs; epochs that only it still has are fenced too, in the first folder
    """
    lost = _copied_epochs(copy_folder)
    if lost:
        folder.mkdir(parents=True, exist_ok=True)
    for epoch in sorted({*_epochs(folder, "lease"), *lost}) if epochs is None else epochs:
        try:
            _file(folder, epoch, "fenced").touch()
        except OSError as error:
            raise EngineError(f"cannot fence {folder}: {error.strerror}; free space there") from None
    if folder.exists():
        sync_folder(folder)  # a fence that a loss of power undoes would revive an owner


def ask_to_pause(leases: Iterable[Lease]) -> None:
    """Their owners are to save their streams and end. Where a folder takes no file, nobody is asked."""
    for lease in leases:
        with contextlib.suppress(OSError):
            _file(lease.folder, lease.epoch, "pause").touch()


def fenced_epochs(folder: Path) -> list[int]:
    """Epochs whose owners have no say any more, ascending."""
    return _epochs(folder, "fenced")


def _copied_epochs(copy_folder: Path | None) -> set[int]:
    """Epochs whose segments have a copy."""
    found = () if copy_folder is None else copy_folder.glob("[0-9]" * 8 + "-*.log")
    return {int(path.name[:8]) for path in found}


def _epochs(folder: Path, kind: str) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("[0-9]" * 8 + f".{kind}"))


def _file(folder: Path, epoch: int, kind: str) -> Path:
    return folder / _name(epoch, kind)


def _name(epoch: int, kind: str) -> str:
    return f"{epoch:08d}.{kind}"
