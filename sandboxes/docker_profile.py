"""What is asked of a container engine, and whether a started container really has it.

Everything is off that a small program does not need. The profile is ours in full: nothing is left to
what an engine's version takes for its default.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.conf.errors import SandboxUnavailable
from consilience.sandboxes.box import MODEL_ENV, OOM_SCORE
from consilience.sandboxes.cgroups import start_time
from consilience.sandboxes.protocol import Isolation, Limits
from consilience.sandboxes.runner_bundle import BOOTSTRAP
from consilience.sandboxes.seccomp import docker_profile

PROFILE = "agent-1"  # changes with what `container_config` asks for, so that a record tells it
NUM_CPUS = 1.0  # of one box: a spinning program leaves its neighbours theirs
TMPFS = "rw,exec,nosuid,nodev,mode=1777,size={size},nr_inodes={inodes}"


@dataclass(frozen=True, slots=True)
class Engine:
    """A Docker Engine that answers, has the image and the runtime."""

    url: str
    version: str
    image: str
    image_id: str
    has_userns: bool
    oci_runtime: str = "runc"
    has_cpu_quota: bool = True

    @property
    def level(self) -> Isolation:
        """What its boxes are, if what is found inside bears it out."""
        if self.oci_runtime.startswith("kata"):
            return Isolation.VM
        if self.oci_runtime.startswith("runsc"):
            return Isolation.GVISOR
        return Isolation.CONTAINER_USERNS if self.has_userns else Isolation.CONTAINER

    @property
    def runtime(self) -> str:
        return f"docker {self.version}, {self.oci_runtime}"


def container_config(engine: Engine, limits: Limits, name: str) -> dict[str, Any]:
    """What is asked of the engine: everything off that a small program does not need."""
    inodes = max(1024, limits.workspace_bytes // 4096)
    tmpfs = TMPFS.format(size=limits.workspace_bytes, inodes=inodes)
    small = TMPFS.format(size=min(limits.workspace_bytes, 16 << 20), inodes=4096)
    return {
        "Image": engine.image_id,
        "Entrypoint": [],
        "Cmd": ["python3", "-s", "-S", "-c", BOOTSTRAP],
        "Env": [f"{key}={value}" for key, value in MODEL_ENV.items()],
        "User": "0:0",
        "WorkingDir": "/workspace",
        "Hostname": "sbx",
        "NetworkDisabled": True,
        "OpenStdin": True,
        "StdinOnce": True,
        "AttachStdin": True,
        "AttachStdout": True,
        "AttachStderr": True,
        "Tty": False,
        "Labels": {
            "consilience.box": name,
            "consilience.owner": f"{socket.gethostname()}:{os.getpid()}:{start_time(os.getpid())}",
            "consilience.image": engine.image_id,
            "consilience.profile": PROFILE,
        },
        "HostConfig": {
            "AutoRemove": True,
            "NetworkMode": "none",
            "ReadonlyRootfs": True,
            "CapDrop": ["ALL"],
            "CapAdd": ["SETUID", "SETGID", "KILL"],
            "SecurityOpt": ["no-new-privileges:true", f"seccomp={json.dumps(docker_profile())}"],
            "Memory": limits.memory_bytes,
            "MemorySwap": limits.memory_bytes,
            "OomScoreAdj": OOM_SCORE,
            "PidsLimit": limits.processes + 1,  # the runner is one of them
            "ShmSize": min(limits.workspace_bytes, 16 << 20),
            "Tmpfs": {"/workspace": tmpfs, "/tmp": small},
            "Ulimits": [
                {"Name": "core", "Soft": 0, "Hard": 0},
                {"Name": "nofile", "Soft": 1024, "Hard": 1024},
                {"Name": "fsize", "Soft": limits.file_bytes, "Hard": limits.file_bytes},
            ],
            "Runtime": engine.oci_runtime,
            "IpcMode": "private",
            "CgroupnsMode": "private",
            "LogConfig": {"Type": "none"},
            "Init": False,
            "RestartPolicy": {"Name": "no"},
            **({"NanoCpus": int(NUM_CPUS * 1e9)} if engine.has_cpu_quota else {}),
        },
    }


# of a container as the engine describes it: what must be as it was asked for
CHECKED = [
    "Runtime",
    "NetworkMode",
    "ReadonlyRootfs",
    "CapDrop",
    "CapAdd",
    "Memory",
    "MemorySwap",
    "PidsLimit",
    "NanoCpus",
    "ShmSize",
    "Tmpfs",
    "IpcMode",
    "CgroupnsMode",
    "OomScoreAdj",
    "AutoRemove",
]
FORBIDDEN = [
    "Privileged",
    "Binds",
    "Mounts",
    "Devices",
    "VolumesFrom",
    "PidMode",
    "UTSMode",
    "UsernsMode",
    "PortBindings",
    "ExtraHosts",
    "Links",
]


def check_applied(asked: dict[str, Any], told: dict[str, Any]) -> None:
    """SandboxUnavailable naming each setting that the engine did not apply. `told`: its own description."""
    wanted, has = asked["HostConfig"], told["HostConfig"]
    faults = [
        f"{name} is {has.get(name)!r}, asked for was {wanted[name]!r}"
        for name in CHECKED
        if name in wanted and _plain(has.get(name)) != _plain(wanted[name])
    ]
    faults += [f"{name} is {has[name]!r}" for name in FORBIDDEN if has.get(name)]
    options = has.get("SecurityOpt") or []
    faults += [f"{option[:24]} is not set" for option in wanted["SecurityOpt"] if option not in options]
    limits = {limit["Name"]: limit["Hard"] for limit in has.get("Ulimits") or []}
    faults += [
        f"the limit of {limit['Name']} is {limits.get(limit['Name'])}"
        for limit in wanted["Ulimits"]
        if limits.get(limit["Name"]) != limit["Hard"]
    ]
    if told["Image"] != asked["Image"]:
        faults.append(f"its image is {told['Image']}, asked for was {asked['Image']}")
    if faults:
        raise SandboxUnavailable(f"docker: the container was made otherwise: {'; '.join(faults)}")


def _plain(value: Any) -> Any:
    """Capabilities come back with or without their prefix, in any order."""
    if isinstance(value, list):
        return sorted(str(name).upper().removeprefix("CAP_") for name in value)
    return value


def check_kernel(engine: Engine, boot_id: str) -> None:
    """A runtime that promises a kernel of its own must not show this machine's. SandboxUnavailable."""
    own = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    if engine.level >= Isolation.GVISOR and boot_id == own:
        raise SandboxUnavailable(
            f"docker: the runtime {engine.oci_runtime} should give its own kernel, but the box "
            "shows this machine's; it was destroyed"
        )
