"""The durable record of a stage's publications: from the version in a token to the bytes that sampled it.

One frame file (`frame_file.py`), each publication on the disk before any worker has its weights. Names,
types and shapes are the same for a whole stage, so they stand in a frame of their own, and a publication
costs 32 bytes a tensor:

    L layout       sha256 of what follows, as 64 hex digits; then JSON {name: [dtype, shape], …}
    P publication  u32 length of a JSON head {version, digest, quantization, time_s, layout}; then 32 bytes
                   for each tensor, in the layout's order

A version stands here more than once where a stage went on from a checkpoint and published it again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from consilience.conf.errors import RunError
from consilience.rollout.frame_file import FrameFile, read_frames
from consilience.rollout.publishing import Publication, TensorRecord

_LENGTH = struct.Struct("<I")
_DIGEST_BYTES, _LAYOUT_CHARS = 32, 64
Layout = dict[str, tuple[str, tuple[int, ...]]]


class PublicationLog:
    """One stage's publications, to be added to. EngineError where the file is damaged.

    Opening it reads what is there and cuts a torn tail off; there is one writer, the stage's driver.
    """

    def __init__(self, path: Path, *, survives_power: bool = True) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file, payloads = FrameFile.reopen(path)
        self._file.survives_power = survives_power
        self._layouts, self._publications = _decode(path, payloads)

    def record(self, publication: Publication) -> None:
        """The publication is on the disk when this returns. EngineError when the disk does not take it."""
        layout = _layout_of(publication)
        key = _key(layout)
        frames = []
        if key not in self._layouts:
            frames.append(b"L" + key.encode() + _json(layout))
        frames.append(_encode(publication, key))
        self._file.append(frames)
        self._file.sync()
        self._layouts[key] = layout
        self._publications.append(publication)

    def trace(self, version: int, time_s: float | None = None) -> Publication:
        """What `version` was: its last publication, or the last one before `time_s` (seconds since 1970).

        RunError if there is none.
        """
        return trace(self._publications, version, time_s, self.path)

    @property
    def publications(self) -> tuple[Publication, ...]:
        """All of them, in the order in which they were announced."""
        return tuple(self._publications)

    def close(self) -> None:
        self._file.close()


def read_publications(path: Path) -> list[Publication]:
    """The publications of a log that somebody may be writing. RunError if it is no such log or damaged."""
    try:
        found = read_frames(path)
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    if found.has_hole:
        raise RunError(f"{path} is damaged behind frame {len(found.payloads)}; restore it from a copy")
    return _decode(path, found.payloads)[1]


def trace(
    publications: list[Publication], version: int, time_s: float | None = None, path: Path | None = None
) -> Publication:
    """See `PublicationLog.trace`."""
    fitting = [
        p for p in publications if p.version == version and (time_s is None or p.time_s <= time_s)
    ]  # fmt: skip
    if not fitting:
        known = sorted({p.version for p in publications})
        raise RunError(
            f"{path or 'the log'} has no publication of version {version}"
            f"{'' if time_s is None else f' before {time_s:.3f}'}; it has {known[:3]} … {known[-3:]}"
        )
    return fitting[-1]


def _layout_of(publication: Publication) -> Layout:
    return {name: (t.dtype, t.shape) for name, t in sorted(publication.tensors.items())}


def _key(layout: Layout) -> str:
    return hashlib.sha256(_json(layout)).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("utf-8")


def _encode(publication: Publication, key: str) -> bytes:
    head = _json(
        {
            "version": publication.version,
            "digest": publication.digest,
            "quantization": publication.quantization,
            "time_s": publication.time_s,
            "layout": key,
        }
    )
    digests = (bytes.fromhex(t.digest) for _, t in sorted(publication.tensors.items()))
    return b"".join((b"P", _LENGTH.pack(len(head)), head, *digests))


def _decode(path: Path, payloads: list[bytes]) -> tuple[dict[str, Layout], list[Publication]]:
    layouts: dict[str, Layout] = {}
    publications: list[Publication] = []
    for number, payload in enumerate(payloads):
        try:
            if payload[:1] == b"L":
                key, text = payload[1 : 1 + _LAYOUT_CHARS].decode(), payload[1 + _LAYOUT_CHARS :]
                layouts[key] = {name: (d, tuple(s)) for name, (d, s) in json.loads(text).items()}
            else:
                publications.append(_publication(payload, layouts))
        except (ValueError, KeyError, struct.error) as error:
            raise RunError(f"{path} frame {number} is no publication: {error!r}") from None
    return layouts, publications


def _publication(payload: bytes, layouts: dict[str, Layout]) -> Publication:
    (length,) = _LENGTH.unpack_from(payload, 1)
    first = 1 + _LENGTH.size
    head = json.loads(payload[first : first + length])
    layout, at = layouts[head["layout"]], first + length
    if payload[:1] != b"P" or len(payload) != at + _DIGEST_BYTES * len(layout):
        raise ValueError(f"{len(payload)} bytes do not hold {len(layout)} tensors")
    tensors = {}
    for name, (dtype, shape) in layout.items():
        tensors[name] = TensorRecord(dtype, shape, payload[at : at + _DIGEST_BYTES].hex())
        at += _DIGEST_BYTES
    return Publication(head["version"], head["digest"], tensors, head["quantization"], head["time_s"])
