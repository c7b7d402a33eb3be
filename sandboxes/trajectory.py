"""The trajectory log of a sandbox: every command and its result, in order, each record bound to those before.

An append-only file of lines "hash record", hash = SHA-256(hash of the line before + record), and a folder of
blobs named by their SHA-256. INTENT is written before a command is sent, RESULT before anybody sees it
("model-visible means logged"; sandboxes.md 5.7):

    open      what the box is: driver, level, runtime
    intent    {seq, op, args_hash, is_idempotent, args}
    result    {seq, outcome}: exit code, byte counts, stdout and stderr; or the error that was raised
    event     client that went on, …

A torn last line is what a crash leaves, and is cut off. Any other damage breaks the chain, and is named.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from consilience.conf.errors import TrajectoryBroken
from consilience.sandboxes.protocol import ExecResult, ExecStatus, ShellState, Snapshot

START = "0" * 64  # what the first record is bound to
_KEPT_RESULTS = 8  # in memory
_INLINE_BYTES = 256  # smaller blobs stand in the line itself


@dataclass(slots=True)
class Entry:
    """One command: what was asked, and what came of it (None: not known). `outcome` is a RESULT's fields."""

    seq: int
    op: str
    args_hash: str
    args: Mapping[str, Any]
    is_idempotent: bool
    outcome: dict[str, Any] | None = None


