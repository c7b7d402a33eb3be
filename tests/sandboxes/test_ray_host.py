"""The host as a Ray actor: a node's processes share it; it outlives those that are killed."""

import asyncio
import os
import signal
import time

import pytest
import ray

from consilience.cli.worker_factory import _boxes
from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.rollout.ray_cluster import ray_cluster, worker_runtime
from consilience.sandboxes import ray_host
from consilience.sandboxes.host import HostLimits
from consilience.sandboxes.host_client import HostPool
from consilience.sandboxes.protocol import Limits, SandboxSpec
from consilience.sandboxes.ray_host import end_hosts, host_metrics, host_of_this_node, hosts

SPEC = SandboxSpec(driver="bwrap", limits=Limits(workspace_bytes=1 << 20, wall_s=10))
LIMITS = HostLimits(ttl_s=3.0, sweep_s=0.2)


class Owner:
    """A process that leases boxes and may be killed in the middle of a command."""

    def __init__(self, ask):
        self.pool = HostPool(ask, SPEC, beat_s=0.5)

    def pid(self):
        return os.getpid()

    def lease(self):
        self.box = self.pool.lease()
        self.box.write("kept", b"as it was")
        return self.box.id

    def run(self, command):
        return self.box.exec(["sh", "-c", command]).stdout


@pytest.fixture(scope="module")
def ask():
    with ray_cluster(2, object_store_bytes=80 << 20):
        yield host_of_this_node(LIMITS)
        end_hosts()


def start_owner(ask):
    return ray.remote(Owner).options(num_cpus=0, runtime_env=worker_runtime(1)).remote(ask)


def wait_for(condition, limit_s=20.0):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.timeout(180)
def test_boxes_outlive_a_killed_worker_until_they_are_found_or_their_lease_ends(ask):
    owner = start_owner(ask)
    pid, named, unnamed = ray.get(
        [owner.pid.remote(), owner.lease.remote(), owner.lease.remote()], timeout=90
    )
    # the second lease is what `run` uses; the first has no holder that knows it any more
    call = owner.run.remote("echo begun >> ran; sleep 2; echo ended >> ran")
    with HostPool(ask, SPEC, owner="successor", beat_s=0.5) as pool:
        time.sleep(1.0)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(call, timeout=30)
        box = pool.find(unnamed)
        assert box is not None
        wait_for(lambda: box.read("ran") == b"begun\nended\n")  # it ran to its end, once
        assert box.read("kept") == b"as it was"
        wait_for(lambda: pool.describe()["reaped"] == 1)  # the one that nobody asked for
        assert pool.find(named) is None and box.read("ran") == b"begun\nended\n"
    (found,) = host_metrics().values()
    assert found["leased"] == 0 and found["taken_over"] == 1 and found["leases"] == 2


def test_a_node_has_one_host_whoever_asks(ask):
    again = host_of_this_node()
    with HostPool(ask, SPEC) as one, HostPool(again, SPEC) as other:
        box = one.lease()
        assert other.find(box.id) is not None
        assert len(hosts()) == 1


def test_errors_arrive_as_they_were_raised(ask):
    impossible = SandboxSpec(driver="none")
    with HostPool(ask, SPEC) as pool:
        with pytest.raises(FileNotFoundError):
            pool.lease().read("nothing")
        with HostPool(ask, impossible) as other, pytest.raises(SandboxUnavailable, match="allowed are auto"):
            other.lease()


@pytest.mark.timeout(120)
def test_a_host_that_is_killed_takes_its_boxes_with_it_and_comes_back_empty(ask):
    (actor,) = hosts().values()
    with HostPool(ask, SPEC, beat_s=0.5) as pool:
        box = pool.lease()
        marker = f"86400.{os.getpid()}{time.monotonic_ns()}"
        host_pid = next(
            int(name)
            for name in filter(str.isdigit, os.listdir("/proc"))
            if b"ray::HostMailbox" in _read(f"/proc/{name}/cmdline")
            and int(_read(f"/proc/{name}/stat").rpartition(b")")[2].split()[1]) > 1
            and _is_ours(int(name))
        )
        work = actor.ask.remote("call", (box.id, box.key, "exec", ["sh", "-c", f"sleep {marker}"]), {})
        wait_for(lambda: _holders(marker))
        os.kill(host_pid, signal.SIGKILL)
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(work, timeout=30)
        wait_for(lambda: not _holders(marker))
        with pytest.raises(SandboxLost):
            box.exec(["true"])

        def leased():
            try:
                return pool.lease()
            except SandboxUnavailable:  # it is on its way back
                return None

        wait_for(lambda: (new := leased()) is not None and new.exec(["true"]).is_ok, limit_s=60)
        assert pool.find(box.id) is None


def _read(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


def _holders(marker):
    pids = filter(str.isdigit, os.listdir("/proc"))
    return [pid for pid in pids if marker.encode() in _read(f"/proc/{pid}/cmdline")]


def _is_ours(pid):
    """Whether it belongs to this test's cluster, and not to another one on this machine."""
    token = os.environ["RAY_AUTH_TOKEN_PATH"].encode()
    return token in _read(f"/proc/{pid}/environ")


@pytest.mark.timeout(120)
def test_a_worker_of_a_run_takes_its_boxes_from_the_host(ask):
    boxes = _boxes(SPEC, warm=0, wait_s=30.0, log_folder=None)
    try:
        assert isinstance(boxes, HostPool)
        wait_for(lambda: boxes.lease().exec(["true"]).is_ok)
        (found,) = host_metrics().values()
        assert found["leased"] >= 1
    finally:
        boxes.close()


def test_what_dead_owners_leave_is_looked_for_again_and_again(monkeypatch):
    found = iter([1, 0, 2])
    monkeypatch.setattr(ray_host, "REAP_S", 0.05)
    monkeypatch.setattr(ray_host, "reap_leftovers", lambda: next(found, 0))
    mailbox = ray_host.HostMailbox(None)
    wait_for(lambda: asyncio.run(mailbox.metrics())["leftovers"] == 3)
    assert asyncio.run(mailbox.ask("close", (), {})) == (None, None)
