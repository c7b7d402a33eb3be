"""Several ranks as processes of this machine, for tests: each runs one function, all results come back.

Processes that have answered well wait for the next case on as many ranks: what starting and importing costs
is paid once. They stay together, rank by rank: what libraries keep of an earlier case, all of them have. A
case that fails ends its processes: none meets what it has left.
"""

import atexit
import itertools
import os
import pickle
import time
import traceback
import warnings

import torch
import torch.distributed as dist

from consilience.cli.stage_process import PRELOAD, PROCESSES, warm_up
from consilience.model.ranks import open_ranks
from tests.ranks_table import ran

LIMIT_S = 120.0
_meetings = itertools.count()
MOST_IDLE = 7
_idle = {}
"""Number of ranks -> their processes; those used last stand at the end."""


def on_ranks(size, function, *arguments, folder, limit_s=LIMIT_S, is_apart=False):
    """[function(ranks, *arguments) of rank 0, 1, …]; raises all ranks' errors.

    The function must be a module's. `folder` is where the ranks meet; a rank runs with one thread.
    is_apart: the function changes its process for good: processes of its own, which end with this case.
    """
    address = f"file://{folder}/meeting-{next(_meetings)}-{function.__name__}"
    began = time.perf_counter()
    kept = None if is_apart else _idle.pop(size, None)
    workers = kept or [_start() for _ in range(size)]
    try:
        for rank, (pipe, _) in enumerate(workers):
            pipe.send_bytes(pickle.dumps((address, rank, size, limit_s, function, arguments)))
        found = [_hear(pipe, rank, limit_s) for rank, (pipe, _) in enumerate(workers)]
    except BaseException:
        _end(workers)
        raise
    ran(size, time.perf_counter() - began)
    if errors := [value for is_ok, value in found if not is_ok]:
        _end(workers)
        raise AssertionError("\n".join(errors))
    if is_apart:
        _end(workers)
    else:
        _idle[size] = workers
        while sum(_idle) > MOST_IDLE:
            _end(_idle.pop(next(iter(_idle))))
    return [value for _, value in found]


def _start():
    warm_up((*PRELOAD, "tests.rank_processes"))  # the program's ranks are forked from the same server
    here, there = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_serve, args=(there,), daemon=True)
    process.start()
    there.close()
    return here, process


def _end(workers):
    for pipe, process in workers:
        process.kill()
        process.join(LIMIT_S)
        pipe.close()


@atexit.register
def _end_all():
    """A fork server that was started while signals were blocked has children that no SIGTERM ends, with which
    multiprocessing's own way would wait for ever."""
    for size in list(_idle):
        _end(_idle.pop(size))


def _hear(pipe, rank, limit_s):
    try:
        if not pipe.poll(limit_s):
            return False, f"rank {rank} said nothing for {limit_s:g} s"
        return pickle.loads(pipe.recv_bytes())  # no limit: there is something to read
    except (EOFError, ConnectionResetError):
        return False, f"rank {rank} died without a word"


def _serve(pipe):
    warnings.simplefilter("ignore", FutureWarning)  # as pytest does in the process of the tests
    environment = dict(os.environ)
    while True:
        try:
            given = pipe.recv_bytes()  # no limit: ends with tests
        except EOFError:
            return
        # By value: what the pipe itself makes of a tensor is gone when this process is.
        pipe.send_bytes(pickle.dumps(_rank(given)))
        os.environ.clear()
        os.environ.update(environment)


def _rank(given):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = "?"
    try:
        address, rank, size, limit_s, function, arguments = pickle.loads(given)
        ranks = open_ranks(address, rank, size, timeout_s=limit_s / 2)
        answer = True, function(ranks, *arguments)
        ranks.close()
        if dist.is_initialized():  # what an engine opened for one process alone
            dist.destroy_process_group()
    except BaseException:
        answer = False, f"rank {rank}:\n{traceback.format_exc()}"
    return answer
