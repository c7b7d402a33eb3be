"""A process as one of a stage's ranks: how it joins the others, does its part and says how that ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from consilience.cli.rank_board import Board
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import die_with_parent, portable, signal_dumps, stacks_file
from consilience.conf.errors import ConsilienceError, EngineError, RunError
from consilience.model.ranks import BROKE, Ranks, open_ranks
from consilience.rollout.deadlines import STALLS, StallLog

Run = Callable[[StageContext], Mapping[str, Any]]
SPARE_S = 60.0  # torch's own limits come later than those of the watching thread, which knows whom to name
_OF_CONNECTIONS = ("gloo", "Gloo", "NCCL", "Connection", "Socket", "socket", "Broken pipe")


def join(context: StageContext, folder: Path, rank: int, backend: str, board: Board) -> Ranks:
    """This process as `rank` of the stage's, with a first word to all: NCCL connects at that, or never."""
    engine = context.cfg.engine
    address, on_call = f"file://{folder}/meeting", board.writer(rank)
    ranks = open_ranks(
        address,
        rank,
        engine.ranks,
        backend=backend,
        timeout_s=engine.rank_limit_s + SPARE_S,
        patience_s=context.cfg.run.phase_limit_s + SPARE_S,
        on_call=on_call,
    )
    try:
        ranks.sum_([word := torch.ones(1, device=ranks.device)])
        num_heard = int(word)
    except RuntimeError as error:
        raise EngineError(
            f"the ranks cannot talk by {backend}: {error}; NCCL_DEBUG=INFO says why, NCCL_SOCKET_IFNAME and "
            "GLOO_SOCKET_IFNAME choose the network; or set engine.ranks=1"
        ) from error
    if num_heard != ranks.size:
        raise EngineError(
            f"rank {rank} heard {num_heard} of {ranks.size} ranks by {backend}; restart the run"
        )
    return ranks


def abort(ranks: Ranks) -> None:
    """Leave a group whose other ranks may be gone, without waiting for them."""
    with contextlib.suppress(Exception):
        if ranks.device.type == "cuda":
            dist.distributed_c10d._abort_process_group()  # pyright: ignore[reportPrivateUsage]
    with contextlib.suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()


def is_of_connection(error: BaseException, state: str) -> bool:
    """Whether an error of a rank, last seen in `state`, is about another one that is gone."""
    if isinstance(error, dist.DistError) or state == BROKE:
        return True
    text = str(error)
    is_torch = isinstance(error, RuntimeError) and not isinstance(error, ConsilienceError)
    return is_torch and any(word in text for word in _OF_CONNECTIONS)


def follow(
    run: Run,
    context: StageContext,
    folder: Path,
    rank: int,
    backend: str,
    environment: Mapping[str, str],
    pipe: Any,
) -> None:
    """Rank `rank`, to its end. Ctrl-C and SIGTERM are the first rank's to hear."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=die_with_parent, name="die-with-parent", daemon=True).start()
    name = f"{context.name}-rank-{rank}"
    with signal_dumps(stacks_file(StallLog(context.run.path / STALLS), name, os.getpid())):
        board = Board(folder / "board", context.cfg.engine.ranks)
        with _told(pipe, context.name, lambda error: is_of_connection(error, board.row(rank).state)):
            ranks = join(context, folder, rank, backend, board)
            run(replace(context, ranks=ranks))
            ranks.close()


@contextlib.contextmanager
def _told(pipe: Any, stage: str, follows: Callable[[Exception], bool]) -> Iterator[None]:
    """Tell the first rank how the block ended: ("done",) or ("error", when, whether it follows, the
    error, its message)."""
    ending: tuple[Any, ...] = ("done",)
    try:
        yield
    except Exception as error:
        ending = ("error", time.monotonic(), follows(error), portable(error, stage), str(error))
    except BaseException as error:
        ending = ("error", time.monotonic(), False, RunError(f"ended by {type(error).__name__}"), "")
    pipe.send(ending)
