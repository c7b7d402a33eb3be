"""A second copy of a token log in another folder, on another disk or node: written behind the first.

The owner of the log says how far its segments are whole; a thread brings the copy up to there, all that came
meanwhile in one write and one fdatasync. Nobody waits for it: what the copy has not got when both machine and
first copy are lost is sampled again. A copy is a beginning of the same bytes, so it is read like the first.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_GROUP_S = 0.05  # what is written in this time goes together
_END_S = 5.0


class LogCopy:
    """The copies of one owner's segments.

    num_bytes  that the copy's disk has;  fault  why it ended early, "" while it goes on
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.num_bytes, self.fault = 0, ""
        self._whole: dict[Path, int] = {}  # segment -> its whole bytes, in the order of the segments
        self._changed, self._is_over = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="log-copy", daemon=True)
        self._thread.start()

    def follow(self, segment: Path, num_bytes: int) -> None:
        """(owner) `segment` is whole up to there."""
        self._whole[segment] = num_bytes
        self._changed.set()

    def close(self) -> None:
        """Bring the copy up to date, for a few seconds at most. Safe to call twice."""
        self._is_over = True
        self._changed.set()
        self._thread.join(_END_S)

    def _work(self) -> None:
        """(its thread)"""
        at: dict[Path, int] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._is_over:
                self._changed.wait()  # no limit: `close` ends it
                self._changed.clear()
                self._catch_up(at)
                if not self._is_over:
                    time.sleep(_GROUP_S)
            self._catch_up(at)
        except OSError as error:  # the first copy is what counts
            self.fault = f"{self.folder}: {error.strerror}"

    def _catch_up(self, at: dict[Path, int]) -> None:
        for segment, whole in list(self._whole.items()):
            start = at.get(segment, 0)
            if whole == start:
                continue
            with open(segment, "rb") as first, open(self.folder / segment.name, "ab") as copy:
                first.seek(start)
                copy.write(first.read(whole - start))
                copy.flush()
                os.fdatasync(copy.fileno())
            at[segment] = whole
            self.num_bytes += whole - start
