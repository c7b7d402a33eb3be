"""The Docker driver without an engine: what it asks for, and every way an engine can be missing.

With an engine, all of test_box, test_verify and test_protocol run on it too.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes import docker_driver
from consilience.sandboxes.docker_profile import Engine, check_applied, check_kernel, container_config
from consilience.sandboxes.protocol import Isolation, Limits

ENGINE = Engine("unix:///x", "20.10", "img:1", "sha256:abc", False)


def test_everything_a_small_program_does_not_need_is_off():
    limits = Limits(memory_bytes=64 << 20, processes=9, workspace_bytes=8 << 20)
    config = container_config(ENGINE, limits, "box-1")
    host = config["HostConfig"]
    assert host["NetworkMode"] == "none" and config["NetworkDisabled"]
    assert host["ReadonlyRootfs"] and host["AutoRemove"] and config["StdinOnce"]
    assert host["CapDrop"] == ["ALL"] and host["CapAdd"] == ["SETUID", "SETGID", "KILL"]
    assert host["Memory"] == host["MemorySwap"] == 64 << 20 and host["PidsLimit"] == 10
    assert not {"Binds", "Mounts", "Privileged", "Devices", "PidMode"} & set(host)
    assert "size=8388608" in host["Tmpfs"]["/workspace"] and "nr_inodes" in host["Tmpfs"]["/workspace"]
    no_new_privileges, profile = host["SecurityOpt"]
    assert no_new_privileges == "no-new-privileges:true"
    assert json.loads(profile.removeprefix("seccomp="))["syscalls"]
    assert config["Image"] == "sha256:abc"  # by digest: a moved tag changes nothing
    assert config["Labels"]["consilience.box"] == "box-1"
    assert config["Labels"]["consilience.image"] == "sha256:abc"
    host_name, pid, started = config["Labels"]["consilience.owner"].split(":")
    assert (host_name, int(pid)) == (socket.gethostname(), os.getpid()) and started.isdigit()
    ulimits = {limit["Name"]: limit["Hard"] for limit in host["Ulimits"]}
    assert ulimits == {"core": 0, "nofile": 1024, "fsize": limits.file_bytes}
    assert (host["CgroupnsMode"], host["IpcMode"], host["Runtime"]) == ("private", "private", "runc")
    assert host["NanoCpus"] == 1_000_000_000


def test_a_container_made_otherwise_than_asked_for_is_refused_setting_by_setting():
    asked = container_config(ENGINE, Limits(), "box-1")
    told = json.loads(json.dumps({"Image": asked["Image"], "HostConfig": asked["HostConfig"]}))
    told["HostConfig"]["CapAdd"] = ["CAP_KILL", "CAP_SETGID", "CAP_SETUID"]  # as some engines write them
    check_applied(asked, told)
    changes = {
        "Runtime": "runsc",
        "NetworkMode": "bridge",
        "ReadonlyRootfs": False,
        "Privileged": True,
        "CapAdd": ["SYS_ADMIN"],
        "PidsLimit": 0,
        "Memory": 0,
        "Binds": ["/var/run/docker.sock:/var/run/docker.sock"],
        "PidMode": "host",
        "SecurityOpt": ["seccomp=unconfined"],
        "Ulimits": [],
    }
    for name, value in changes.items():
        with pytest.raises(SandboxUnavailable, match="is not set" if name == "SecurityOpt" else "is"):
            check_applied(asked, {**told, "HostConfig": {**told["HostConfig"], name: value}})
    with pytest.raises(SandboxUnavailable, match="its image is sha256:other"):
        check_applied(asked, {**told, "Image": "sha256:other"})


def test_a_runtime_that_promises_a_kernel_of_its_own_must_show_another_one():
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for runtime, level in (("runsc", Isolation.GVISOR), ("kata-fc", Isolation.VM)):
        engine = Engine("unix:///x", "20.10", "img:1", "sha256:abc", False, runtime)
        assert engine.level is level and runtime in engine.runtime
        check_kernel(engine, "another")
        with pytest.raises(SandboxUnavailable, match="its own kernel"):
            check_kernel(engine, here)
    check_kernel(ENGINE, here)


def test_a_runtime_the_engine_lacks_is_a_reason():
    engine = docker_driver.find_engine(None, "runsc")
    if not isinstance(docker_driver.find_engine(), str):
        assert "no runtime runsc; it has" in str(engine)
    else:
        assert isinstance(engine, str)


def test_a_remapped_engine_is_a_level_stronger():
    assert ENGINE.level is Isolation.CONTAINER
    assert Engine("u", "v", "i", "d", True).level is Isolation.CONTAINER_USERNS


class FakeEngine:
    """An engine's socket that gives one prepared answer per path."""

    def __init__(self, path: Path, answers: dict[str, tuple[int, bytes]]) -> None:
        self._answers = answers
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._server.accept()
            with connection:
                target = connection.recv(4096).split()[1].decode()
                if target == "/end":
                    return
                status, body = self._answers.get(target, (404, b"{}"))
                head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                connection.sendall(head.encode() + body)

    def close(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"GET /end HTTP/1.1\r\n\r\n")
        self._thread.join(5)
        self._server.close()


