"""Ranks of one machine: started together, ended together, and whoever fails is named."""

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

from consilience.cli.engines import backend_of
from consilience.cli.rank_processes import on_ranks
from consilience.cli.stage import StageContext
from consilience.cli.stage_process import PROCESSES, warm_up
from consilience.conf.errors import CheckpointError, ConfigError, EngineError
from consilience.conf.load import from_plain
from consilience.model.ranks import open_ranks
from consilience.rollout.deadlines import STALLS, read_stalls
from consilience.training.accumulation import accumulate
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder

LIGHT = ("pytest", "torch", "consilience.cli.rank_processes")


@pytest.fixture(scope="module", autouse=True)
def server():
    """Imports no more than these tests need; nothing where another test's server runs."""
    warm_up(LIGHT)


@pytest.fixture
def start(tmp_path):
    def start(run, size=2, limit_s=60.0):
        cfg = ranks_on(size, rank_limit_s=limit_s, device="cpu", threads=1)
        folder = RunFolder(tmp_path / "run")
        stage = folder.stage("sft-fake")
        return on_ranks(run, StageContext("sft/fake", "fake", cfg, stage, folder, {}, SilentProgress()))

    yield start
    assert not [p for p in psutil.Process().children(recursive=True) if p.name().startswith("rank ")]
    assert not torch.distributed.is_initialized()


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def add_up(context):
    ranks = context.ranks
    ranks.sum_([value := torch.tensor([float(ranks.rank + 1)])])
    made = ranks.first(lambda: f"made by {ranks.rank}")
    assert ranks.rank == 0 or type(context.progress) is SilentProgress
    return {"sum": float(value), "made": made, "pids": ranks.gather(os.getpid())}


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_run_the_stage_the_first_one_returns_and_the_others_are_gone(start, size):
    found = start(add_up, size)
    assert found["sum"] == size * (size + 1) / 2 and found["made"] == "made by 0"
    assert len(set(found["pids"])) == size and alive(found["pids"]) == [os.getpid()]
    again = start(add_up, size)  # the process may open another group
    assert again["sum"] == found["sum"]


def second_fails(context):
    if context.ranks.rank == 1:
        raise CheckpointError("step-000003/model.safetensors is torn; restore it")
    context.ranks.gather(1)


def second_fails_while_the_first_works(context):
    if context.ranks.rank == 1:
        raise CheckpointError("step-000003/model.safetensors is torn; restore it")
    time.sleep(60)


def second_fails_where_the_first_waits_in_a_forward(context):
    """As where blocks are gathered or rows are cut: of the engine's collectives the board knows nothing."""

    def loss_fn(_model, number):
        if context.ranks.rank == 1:
            raise CheckpointError("step-000003/model.safetensors is torn; restore it")
        torch.distributed.all_reduce(torch.ones(1))
        return torch.tensor(float(number)), {}

    accumulate(loss_fn, torch.nn.Identity(), [1, 2], {}, ranks=context.ranks, num_steps=0, is_in_step=True)


@pytest.mark.parametrize(
    "run",
    [second_fails, second_fails_while_the_first_works, second_fails_where_the_first_waits_in_a_forward],
)
def test_what_one_rank_raises_is_raised_with_its_name(start, run):
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"^rank 1 of 2: step-000003/model.safetensors is torn"):
        start(run)
    assert time.monotonic() - began < 30


def all_fail(context):
    context.ranks.barrier()
    raise EngineError("step 7: the loss is nan")


def test_what_all_ranks_raise_is_raised_as_it_is(start):
    with pytest.raises(EngineError, match=r"^step 7: the loss is nan$"):
        start(all_fail)


def first_fails(context):
    if context.ranks.is_first:
        raise EngineError("no space left on the device")
    context.ranks.first(print)


def test_an_error_of_the_first_ends_those_that_wait_for_it(start):
    with pytest.raises(EngineError, match=r"^rank 0 of 3: no space left"):
        start(first_fails, 3)


