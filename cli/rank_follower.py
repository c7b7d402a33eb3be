"""A process as one of a stage's ranks: how it joins the others, does its part and says how that ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from consilience.cli.rank_board import Board
from consilience.cli.rank_meeting import FolderMeeting, StoreMeeting
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import die_with_parent, portable, signal_dumps, stacks_file
from consilience.conf.errors import ConsilienceError, EngineError, RunError
from consilience.model.ranks import BROKE, HAS, Ranks, open_ranks
from consilience.rollout.deadlines import STALLS, StallLog

Run = Callable[[StageContext], Mapping[str, Any]]
Meeting = FolderMeeting | StoreMeeting
Ending = tuple[Any, ...]
"""("done",), or ("error", when, whether it follows from another's end, the error, its message)."""
SPARE_S = 60.0  # torch's own limits come later than those of the watching thread, which knows whom to name
_OF_CONNECTIONS = ("gloo", "Gloo", "NCCL", "Connection", "Socket", "socket", "Broken pipe")


def join(
    context: StageContext, meeting: Meeting, rank: int, backend: str, board: Board, gpu: int | None = None
) -> Ranks:
    """This process as `rank` of the stage's, with a first word to all: NCCL connects at that, or never.

    gpu  see `open_ranks`
    EngineError where the ranks do not find each other, or cannot talk, within the limit.
    """
    engine = context.cfg.engine
    on_call = board.writer(rank)
    ranks = open_ranks(
        meeting.address(),
        rank,
        engine.ranks,
        backend=backend,
        timeout_s=engine.rank_limit_s + SPARE_S,
        patience_s=context.cfg.run.phase_limit_s + SPARE_S,
        on_call=on_call,
        gpu=gpu,
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


def take_part(run: Run, context: StageContext, meeting: Meeting, rank: int, backend: str) -> Ending:
    """Rank `rank`, to its end, whatever kind of process it is; how that went."""
    board = None
    try:
        board = meeting.board()
        ranks = join(context, meeting, rank, backend, board)
        run(replace(context, ranks=ranks))
        ranks.close()
    except Exception as error:
        state = HAS
        with contextlib.suppress(Exception):  # a store that is gone with the first rank
            state = board.row(rank).state if board else HAS
        follows = is_of_connection(error, state)
        return "error", time.monotonic(), follows, portable(error, context.name), str(error)
    except BaseException as error:
        return "error", time.monotonic(), False, RunError(f"ended by {type(error).__name__}"), ""
    return ("done",)


def follow(
    run: Run,
    context: StageContext,
    meeting: Meeting,
    rank: int,
    backend: str,
    environment: Mapping[str, str],
    pipe: Any,
) -> None:
    """Rank `rank` as a process of this machine. Ctrl-C and SIGTERM are the first rank's to hear."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=die_with_parent, name="die-with-parent", daemon=True).start()
    name = f"{context.name}-rank-{rank}"
    with signal_dumps(stacks_file(StallLog(context.run.path / STALLS), name, os.getpid())):
        pipe.send(take_part(run, context, meeting, rank, backend))
