"""The prompt ledger of a stage: each sample belongs to one step, and the weights have seen it once.

    issued (step)  ─►  stored  ─►  trained (step)          resumed (step): later trainings did not happen
                            └►  dropped (step, reason)  left training with their group, for good

One frame file of JSON events, each on the disk when the call returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import RunError
from consilience.rollout.frame_file import FrameFile


class PromptLedger:
    """Events so far, and the rules they must keep. RunError where one is broken, before anything is written.

    An event that says what is known already is not written again.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._issued: dict[str, int] = {}  # uid -> step
        self._stored: set[str] = set()
        self._trained: dict[str, int] = {}
        self._dropped: set[str] = set()
        self._file, payloads = FrameFile.reopen(path)
        for payload in payloads:
            self._apply(json.loads(payload))

    def issued(self, step: int, uids: Iterable[str]) -> None:
        """These samples are step `step`'s; before any worker sees them."""
        new = [uid for uid in uids if self._issued.get(uid) != step]
        for uid in new:
            if uid in self._issued:
                raise RunError(f"{uid} was issued in step {self._issued[uid]} and again in step {step}")
        self._write("issued", step, new)

    def stored(self, uids: Iterable[str]) -> None:
        """Their records are in the store."""
        new = [uid for uid in uids if uid not in self._stored]
        for uid in new:
            if uid not in self._issued:
                raise RunError(f"{uid} has a record and was never issued")
        self._write("stored", -1, new)

    def trained(self, step: int, uids: Sequence[str]) -> None:
        """Step `step` has consumed them (those it masked, too); before a checkpoint that contains it."""
        for uid in uids:
            if uid not in self._stored or self._issued[uid] != step:
                raise RunError(f"step {step} trained on {uid}, which is not stored or not its own")
            if uid in self._dropped:
                raise RunError(f"step {step} trained on {uid}, which was dropped")
            if uid in self._trained:
                raise RunError(f"{uid} was trained on in step {self._trained[uid]} and again in step {step}")
        if len(set(uids)) != len(uids):
            raise RunError(f"step {step} trained on a sample twice")
        self._write("trained", step, list(uids))

    def dropped(self, step: int, uids: Iterable[str], reason: str) -> None:
        """Step `step` goes on without them, now and after any resume: they or one of their group never came
        back from the workers, or lost their environment."""
        new = [uid for uid in uids if uid not in self._dropped]
        for uid in new:
            if uid not in self._stored or self._issued[uid] != step:
                raise RunError(f"step {step} dropped {uid}, which is not stored or not its own")
            if uid in self._trained:
                raise RunError(f"step {step} dropped {uid}, trained on in step {self._trained[uid]}")
        self._write("dropped", step, new, {"reason": reason})

    def resumed(self, step: int) -> None:
        """The weights are those before step `step`."""
        if any(trained >= step for trained in self._trained.values()):
            self._write("resumed", step, None)

    def missing(self) -> list[str]:
        """Samples issued, neither trained on nor dropped, in the order in which they were issued."""
        return [uid for uid in self._issued if uid not in self._trained and uid not in self._dropped]

    def check(self) -> None:
        """RunError unless everything that was issued has been trained on or dropped."""
        missing = self.missing()
        if missing:
            raise RunError(
                f"{self.path}: {len(missing)} of {len(self._issued)} samples were issued and not trained on, "
                f"{missing[0]} the first; resume the stage"
            )

    def close(self) -> None:
        self._file.close()

    def _write(
        self, event: str, step: int, uids: list[str] | None, facts: dict[str, str] | None = None
    ) -> None:
        if uids == []:
            return
        row: dict[str, Any] = {"event": event, "step": step, "uids": uids or [], **(facts or {})}
        self._file.append([json.dumps(row).encode("utf-8")])
        self._file.sync()
        self._apply(row)

    def _apply(self, row: dict[str, Any]) -> None:
        step, uids = row["step"], row["uids"]
        match row["event"]:
            case "issued":
                self._issued |= dict.fromkeys(uids, step)
            case "stored":
                self._stored.update(uids)
            case "trained":
                self._trained |= dict.fromkeys(uids, step)
            case "dropped":
                self._dropped.update(uids)
            case "resumed":
                self._trained = {uid: at for uid, at in self._trained.items() if at < step}