def plain(value: Any) -> Any:
    """Arguments as JSON can hold them: bytes become {"bytes": base64}."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, Mapping):
        return {str(key): plain(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def unplain(value: Any) -> Any:
    """The inverse of `plain`."""
    if isinstance(value, Mapping):
        is_bytes = set(value) == {"bytes"}
        return base64.b64decode(value["bytes"]) if is_bytes else {k: unplain(value[k]) for k in value}
    return [unplain(item) for item in value] if isinstance(value, list) else value


def hash_of(op: str, args: Mapping[str, Any]) -> str:
    """What two commands share if and only if they are the same: SHA-256 of operation and arguments."""
    return hashlib.sha256(json.dumps([op, plain(args)], sort_keys=True).encode()).hexdigest()


class TrajectoryLog:
    """The log of one box in `folder`, opened for more: `entries` are what it holds so far.

    TrajectoryBroken, naming the entry, if a record is not bound to the one before it or is none at all.
    `survives_power`: fsync each record; without, it survives the death of the process. Without a folder it is
    kept in memory, for a box that ends with its process: hashes of all commands, the last results.
    """

    def __init__(self, folder: Path | None, *, survives_power: bool = False) -> None:
        self._survives_power = survives_power
        self.pinned: dict[str, Any] | None = None
        self.events: list[dict[str, Any]] = []
        self.entries: list[Entry] = []
        self._head = START
        self.folder, self._fd = folder, -1
        if folder is None:
            return
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        whole = self._read()
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, whole)
        os.lseek(self._fd, whole, os.SEEK_SET)

    def pin(self, facts: Mapping[str, Any]) -> None:
        """The first record: what the box is. A log that has one keeps it."""
        if self.pinned is None:
            self.pinned = dict(plain(facts))
            self._append({"kind": "open", "facts": self.pinned})

    def intend(self, op: str, args: Mapping[str, Any], *, is_idempotent: bool) -> Entry:
        """A command that is about to be sent; durable when this returns."""
        kept = {} if self.folder is None else plain(args)
        entry = Entry(len(self.entries) + 1, op, hash_of(op, args), kept, is_idempotent)
        self.entries.append(entry)
        if self.folder is None:
            if len(self.entries) > _KEPT_RESULTS:
                self.entries[-1 - _KEPT_RESULTS].outcome = None
            return entry
        record = {"kind": "intent", "seq": entry.seq, "op": op, "args_hash": entry.args_hash}
        text = json.dumps(entry.args, sort_keys=True).encode()
        self._append({**record, "is_idempotent": is_idempotent, "args": self._keep(text)})
        return entry

    def settle(self, entry: Entry, outcome: Mapping[str, Any]) -> None:
        """What became of it (`outcome_of`); durable when this returns."""
        entry.outcome = dict(outcome)
        kept = {k: self._keep(v) if isinstance(v, bytes) else v for k, v in outcome.items()}
        self._append({"kind": "result", "seq": entry.seq, "outcome": kept})

    def note(self, what: str, **facts: Any) -> None:
        """An event that is no command."""
        self.events.append({"what": what, **facts})
        self._append({"kind": "event", "what": what, "facts": plain(facts)})

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, record: dict[str, Any]) -> None:
        if self.folder is None:
            return
        clock = {"wall": time.time(), "monotonic": time.monotonic()}
        body = json.dumps({**record, **clock}, sort_keys=True).encode()
        self._head = _bound(self._head, body)
        view = memoryview(self._head.encode() + b" " + body + b"\n")
        while view:
            view = view[os.write(self._fd, view) :]
        if self._survives_power:
            os.fdatasync(self._fd)

    def _keep(self, data: bytes) -> dict[str, Any]:
        """Where the bytes are: in the line, or in a blob that is whole before the line names it."""
        digest = hashlib.sha256(data).hexdigest()
        if self.folder is None or len(data) <= _INLINE_BYTES:
            return {"sha256": digest, "bytes": base64.b64encode(data).decode()}
        path = self.folder / "blobs" / digest
        if not path.exists():
            beside = path.with_name(f"{digest}.{os.getpid()}")
            with open(beside, "wb") as file:
                file.write(data)
                if self._survives_power:
                    file.flush()
                    os.fsync(file.fileno())
            beside.rename(path)
        return {"sha256": digest}

    def _kept(self, where: Mapping[str, Any], number: int) -> bytes:
        if "bytes" in where:
            data = base64.b64decode(where["bytes"])
        else:
            assert self.folder is not None  # or nothing would be read
            path = self.folder / "blobs" / where["sha256"]
            data = path.read_bytes() if path.exists() else None
        if data is None or hashlib.sha256(data).hexdigest() != where["sha256"]:
            state = "is missing" if data is None else "has changed"
            raise TrajectoryBroken(f"{self._path}: a blob of record {number} {state}: {where['sha256']}")
        return data

    def _read(self) -> int:
        """Take in what is there; the length of its whole lines."""
        data = self._path.read_bytes() if self._path.exists() else b""
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines()):
            digest, _, body = line.partition(b" ")
            head = _bound(self._head, body)
            if digest != head.encode():
                raise TrajectoryBroken(
                    f"{self._path}: the chain breaks at record {number} (command {len(self.entries)} is the "
                    "last that holds): it was changed, or the one before it is gone"
                )
            self._take(number, json.loads(body))
            self._head = head
        return whole

    def _take(self, number: int, record: dict[str, Any]) -> None:
        if record["kind"] == "open":
            self.pinned = record["facts"]
        elif record["kind"] == "event":
            self.events.append({"what": record["what"], **record["facts"]})
        elif record["kind"] == "intent":
            args = json.loads(self._kept(record["args"], number))
            found = (record["seq"], record["op"], record["args_hash"], args, record["is_idempotent"])
            self.entries.append(Entry(*found))
        else:
            outcome = record["outcome"]
            names = {k: self._kept(v, number) if isinstance(v, Mapping) else v for k, v in outcome.items()}
            self.entries[record["seq"] - 1].outcome = names


def _bound(head: str, body: bytes) -> str:
    return hashlib.sha256(head.encode() + body).hexdigest()


def outcome_of(value: ExecResult | Snapshot | bytes | OSError | None) -> dict[str, Any]:
    """A verb's answer, for `settle`; `value_of` is its inverse."""
    if isinstance(value, ExecResult):
        row = asdict(replace(value, enforced=None))  # a fact of the box, which the log's first record tells
        return {**row, "status": value.status.value, "shell": value.shell and value.shell.value}
    if isinstance(value, Snapshot):
        return asdict(value)
    if isinstance(value, OSError):
        return {"errno": value.errno, "text": value.strerror or str(value)}
    return {"data": value}


def value_of(outcome: Mapping[str, Any]) -> ExecResult | Snapshot | bytes | None:
    """What the verb returned then; raises the OSError that it raised."""
    if "errno" in outcome:
        raise OSError(outcome["errno"], outcome["text"])
    if "status" in outcome:
        shell = outcome.get("shell")
        told = {"status": ExecStatus(outcome["status"]), "shell": ShellState(shell) if shell else None}
        return ExecResult(**{**outcome, **told})
    if "archive" in outcome:
        return Snapshot(**outcome)
    return outcome["data"]