def found(host: str) -> str:
    """What find_engine says in a process whose DOCKER_HOST is `host`."""
    script = "from consilience.sandboxes.docker_driver import find_engine; print(find_engine('img:1'))"
    env = {**os.environ, "DOCKER_HOST": host}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=root)
    return done.stdout + done.stderr


INFO = {"OSType": "linux", "ServerVersion": "99.1", "SecurityOptions": ["name=seccomp,profile=default"]}
IMAGE = (200, b'{"Id": "sha256:f00"}')


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({}, "does not run Linux containers"),
        ({"/info": (500, b"{}")}, "does not answer (HTTP 500)"),
        ({"/info": (200, b"no json")}, "does not answer"),
        ({"/info": (200, json.dumps(INFO).encode())}, "no image img:1; build it with"),
        ({"/info": (200, json.dumps({**INFO, "OSType": "windows"}).encode())}, "does not run Linux"),
        (
            {
                "/info": (200, json.dumps({**INFO, "SecurityOptions": None}).encode()),
                "/images/img:1/json": IMAGE,
            },
            "seccomp",
        ),
        ({"/info": (200, json.dumps(INFO).encode()), "/images/img:1/json": IMAGE}, "image_id='sha256:f00'"),
    ],
)
def test_an_engine_is_used_only_when_it_answers_and_has_what_is_needed(tmp_path, answers, words):
    path = tmp_path / "engine.sock"
    engine = FakeEngine(path, answers)
    try:
        assert words in found(f"unix://{path}")
    finally:
        engine.close(path)


def test_an_image_that_moved_away_from_its_pin_is_refused(tmp_path):
    path = tmp_path / "engine.sock"
    engine = FakeEngine(path, {"/info": (200, json.dumps(INFO).encode()), "/images/img:1/json": IMAGE})
    script = "from consilience.sandboxes.docker_driver import find_engine as f\n"
    script += "print(f('img:1@sha256:f00')); print(f('img:1@sha256:bad')); print(f('img:1', 'kata'))"
    env = {**os.environ, "DOCKER_HOST": f"unix://{path}"}
    root = Path(__file__).parents[2]
    try:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=root, timeout=60)
    finally:
        engine.close(path)
    kept, moved, missing = done.stdout.splitlines()
    assert "image_id='sha256:f00'" in kept
    assert "is sha256:f00 now, pinned is sha256:bad" in moved and "no runtime kata; it has runc" in missing


def test_no_socket_a_dead_socket_and_a_remote_engine_are_reasons(tmp_path):
    assert "does not exist" in found(f"unix://{tmp_path}/absent.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    assert "does not answer" in found(f"unix://{tmp_path}/dead.sock")
    assert "only a local engine" in found("tcp://127.0.0.1:1")


def test_importing_the_driver_does_not_import_the_engine_library():
    script = (
        "import sys, consilience.sandboxes.probe, consilience.sandboxes.docker_driver as d; d.find_engine()\n"
    )
    script += "print('aiodocker' in sys.modules, 'aiohttp' in sys.modules)"
    root = Path(docker_driver.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "False False", done.stderr
