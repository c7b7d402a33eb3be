"""The worker's side: blocking verbs, a heartbeat that keeps boxes, boxes found again; real ones too."""

import threading
import time

import pytest

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.fake import FakeSandbox
from consilience.sandboxes.host import HostLimits
from consilience.sandboxes.host_client import HostPool, LocalHost
from consilience.sandboxes.protocol import Limits, SandboxSpec, ShellState

SPEC = SandboxSpec()
QUICK = HostLimits(ttl_s=0.3, sweep_s=0.03)


async def open_fake(spec):
    return FakeSandbox(lambda argv, stdin, files: argv[-1].encode())


@pytest.fixture
def host():
    local = LocalHost(QUICK, opener=open_fake)
    yield local
    local.close()


def test_every_verb_goes_through_and_a_given_back_box_refuses(host):
    with HostPool(host.ask, SPEC, beat_s=0.05) as pool:
        box = pool.lease()
        box.write("f", b"1")
        assert box.read("f") == b"1" and box.enforced.driver == "fake"
        assert box.exec(["echo", "x"]).stdout == b"x" and box.run_python("y").stdout == b"y"
        with pytest.raises(FileNotFoundError):
            box.read("none")
        pool.release(box)
        pool.release(box)  # by a late thread: harmless
        with pytest.raises(SandboxLost):
            box.read("f")


def test_the_heartbeat_keeps_boxes_and_its_end_lets_them_go(host):
    pool = HostPool(host.ask, SPEC, owner="a", beat_s=0.05)
    box = pool.lease()
    box.write("f", b"1")
    time.sleep(1.0)  # three times ttl_s
    assert box.read("f") == b"1"
    pool._is_over.set()  # as if the process were gone: nothing is given back
    successor = HostPool(host.ask, SPEC, owner="b", beat_s=0.05)
    found = successor.find(box.id)
    assert found is not None and found.read("f") == b"1"
    with pytest.raises(SandboxLost, match="taken over by b"):
        box.read("f")
    pool.release(box)  # the former holder ends nothing
    time.sleep(0.6)
    assert found.read("f") == b"1"
    successor._is_over.set()
    time.sleep(1.0)
    assert successor.find(box.id) is None
    assert successor.describe()["reaped"] == 1


def test_close_gives_back_what_is_held(host):
    pool = HostPool(host.ask, SPEC, owner="a")
    box = pool.lease()
    pool.close()
    with HostPool(host.ask, SPEC, owner="b") as other:
        assert other.find(box.id) is None
        assert other.describe()["leased"] == 0


def test_a_host_that_is_gone_is_a_lost_box_an_unavailable_lease_and_nothing_found():
    def ask(verb, *args, limit_s, **options):
        if verb != "keep_warm":
            raise SandboxLost("the host is gone")

    with HostPool(ask, SPEC, beat_s=0.01) as pool:
        time.sleep(0.05)  # the heart goes on
        assert pool._heart.is_alive() and pool.find("box-1") is None
        with pytest.raises(SandboxUnavailable, match="the host is gone"):
            pool.lease()


def test_threads_share_a_pool(host):
    ids = []
    with HostPool(host.ask, SPEC, beat_s=0.05) as pool:

        def use():
            for _ in range(10):
                box = pool.lease()
                ids.append(box.exec(["echo", box.id]).stdout.decode())
                pool.release(box)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(set(ids)) == 80


@pytest.mark.timeout(120)
def test_real_boxes_warm_found_and_reaped():
    spec = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20, wall_s=5))
    local = LocalHost(HostLimits(ttl_s=1.0, sweep_s=0.1))
    try:
        pool = HostPool(local.ask, spec, warm=1, beat_s=0.2)
        box = pool.lease()
        assert box.exec(["sh", "-c", "echo a >> ran; cat ran"]).stdout == b"a\n"
        pool._is_over.set()
        successor = HostPool(local.ask, spec, beat_s=0.2)
        again = successor.find(box.id)
        assert again is not None and again.read("ran") == b"a\n"
        successor.close()
        with HostPool(local.ask, spec) as other:
            assert other.describe()["leased"] == 0 and other.lease().id != box.id
    finally:
        local.close()


def test_shells_streamed_programs_and_snapshots_of_a_real_box_go_through_a_host(tmp_path):
    local = LocalHost(HostLimits(log_folder=str(tmp_path)))
    try:
        with HostPool(local.ask, SandboxSpec(driver="bwrap", limits=Limits(processes=32))) as pool:
            box = pool.lease()
            assert box.shell("cd /tmp; x=5").shell is ShellState.NEW
            told = box.shell('echo "$x $PWD"')
            assert (told.stdout, told.shell) == (b"5 /tmp\n", ShellState.KEPT)
            cat = box.spawn(["cat"])
            cat.write(b"one\n")
            assert cat.read(timeout_s=5.0) == b"one\n"
            with pytest.raises(TimeoutError):
                cat.read(timeout_s=0.05)
            cat.close_stdin()
            assert cat.read(timeout_s=5.0) == b"" and cat.wait(5.0).exit_code == 0
            box.write("a/b", b"1")
            before = box.snapshot()
            box.write("a/b", b"2")
            box.restore(before)
            assert box.read("a/b") == b"1" and box.snapshot().digest == before.digest
            (log,) = tmp_path.iterdir()
            assert len((log / "log.jsonl").read_bytes().splitlines()) > 10
    finally:
        local.close()


def test_a_snapshot_that_was_taken_is_answered_again_to_a_successor(host):
    with HostPool(host.ask, SPEC, owner="a", beat_s=0.05) as pool:
        box = pool.lease()
        box.write("f", b"1")
        taken = box.snapshot()
        with HostPool(host.ask, SPEC, owner="b", beat_s=0.05) as other:
            found = other.find(box.id)
            found.resume(1)
            assert found.snapshot() == taken
            found.write("f", b"2")
            assert found.snapshot() != taken