def first_is_interrupted(context):
    if context.ranks.is_first:
        os.kill(os.getpid(), signal.SIGINT)
    context.ranks.gather(0)
    time.sleep(60)


def test_ctrl_c_ends_all_and_stays_one(start):
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        start(first_is_interrupted)
    assert time.monotonic() - began < 30


def last_is_killed(context):
    if context.ranks.rank == context.ranks.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.ranks.gather(1)


def last_is_killed_while_the_first_samples(context):
    if context.ranks.rank == context.ranks.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.ranks.first(time.sleep, 60)


@pytest.mark.parametrize("run", [last_is_killed, last_is_killed_while_the_first_samples])
def test_a_killed_rank_is_named_and_the_others_end(start, run):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"^rank 2 of 3 \(process \d+\) died .*SIGKILL.*the same command"):
        start(run, 3)
    assert time.monotonic() - began < 30


def second_hangs(context):
    if context.ranks.rank == 1:
        time.sleep(60)
    context.ranks.gather(1)


def second_is_stopped(context):
    if context.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    context.ranks.sum_([torch.ones(1)])


def second_hangs_in_step(context):
    """Collectives of an engine, of which the board knows nothing; the first waits in one for the second."""
    with context.ranks.in_step():
        if context.ranks.rank == 1:
            time.sleep(60)
        torch.distributed.all_reduce(torch.ones(1))


def second_hangs_in_a_sharded_update(context):
    if context.ranks.rank == 1:
        time.sleep(60)
    context.ranks.stack(torch.ones(1))


@pytest.mark.parametrize(
    "run", [second_hangs, second_is_stopped, second_hangs_in_step, second_hangs_in_a_sharded_update]
)
def test_a_rank_that_hangs_is_named_with_the_stacks_of_all(start, run, tmp_path):
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"^rank 1 of 2 \(process \d+\) kept the others waiting"):
        start(run, limit_s=1.0)
    assert time.monotonic() - began < 30
    (stall,) = read_stalls(tmp_path / "run" / STALLS)
    assert stall.stage == "rank" and stall.actor == "rank 1 of 2, stage sft/fake"
    written = {path: path.read_text() for path in (tmp_path / "run" / "stacks").iterdir()}
    assert len(written) == 2 and run.__name__ in written[Path(stall.stacks)]
    assert all("File" in text for text in written.values())


def cannot_connect(address, pipe):
    os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"
    try:
        open_ranks(address, 0, 2, timeout_s=10.0)
    except EngineError as error:
        pipe.send(str(error))


def test_a_rank_that_cannot_connect_is_one_clear_error(tmp_path):
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=cannot_connect, args=(f"file://{tmp_path}/meeting", there))
    process.start()
    assert here.poll(30), "no error within the limit"
    assert re.match(r"rank 0 of 2 found no others .*nosuch0", here.recv())
    process.join(30)


def first_takes_long(context):
    return {"slept": context.ranks.first(time.sleep, 3.0), "all": context.ranks.gather(True)}


def test_work_of_the_first_alone_may_take_longer_than_a_rank_is_waited_for(start):
    assert start(first_takes_long, limit_s=1.0) == {"slept": None, "all": [True, True]}


def ranks_on(size, **engine):
    plain = {"task": {"domains": {"fake": {"kind": "code"}}}, "engine": {"ranks": size, **engine}}
    return from_plain(plain)


def test_ranks_that_the_machine_cannot_take_are_refused_with_what_to_change():
    assert backend_of(ranks_on(2, device="cpu")) == "gloo"
    with pytest.raises(ConfigError, match=r"torch finds 2; set engine.ranks=2, or engine.device=cpu"):
        backend_of(ranks_on(4), 2, ["H100", "H100"])
    with pytest.raises(ConfigError, match=r"GPUs differ \(0: H100, 1: A100\).*CUDA_VISIBLE_DEVICES"):
        backend_of(ranks_on(2), 2, ["H100", "A100"])
    with pytest.raises(ConfigError, match=r"engine.ranks is 0, out of range .*1 to"):
        ranks_on(0)
