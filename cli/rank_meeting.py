"""Where the ranks of a stage meet: at a file of this machine, or at a store on rank 0's."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from consilience.cli.rank_board import Board, PageRows, StoreRows
from consilience.conf.errors import EngineError

CONNECT_S = 60.0  # a store that is there answers at once


@dataclass(frozen=True)
class FolderMeeting:
    """Ranks that are processes of one machine; `folder` is theirs alone."""

    folder: Path
    size: int

    def address(self) -> str:
        """What `open_ranks` takes."""
        return f"file://{self.folder}/meeting"

    def board(self) -> Board:
        return Board(PageRows(self.folder / "board", self.size), self.size)

    def __str__(self) -> str:
        return self.address()


@dataclass(frozen=True)
class StoreMeeting:
    """Ranks on any machines: rank 0's process has the store (`open_store`), the others connect to it."""

    host: str
    port: int
    size: int
    connect_s: float = CONNECT_S

    def address(self) -> Any:
        """What `open_ranks` takes: a connection of its own. EngineError if nobody listens there."""
        return self._connect()

    def board(self) -> Board:
        """EngineError if nobody listens there."""
        return Board(StoreRows(self._connect()), self.size)

    def __str__(self) -> str:
        return f"tcp://{self.host}:{self.port}"

    def _connect(self) -> Any:
        limit = timedelta(seconds=self.connect_s)
        try:
            return TCPStore(self.host, self.port, is_master=False, timeout=limit)
        except (RuntimeError, dist.DistError) as error:
            raise EngineError(
                f"this rank cannot reach rank 0 at {self} within {self.connect_s:g} s: "
                f"{str(error).splitlines()[0]}; is the port open between them? cluster.port chooses it"
            ) from None


def open_store(port: int | None) -> Any:
    """The store of a `StoreMeeting`, in this process: on `port`, or a free one (`.port` says which).

    EngineError if the port is in use.
    """
    try:
        return TCPStore("0.0.0.0", port or 0, is_master=True, wait_for_workers=False)
    except (RuntimeError, dist.DistError) as error:
        if port is None:
            raise EngineError(f"the ranks have nowhere to meet: {str(error).splitlines()[0]}") from None
        raise EngineError(
            f"cluster.port is {port}, which cannot be had on this machine (most likely it is in use); choose "
            "another one, or null for a free one"
        ) from None
