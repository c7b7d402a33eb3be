"""Boxes and pools for code that does not await."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from consilience.conf.errors import SandboxLost
from consilience.sandboxes.blocking import (
    BlockingPool,
    BlockingSandbox,
    LoopThread,
    loop_thread,
    open_blocking,
)
from consilience.sandboxes.fake import FakeSandbox
from consilience.sandboxes.protocol import SandboxSpec
from consilience.sandboxes.trajectory import TrajectoryLog

SPEC = SandboxSpec()


async def open_fake(spec: SandboxSpec) -> FakeSandbox:
    return FakeSandbox(lambda argv, stdin, files: argv[-1].encode())


def test_every_verb_is_there_without_await():
    box = open_blocking(SPEC, opener=open_fake)
    assert box.exec(["echo", "x"]).stdout == b"x" and box.run_python("y").stdout == b"y"
    box.write("f", b"1")
    assert box.read("f") == b"1" and box.enforced.driver == "fake" and box.id.startswith("box-")
    box.reset()
    with pytest.raises(FileNotFoundError):
        box.read("f")
    box.destroy()
    with pytest.raises(SandboxLost):
        box.exec(["true"])


def test_a_pool_serves_threads_and_batches():
    with BlockingPool(SPEC, size=2, opener=open_fake) as pool:
        ids = []

        def use():
            for _ in range(5):
                box = pool.lease()
                ids.append(box.id)
                pool.release(box)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(ids)) == 20

        async def job(box):
            return (await box.exec(["echo", "done"])).stdout

        assert pool.run_all([job] * 7) == [b"done"] * 7
        assert pool.describe()["opened"] == 2 and pool.describe()["leases"] == 27
        with pytest.raises(ValueError, match="not leased"):
            pool.release(open_blocking(SPEC, opener=open_fake))


def test_blocking_on_the_serving_loop_is_an_error_not_a_deadlock():
    box = open_blocking(SPEC, opener=open_fake)

    async def wrong():
        with pytest.raises(RuntimeError, match="await the sandbox itself"):
            box.exec(["true"])

    asyncio.run_coroutine_threadsafe(wrong(), loop_thread().loop).result(5)


def test_after_a_fork_the_child_is_told_to_open_its_own_and_can():
    pool = BlockingPool(SPEC, size=1, opener=open_fake)
    box = pool.lease()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            box.exec(["true"])
        except SandboxLost as error:
            pool.close()
            own = open_blocking(SPEC, opener=open_fake)
            code = 0 if "after the fork" in str(error) and own.exec(["echo", "x"]).is_ok else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    pool.close()


def test_a_real_box_answers_many_small_programs(box: BlockingSandbox):
    for number in range(20):
        assert box.run_python("print(int(input()) + 1)", stdin=b"%d\n" % number).stdout == b"%d\n" % (
            number + 1
        )


def test_a_loop_that_is_stuck_costs_its_caller_no_more_than_the_limit():
    thread, release = LoopThread(), threading.Event()

    async def stuck():
        release.wait(60)  # what must never be done on a loop

    async def answer():
        return 5

    with pytest.raises(SandboxLost, match=r"did not answer in 0\.2 s"):
        thread.run(stuck(), 0.2)
    with pytest.raises(SandboxLost):
        thread.run(answer(), 0.2)
    release.set()
    assert thread.run(answer(), 20.0) == 5


def test_boxes_of_a_pool_write_their_trajectory_where_they_are_told_to(tmp_path):
    with BlockingPool(SPEC, size=1, opener=open_fake, log_folder=tmp_path) as pool:
        box = pool.lease()
        box.write("f", b"1")
        assert box.read("f") == b"1"
        (folder,) = tmp_path.iterdir()
        log = TrajectoryLog(folder)
        pool.release(box)
    assert [entry.op for entry in log.entries] == ["write", "read"]
    assert all(entry.outcome is not None for entry in log.entries)
