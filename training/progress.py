"""How a trainer tells whoever watches where it is; the CLI draws it, tests stay silent."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """One stage at a time: start, advance any number of times, finish."""

    def start(self, stage: str, total: int | None, unit: str) -> None:
        """A stage of `total` units begins (None: not known), e.g. ("grpo-math", 12, "step")."""
        ...

    def advance(self, n: int = 1, **info: Any) -> None:
        """`n` more units are done; `info` is worth showing beside (loss=…, reward=…)."""
        ...

    def finish(self) -> None:
        """The stage is over, also when it failed. Finishing twice is harmless."""
        ...


class SilentProgress:
    """Draws nothing; keeps the last values, for tests and for runs without a terminal."""

    def __init__(self) -> None:
        self.stage = ""
        self.unit = ""
        self.total: int | None = None
        self.done = 0
        self.info: dict[str, Any] = {}
        self.is_finished = False

    def start(self, stage: str, total: int | None, unit: str) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.info, self.is_finished = 0, {}, False

    def advance(self, n: int = 1, **info: Any) -> None:
        self.done += n
        self.info |= info

    def finish(self) -> None:
        self.is_finished = True
