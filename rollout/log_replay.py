"""From the segments of a log folder back to the episodes: exactly what their owners had written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from consilience.rollout.frame_file import Frames, read_frames
from consilience.rollout.lease import fenced_epochs
from consilience.rollout.log_frames import (
    LoggedEpisode,
    LoggedTurn,
    decode_claim,
    decode_json,
    decode_step,
    encode_next,
)


@dataclass(slots=True)
class Replay:
    """episodes by job uid; faults: what was found damaged, by file or job; such a job starts again."""

    episodes: dict[str, LoggedEpisode] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def replay(folder: Path, *, only: Collection[str] | None = None, copy: Path | None = None) -> Replay:
    """What the fenced epochs of a folder hold, of the jobs in `only` where given.

    copy  folder with a second copy of the segments, which counts where the first is lost or damaged

    An episode is the one of the highest epoch that has a frame of it; lower ones had been taken over.
    """
    found = Replay()
    for epoch in fenced_epochs(folder):
        reader = _Epoch(epoch)
        num_before = 0
        for path in _segments(folder, copy, epoch):
            frames = _read(path, copy)
            if not frames.payloads and not frames.has_hole:
                break  # made, and nothing written yet
            is_next = reader.num_segments == 0 or _follows(frames.payloads, num_before)
            if is_next:
                for payload in frames.payloads:
                    reader.take(payload)
            reader.num_segments, num_before = reader.num_segments + 1, len(frames.payloads)
            if frames.has_hole or not is_next:
                lost = f"behind frame {num_before}" if is_next else "at the end of the segment before"
                found.faults[path.name] = f"frames {lost} were acknowledged and are gone"
                break  # what later segments add stands behind something that is lost
        for uid in reader.faults.keys() | reader.episodes.keys():
            found.episodes.pop(uid, None)
            found.faults.pop(uid, None)
        found.faults |= reader.faults
        found.episodes |= {u: e for u, e in reader.episodes.items() if u not in reader.faults}
    if only is not None:
        wanted = set(only)
        found.episodes = {u: e for u, e in found.episodes.items() if u in wanted}
    return found


def _segments(folder: Path, copy: Path | None, epoch: int) -> list[Path]:
    """Where an epoch's segments are or were, in order."""
    folders = [folder] if copy is None else [folder, copy]
    return [folder / name for name in sorted({p.name for f in folders for p in f.glob(f"{epoch:08d}-*.log")})]


def _read(path: Path, copy: Path | None) -> Frames:
    """The frames of a segment, or of its copy where that has more of them.

    There is a hole if the first copy has one and the other one ends before the first did.
    """
    first = read_frames(path) if path.exists() else Frames([], 0, None, False, False)
    if copy is None or not (copy / path.name).exists():
        return first
    second = read_frames(copy / path.name)
    if len(second.payloads) <= len(first.payloads):
        return first
    is_behind = first.has_hole and second.num_bytes < path.stat().st_size
    return replace(second, has_hole=second.has_hole or is_behind)


def _follows(payloads: list[bytes], num_before: int) -> bool:
    return payloads[:1] == [encode_next(num_before)]


class _Epoch:
    """One owner's frames, in order."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.num_segments = 0
        self.episodes: dict[str, LoggedEpisode] = {}
        self.faults: dict[str, str] = {}
        self._turns: dict[int, tuple[str, LoggedTurn]] = {}  # number -> (job uid, turn)

    def take(self, payload: bytes) -> None:
        match payload[:1]:
            case b"S":
                version, tokens = decode_step(payload)
                for number, position, token, logprob in tokens:
                    self._token(number, position, token, logprob, version)
            case b"O":
                self._open(decode_json(payload))
            case b"C":
                episode, numbers = decode_claim(payload, self.epoch)
                self.episodes[episode.uid] = episode
                for number, turn in zip(numbers, episode.turns):
                    self._turns[number] = (episode.uid, turn)
            case b"E":
                row = decode_json(payload)
                self._turns[row["number"]][1].finish = row["finish"]
            case b"I":
                row = decode_json(payload)
                turn = self._turns[row["number"]][1]
                turn.num_begun, turn.boxes = row["call"] + 1, row["boxes"]
            case b"R":
                row = decode_json(payload)
                turn = self._turns[row["number"]][1]
                turn.results = [*(turn.results or [])[: row.get("first", 0)], *row["results"]]
                turn.boxes = row["boxes"]

    def _open(self, row: dict) -> None:
        uid = row["uid"]
        episode = self.episodes.setdefault(uid, LoggedEpisode(uid, self.epoch))
        if row["turn"] != len(episode.turns):
            self.faults[uid] = f"turn {row['turn']} follows {len(episode.turns)} turns"
        turn = LoggedTurn(row["prompt_crc"], row["seed"])
        episode.turns.append(turn)
        self._turns[row["number"]] = (uid, turn)

    def _token(self, number: int, position: int, token: int, logprob: float, version: int) -> None:
        uid, turn = self._turns[number]
        known = len(turn.token_ids)
        if position == known:
            turn.token_ids.append(token)
            turn.logprobs.append(logprob)
            turn.versions.append(version)
        elif position > known:
            self.faults[uid] = f"token {position} follows {known} tokens"
        elif (turn.token_ids[position], turn.logprobs[position], turn.versions[position]) != (
            token,
            logprob,
            version,
        ):
            self.faults[uid] = f"token {position} was written twice and differently"
