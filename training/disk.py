"""How a checkpoint touches the disk, and what is said where that fails."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from consilience.training.durable_files import fsync_file, is_disk_full, replace_folder
from consilience.training.tensor_files import write_tensors


@dataclass(frozen=True)
class Disk:
    """Every way a checkpoint touches the disk, so that a test can let any of them fail."""

    write_tensors: Callable[[Path, Mapping[str, Tensor]], None] = write_tensors
    write_text: Callable[[Path, str], Any] = lambda path, text: path.write_text(text, "utf-8")
    copy: Callable[[Path, Path], Any] = shutil.copyfile
    sync: Callable[[Path], None] = fsync_file
    publish: Callable[[Path, Path], None] = replace_folder


def why_not_written(folder: Path, error: Exception) -> str:
    """What to do about a checkpoint that could not be written to `folder`."""
    if is_disk_full(error):
        return (
            f"no room to write the checkpoint {folder}; the one before it is untouched. Free disk space "
            "(older step folders can go) and run again: it resumes from the last checkpoint"
        )
    return (
        f"the checkpoint {folder} could not be written ({type(error).__name__}: {error}); "
        "none was left half-written. Repair the folder or choose another, and run again"
    )


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
