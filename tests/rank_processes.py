"""Several ranks as processes of this machine, for tests: each runs one function, all results come back."""

import itertools
import multiprocessing
import pickle
import traceback

import torch

from consilience.model.ranks import open_ranks

LIMIT_S = 120.0
_meetings = itertools.count()


def on_ranks(size, function, *arguments, folder, limit_s=LIMIT_S):
    """[function(ranks, *arguments) of rank 0, 1, …]; raises the first rank's error that there was.

    The function must be a module's. `folder` is where the ranks meet; a rank runs with one thread.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.rank_processes"])
    address = f"file://{folder}/meeting-{next(_meetings)}-{function.__name__}"
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        given = (there, address, rank, size, limit_s, function, arguments)
        process = context.Process(target=_rank, args=given, daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    found = [_hear(pipe, rank, limit_s) for rank, pipe in enumerate(pipes)]
    for process in processes:
        process.join(limit_s)
    for error in (value for is_ok, value in found if not is_ok):
        raise AssertionError(error)
    return [value for _, value in found]


def _hear(pipe, rank, limit_s):
    if not pipe.poll(limit_s):
        return False, f"rank {rank} said nothing for {limit_s:g} s"
    try:
        return pickle.loads(pipe.recv_bytes())  # no limit: there is something to read
    except EOFError:
        return False, f"rank {rank} died without a word"


def _rank(pipe, address, rank, size, limit_s, function, arguments):
    torch.set_num_threads(1)
    try:
        ranks = open_ranks(address, rank, size, timeout_s=limit_s / 2)
        answer = True, function(ranks, *arguments)
        ranks.close()
    except BaseException:
        answer = False, f"rank {rank}:\n{traceback.format_exc()}"
    # By value: what the pipe itself makes of a tensor is gone when this process is.
    pipe.send_bytes(pickle.dumps(answer))
