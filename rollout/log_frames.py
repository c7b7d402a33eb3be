"""What the token log's frames say: the records of one episode's turns, and their bytes.

    O open     a turn's request, under a number that is its name in this epoch's segments
    C claim    a whole episode so far, copied by a new owner before it goes on
    S step     the tokens one engine step sampled
    E end      a turn's finish
    I intent   a tool call of the turn begins, in the last of the boxes; on the disk before it does
    R results  what the turn's tool calls answered from call `first` on, and the boxes they ran in
    N next     first in every segment but an epoch's first: frames of the segment before

A frame's first byte says which. O, E, I, R and N are JSON; in C a JSON head is followed by arrays; S is
arrays: u32 step, f64 time, i32 version, u32 n, then numbers u32[n], positions u32[n], tokens i32[n],
logprobs f32[n].
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from consilience.rollout.engine import NewTokens

_STEP = struct.Struct("<cIdiI")
_HEAD = struct.Struct("<cI")


@dataclass(slots=True)
class LoggedTurn:
    """One assistant turn as the log has it.

    prompt_crc  CRC-32 of the int32 ids that the turn's request appended before sampling; with `seed` it says
                whether a job that is run again is the same one
    finish      of the Completed, None while the turn was being decoded
    results     texts that the first of the turn's tool calls answered, None while none had
    boxes       [id, isolation label] of the boxes used so far
    num_begun   number of the newest call that was begun, from 1; above the number of results: nobody knows
                what that call did
    """

    prompt_crc: int
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: str | None = None
    results: list[str] | None = None
    boxes: list[list[str]] = field(default_factory=list)
    num_begun: int = 0


@dataclass(slots=True)
class LoggedEpisode:
    """All turns of one job so far, as the owner of the highest epoch wrote them."""

    uid: str
    epoch: int
    turns: list[LoggedTurn] = field(default_factory=list)


def crc_of(token_ids: Sequence[int]) -> int:
    """CRC-32 of the ids as int32."""
    return zlib.crc32(np.asarray(token_ids, np.int32).tobytes())


def encode_open(number: int, uid: str, turn: int, prompt_crc: int, seed: int) -> bytes:
    return _json(b"O", {"number": number, "uid": uid, "turn": turn, "prompt_crc": prompt_crc, "seed": seed})


def encode_next(num_frames: int) -> bytes:
    return _json(b"N", {"frames_before": num_frames})


def encode_end(number: int, finish: str) -> bytes:
    return _json(b"E", {"number": number, "finish": finish})


def encode_intent(number: int, call: int, name: str, boxes: Sequence[Sequence[str]]) -> bytes:
    row = {"number": number, "call": call, "name": name, "boxes": [list(box) for box in boxes]}
    return _json(b"I", row)


def encode_results(number: int, results: Sequence[str], boxes: Sequence[Sequence[str]], first: int) -> bytes:
    row = {"number": number, "first": first, "results": list(results), "boxes": [list(box) for box in boxes]}
    return _json(b"R", row)


def encode_step(numbers: Sequence[int], new: NewTokens, step: int, time_s: float) -> bytes:
    count = len(numbers)
    return b"".join(
        (
            _STEP.pack(b"S", step, time_s, new.weight_version, count),
            struct.pack(f"<{count}I", *numbers),
            struct.pack(f"<{count}I", *new.positions),
            struct.pack(f"<{count}i", *new.token_ids),
            struct.pack(f"<{count}f", *new.logprobs),
        )
    )


def decode_step(payload: bytes) -> tuple[int, Iterator[tuple[int, int, int, float]]]:
    """(weight version, (number, position, token, logprob) of each token)."""
    _, _, _, version, count = _STEP.unpack_from(payload)
    at = _STEP.size
    columns = []
    for kind in ("<u4", "<u4", "<i4", "<f4"):
        columns.append(np.frombuffer(payload, kind, count, at).tolist())
        at += 4 * count
    return version, zip(*columns)


def encode_claim(episode: LoggedEpisode, numbers: Sequence[int]) -> bytes:
    """`numbers` are the new owner's names of the turns."""
    turns, arrays = [], []
    for number, turn in zip(numbers, episode.turns):
        head = asdict(turn)
        for column in ("token_ids", "logprobs", "versions"):
            head["n"] = len(head.pop(column))
        turns.append(head | {"number": number})
        arrays += [
            np.array(turn.token_ids, "<i4"),
            np.array(turn.logprobs, "<f4"),
            np.array(turn.versions, "<i4"),
        ]
    text = json.dumps({"uid": episode.uid, "turns": turns}).encode("utf-8")
    return b"".join((_HEAD.pack(b"C", len(text)), text, *(a.tobytes() for a in arrays)))


def decode_claim(payload: bytes, epoch: int) -> tuple[LoggedEpisode, list[int]]:
    """The episode and the numbers of its turns."""
    _, length = _HEAD.unpack_from(payload)
    at = _HEAD.size + length
    head = json.loads(payload[_HEAD.size : at])
    episode, numbers = LoggedEpisode(head["uid"], epoch), []
    for fields in head["turns"]:
        count = fields.pop("n")
        numbers.append(fields.pop("number"))
        columns = []
        for kind in ("<i4", "<f4", "<i4"):
            columns.append(np.frombuffer(payload, kind, count, at).tolist())
            at += 4 * count
        turn = LoggedTurn(**fields)
        turn.token_ids, turn.logprobs, turn.versions = columns
        episode.turns.append(turn)
    return episode, numbers


def decode_json(payload: bytes) -> dict[str, Any]:
    return json.loads(payload[1:])


def _json(kind: bytes, row: dict[str, Any]) -> bytes:
    return kind + json.dumps(row).encode("utf-8")
