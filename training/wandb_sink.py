"""Weights & Biases as a metrics sink: offline by default, no account, quiet, never in the way."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import ConfigError
from consilience.training.metrics import RolloutRow

MODES = ("offline", "online", "disabled")
COLUMNS = ("step", "uid", "prompt", "completion", "reward", "reward_parts", "advantage", "teacher", "kl")
HEADER_BYTES = 7  # of an empty run file
_LOG = logging.getLogger(__name__)


class WandbSink:
    """Scalars as history, rollouts as a table "rollouts" of `COLUMNS`, under `<folder>/wandb/`.

    Whatever wandb raises is logged once, kept in `failure`, and ends the sink, never the training.
    Mode "online" without an API key falls back to offline (and says so) instead of asking for one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: str = "offline",
        project: str = "consilience",
        name: str | None = None,
        group: str | None = None,
        run_id: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ConfigError(f"wandb mode {mode!r} is not one of {', '.join(MODES)}")
        self.failure: str | None = None
        self._run: Any = None
        self._wandb: Any = None
        if mode != "disabled":
            self._guard(lambda: self._start(Path(folder), mode, project, name, group, run_id, config))

    @property
    def is_active(self) -> bool:
        """Whether a run is open and has not failed."""
        return self._run is not None and self.failure is None

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers only; nested tables are flattened with dots, what is not a number is left out."""
        if self.is_active:
            self._guard(lambda: self._run.log(_numbers(values), step=step))

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        """One table a call, as a file under the run's `media/table/` that any viewer opens."""
        if self.is_active:
            self._guard(lambda: self._log_table(step, rows))

    def finish(self) -> None:
        """Close the run file. Twice is harmless."""
        if self.is_active:
            self._guard(self._close)
        self._run = None

    def _start(
        self,
        folder: Path,
        mode: str,
        project: str,
        name: str | None,
        group: str | None,
        run_id: str | None,
        config: Mapping[str, Any] | None,
    ) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports over the network
        import wandb

        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            _LOG.warning("wandb: no API key, so this run is tracked offline; `wandb sync` uploads it later")
            mode = "offline"
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_stats=True,
            x_disable_machine_info=True,
        )
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(folder),
            mode=mode,  # type: ignore[arg-type]
            project=project,
            name=name,
            group=group,
            id=run_id,
            resume="allow" if run_id else None,
            config=dict(config or {}),
            settings=settings,
            reinit="create_new",
        )

    def _close(self) -> None:
        run_file = Path(self._run.settings.sync_file)
        self._run.finish()
        _wait_until_written(run_file)

    def _log_table(self, step: int, rows: Sequence[RolloutRow]) -> None:
        cells = [[step, *(row.cells()[column] for column in COLUMNS[1:])] for row in rows]
        table = self._wandb.Table(columns=list(COLUMNS), data=cells, allow_mixed_types=True)
        self._run.log({"rollouts": table}, step=step)

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            _LOG.warning("wandb failed and is switched off for this run (training goes on): %s", self.failure)


def _wait_until_written(run_file: Path, limit_s: float = 5.0) -> None:
    """wandb's service writes the last records a few milliseconds after `finish` returns (seen with
    0.31: the file is still 7 bytes, its header, in one run of four); a reader should find them."""
    end = time.monotonic() + limit_s
    sizes: list[int] = []
    while time.monotonic() < end:
        sizes.append(run_file.stat().st_size if run_file.exists() else 0)
        if sizes[-1] > HEADER_BYTES and sizes[-3:] == [sizes[-1]] * 3:
            return
        time.sleep(0.02)


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float | int]:
    """Flat name -> finite number."""
    flat: dict[str, float | int] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int):
            flat[f"{prefix}{key}"] = int(value)
        elif not isinstance(value, str) and hasattr(value, "__float__") and math.isfinite(float(value)):
            flat[f"{prefix}{key}"] = float(value)
    return flat
