"""One thing read in the background while something else runs: the next head, the next teacher's files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from consilience.conf.errors import EngineError

T = TypeVar("T")
_PIECE = 8 << 20


class ReadAhead(Generic[T]):
    """`read` runs in a thread from construction on; `take` waits for it and gives what it gave or raised."""

    def __init__(self, read: Callable[[], T], what: str) -> None:
        self._what = what
        self._found: T | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name=f"read {what}", daemon=True)
        self._thread.start()

    def _run(self, read: Callable[[], T]) -> None:
        try:
            self._found = read()
        except BaseException as error:  # raised where it is taken
            self._error = error

    def take(self, limit_s: float = 600.0) -> T:
        """What was read. EngineError if it is not there within `limit_s`; else what `read` raised."""
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise EngineError(f"{self._what} could not be read within {limit_s:.0f} s; is its disk alive?")
        if self._error is not None:
            raise self._error
        return self._found  # type: ignore[return-value]  # T may be None

    def drop(self) -> None:
        """Nobody takes it; a thread that still reads ends by itself and its result goes."""
        self._found = None


class WarmFiles:
    """Reads the weight files of a folder once, for the page cache; `stop` ends it after the next piece.

    A teacher whose files are in the page cache loads at the speed of memory. What does not fit there is
    dropped by the kernel, oldest first: this costs reads and never memory.
    """

    def __init__(self, folder: Path | str) -> None:
        self._is_stopped = threading.Event()
        self._read = ReadAhead(lambda: self._warm(Path(folder)), f"files of {folder}")

    def _warm(self, folder: Path) -> int:
        """Bytes read. A file that cannot be read is left to the loader, which says so."""
        total = 0
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with open(path, "rb", buffering=0) as file:
                    if hasattr(os, "posix_fadvise"):
                        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
                    while not self._is_stopped.is_set() and (piece := file.read(_PIECE)):
                        total += len(piece)
            except OSError:
                break
        return total

    def finish(self, limit_s: float = 600.0) -> int:
        """Bytes read, once all are."""
        return self._read.take(limit_s)

    def stop(self) -> None:
        self._is_stopped.set()
        self._read.drop()
