"""The write-ahead log of one worker: what was sampled, on disk before anything reads it.

    log.open(request…)                     a turn begins
    engine.step(); log.step(new_tokens)    buffered, then one write for all rows        (group commit)
    log.end(uid, finish); log.sync()       durable, and the lease still holds: now the turn may be shown
    log.intent(uid, call…); log.sync()     before the call is run
    log.results(uid, texts…); log.sync()   before the model sees them

A segment is a frame file `<epoch>-<segment>.log`; a full one is followed by the next. Where the lease names a
second folder, a copy of each goes there, behind the first (`log_copy.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from consilience.conf.errors import EngineError
from consilience.rollout.engine import NewTokens
from consilience.rollout.frame_file import FrameFile
from consilience.rollout.lease import Lease
from consilience.rollout.log_copy import LogCopy
from consilience.rollout.log_frames import (
    LoggedEpisode,
    crc_of,
    encode_claim,
    encode_end,
    encode_intent,
    encode_next,
    encode_open,
    encode_results,
    encode_step,
)

SEGMENT_BYTES = 64 << 20


class TokenLog:
    """One owner's log under its lease. EngineError when the disk takes no more, or once there is a fence.

    A request is a turn of a job's episode, known by `request_uid`; those of one job are opened in order.
    """

    def __init__(self, lease: Lease, *, segment_bytes: int = SEGMENT_BYTES) -> None:
        lease.must_hold()
        self.lease, self.segment_bytes = lease, segment_bytes
        self._numbers: dict[str, int] = {}  # request uid -> its name in the frames
        self._num_opened = self._num_steps = self._segment = 0
        self._buffer: list[bytes] = []
        self._copy = None if lease.copy_folder is None else LogCopy(lease.copy_folder)
        self._file = self._next_file()

    def claim(self, episodes: Iterable[tuple[LoggedEpisode, Sequence[str]]]) -> None:
        """Take over episodes (with their turns' request uids): each in one frame, all durable on return."""
        for episode, request_uids in episodes:
            self._buffer.append(encode_claim(episode, [self._name(uid) for uid in request_uids]))
        self.sync()

    def open(self, request_uid: str, uid: str, turn: int, prompt_ids: Sequence[int], seed: int) -> None:
        """Turn `turn` of job `uid` begins: what it appends before sampling, its seed. Not if claimed."""
        self._buffer.append(encode_open(self._name(request_uid), uid, turn, crc_of(prompt_ids), seed))

    def step(self, new: NewTokens) -> None:
        """The tokens of one step and whatever was buffered, in one write: `kill -9` loses none of them.

        Tokens of requests that were never opened here are left out (those of a stream that was broken off).
        """
        try:
            numbers = [self._numbers[uid] for uid in new.uids]
        except KeyError:
            known = NewTokens(new.weight_version)
            for row in zip(new.uids, new.positions, new.token_ids, new.logprobs):
                if row[0] in self._numbers:
                    known.add(*row)
            new, numbers = known, [self._numbers[uid] for uid in known.uids]
        if numbers:
            self._buffer.append(encode_step(numbers, new, self._num_steps, time.time()))
            self._num_steps += 1
        self._write()

    def end(self, request_uid: str, finish: str) -> None:
        """The turn is over; its tokens were logged before."""
        self._buffer.append(encode_end(self._numbers[request_uid], finish))

    def intent(self, request_uid: str, call: int, name: str, boxes: Sequence[Sequence[str]]) -> None:
        """Tool call `call` of the turn is about to run in the last of the episode's boxes; `sync` first."""
        self._buffer.append(encode_intent(self._numbers[request_uid], call, name, boxes))

    def results(
        self, request_uid: str, results: Sequence[str], boxes: Sequence[Sequence[str]], first: int = 0
    ) -> None:
        """What the turn's calls from `first` on answered, and [id, isolation] of the episode's boxes."""
        self._buffer.append(encode_results(self._numbers[request_uid], results, boxes, first))

    def sync(self) -> None:
        """Everything so far is durable, and nobody had taken over when it was: it may be shown."""
        self._write()
        self._file.sync()
        self.lease.must_hold()
        if self._file.num_bytes > self.segment_bytes:
            self._buffer.append(encode_next(self._file.num_frames))
            self._file.close()
            self._segment += 1
            self._file = self._next_file()

    def close(self) -> None:
        """Safe to call twice. What is buffered is not written: nothing waited for it."""
        self._file.close()
        if self._copy is not None:
            self._copy.close()

    def _name(self, request_uid: str) -> int:
        if request_uid in self._numbers:
            raise EngineError(f"request {request_uid} is in the log already; uids are unique over a run")
        self._numbers[request_uid] = self._num_opened
        self._num_opened += 1
        return self._numbers[request_uid]

    def _write(self) -> None:
        if self._buffer:
            frames, self._buffer = self._buffer, []  # the file keeps what the disk does not take
            self._file.append(frames)
            if self._copy is not None:
                self._copy.follow(self._file.path, self._file.num_bytes)

    def _next_file(self) -> FrameFile:
        path = segment_path(self.lease.folder, self.lease.epoch, self._segment)
        return FrameFile.create(path, survives_power=self.lease.survives_power)


def segment_path(folder: Path, epoch: int, segment: int) -> Path:
    return folder / f"{epoch:08d}-{segment:06d}.log"
