"""Ray for one run: a private local cluster, or the one that the environment names.

Traps handled here: token authentication is on by default but not sent by every client; usage statistics;
unix socket paths longer than 107 characters; `ray.init()` joining somebody else's local cluster by a file
it left behind; workers that import an installed copy instead of the tree the driver runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilience.conf.errors import EngineError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_prestart_worker_first_driver": "0",  # idle interpreters that our actors would not use
}
_CONNECT_TIMEOUT_S = 10.0
_LONGEST_TEMP_DIR = 40  # "/session_<date>_<pid>/sockets/plasma_store" takes 60 of the 107 characters


@dataclass(slots=True)
class RayCluster:
    """What `start_ray` did, for `stop_ray` to undo. `is_ours` is False where it only attached."""

    address: str
    is_ours: bool
    temp_dir: Path | None = None
    environment: dict[str, str | None] | None = None  # values to put back


def start_ray(
    num_cpus: int = 2,
    *,
    object_store_bytes: int = 256 << 20,
    dashboard_port: int | None = None,
    log_to_driver: bool = False,
    namespace: str = "consilience",
) -> RayCluster:
    """Attach to the cluster that RAY_ADDRESS names (a Ray job has it set), else start a private one.

    dashboard_port  None = no dashboard. EngineError if the port is in use, or if Ray does not come up.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address
    if address:
        _check_reachable(address)
    elif dashboard_port is not None:
        _check_port_is_free(dashboard_port)
    before = {key: os.environ.get(key) for key in (*_QUIET, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    temp_dir = None
    options: dict[str, Any] = {}
    if not address:
        if dashboard_port is not None:
            options |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
        temp_dir = _short_temp_dir()
        _private_token(temp_dir)
        options |= {
            "num_cpus": num_cpus,
            "object_store_memory": object_store_bytes,
            "include_dashboard": dashboard_port is not None,
            "_temp_dir": str(temp_dir),
        }
    cluster = RayCluster(address or "local", not address, temp_dir, before)
    try:
        _init(cluster.address, namespace, log_to_driver, options)
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        stop_ray(cluster)
        what = f"attach to the Ray cluster at {address}" if address else "start a local Ray cluster"
        hint = (
            "is it up, and is RAY_AUTH_MODE the cluster's?"
            if address
            else "is there room in the temp folder, memory and /dev/shm?"
        )
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise EngineError(f"cannot {what}: {reason}; {hint}") from error
    return cluster


def stop_ray(cluster: RayCluster) -> None:
    """Disconnect; end the processes and the temp folder only of a cluster that `start_ray` started."""
    import ray

    ray.shutdown()  # no limit: Ray gives each of its processes some seconds and then kills it
    for key, value in (cluster.environment or {}).items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    if cluster.temp_dir is not None:
        shutil.rmtree(cluster.temp_dir, ignore_errors=True)


@contextlib.contextmanager
def ray_cluster(num_cpus: int = 2, **options: Any):
    """`start_ray` and, whatever happens, `stop_ray`."""
    cluster = start_ray(num_cpus, **options)
    try:
        yield cluster
    finally:
        stop_ray(cluster)


def worker_environment(num_threads: int = 1) -> dict[str, str]:
    """Environment of a worker process: the driver's own tree first, and its share of the cores.

    The tree is the one this file was imported from, so an uploaded working directory (a Ray job's) wins
    over an installed copy.
    """
    env = {"OMP_NUM_THREADS": str(num_threads), "TOKENIZERS_PARALLELISM": "false"}
    tree = Path(__file__).resolve().parent.parent
    if (tree / "consilience.py").exists():
        others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(tree)]
        env["PYTHONPATH"] = os.pathsep.join([str(tree), *others])
    return env


def worker_runtime(num_threads: int, python: str | None = None) -> dict[str, Any]:
    """Ray's runtime environment of a worker process.

    python  its interpreter; None: the driver's own. Another one must have the driver's Ray and Python version
    """
    runtime: dict[str, Any] = {"env_vars": worker_environment(num_threads)}
    return runtime if python is None else runtime | {"py_executable": python}


def _init(address: str, namespace: str, log_to_driver: bool, options: dict[str, Any]) -> None:
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    # Ray reads these settings when it is first imported, which may be long ago, and keeps the token it
    # read; its own start-up does the same two calls when it switches to a token (Ray 2.60).
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    ray.init(
        address=address,
        namespace=namespace,
        log_to_driver=log_to_driver,
        logging_level=logging.ERROR,
        **options,
    )


def _check_reachable(address: str) -> None:
    """Ray itself would try for minutes. Addresses without a port ("auto") are left to Ray."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"no Ray cluster answers at RAY_ADDRESS={address}: {error}; start it, or unset RAY_ADDRESS for a "
            "private one"
        ) from None


def _check_port_is_free(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise EngineError(
                f"port {port} cannot be used for Ray's dashboard: {error.strerror}; "
                "choose another one, or none to go without a dashboard"
            ) from None


def _short_temp_dir() -> Path:
    """A private folder whose path leaves room for Ray's sockets."""
    wanted = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    root = wanted if len(wanted) <= _LONGEST_TEMP_DIR else "/tmp"
    return Path(tempfile.mkdtemp(prefix="cs-ray-", dir=root))


def _private_token(temp_dir: Path) -> None:
    """A fresh token that only this user can read, unless the environment already chose a mode."""
    if "RAY_AUTH_MODE" in os.environ:
        return
    path = temp_dir / "auth_token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
