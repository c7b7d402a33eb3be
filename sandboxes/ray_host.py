"""The sandbox host of each node as a detached Ray actor, and the `ask` to it. An actor is a mailbox.

Detached, so that it outlives workers, drivers and trainers that join its cluster; restarted when it dies.
What dead owners left behind, a predecessor too, is reaped first and then now and again: an engine may still
make a container for one that was killed while it asked. Its boxes end with its process: then verbs raise
SandboxLost, and nothing is found. No call is ever sent twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from consilience.conf.errors import SandboxLost, SandboxUnavailable
from consilience.sandboxes.blocking import ORDER_LIMIT_S, loop_thread
from consilience.sandboxes.host import HostLimits, SandboxHost
from consilience.sandboxes.host_reaper import reap_leftovers

NAMESPACE = "consilience"
START_LIMIT_S = 120.0
REAP_S = 60.0
_NAME = "sandbox-host-"
_MOST_CALLS = 4096  # under way at once: a lease that waits is one


class HostMailbox:
    """The actor: hands calls to a host on an event loop of its own, and brings errors back as values."""

    def __init__(self, limits: HostLimits | None) -> None:
        self._thread = loop_thread()  # boxes end with the thread that started them: not with one of Ray's
        self._num_left = reap_leftovers()

        async def made() -> SandboxHost:
            return SandboxHost(limits)

        self._host = self._thread.run(made(), ORDER_LIMIT_S)
        threading.Thread(target=self._reap, name="reap", daemon=True).start()

    def _reap(self) -> None:
        while True:
            time.sleep(REAP_S)
            with contextlib.suppress(OSError):
                self._num_left += reap_leftovers()

    async def ask(self, verb: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        work = getattr(self._host, verb)(*args, **options)
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._thread.loop)), None
        except Exception as error:  # Ray would wrap it into a class of its own
            return None, error

    async def metrics(self) -> dict[str, float]:
        found, error = await self.ask("metrics", (), {})
        if error is not None:
            raise error
        return found | {"leftovers": float(self._num_left)}


class RayAsk:
    """`host_client.Ask` to the host of one node; picklable, so that workers can be given it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __call__(self, verb: str, *args: Any, limit_s: float, **options: Any) -> Any:
        if not ray.is_initialized():  # a late heartbeat: Ray would start itself again
            raise SandboxLost("this process has left Ray, and with it the sandbox host")
        try:
            value, error = ray.get(self.actor.ask.remote(verb, args, options), timeout=limit_s)
        except GetTimeoutError:
            raise SandboxLost(f"the sandbox host did not answer to {verb} in {limit_s:g} s") from None
        except RayActorError as death:
            raise SandboxLost(f"the sandbox host died: {str(death).splitlines()[0]}") from None
        if error is not None:
            raise error
        return value


def host_of_this_node(limits: HostLimits | None = None) -> RayAsk:
    """The `ask` to this node's host, which is started if it does not run. `limits` are then its limits.

    SandboxUnavailable if it does not start.
    """
    node = ray.get_runtime_context().get_node_id()
    actor = (
        ray.remote(HostMailbox)
        .options(
            name=_NAME + node,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=0,  # a command must not run twice
            max_concurrency=_MOST_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        .remote(limits)
    )
    try:
        ray.get(actor.metrics.remote(), timeout=START_LIMIT_S)
    except (GetTimeoutError, RayActorError) as error:
        raise SandboxUnavailable(f"no sandbox host on this node: {str(error).splitlines()[0]}") from None
    return RayAsk(actor)


def is_here() -> bool:
    """Whether this process belongs to a cluster, so that `host_of_this_node` can be asked."""
    return ray.is_initialized()


def hosts() -> dict[str, Any]:
    """The actors of the hosts of this cluster, by node id."""
    named: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [row["name"] for row in named if row["namespace"] == NAMESPACE and row["name"].startswith(_NAME)]
    return {name.removeprefix(_NAME): ray.get_actor(name, namespace=NAMESPACE) for name in names}


def host_metrics() -> dict[str, dict[str, float]]:
    """`SandboxHost.metrics` of every node's host; one that does not answer is left out."""
    found = {}
    for node, actor in hosts().items():
        try:
            found[node] = ray.get(actor.metrics.remote(), timeout=ORDER_LIMIT_S)
        except (GetTimeoutError, RayActorError):
            continue
    return found


def end_hosts() -> None:
    """End every host of this cluster, and with each its boxes."""
    for actor in hosts().values():
        with contextlib.suppress(GetTimeoutError, RayActorError):
            ray.get(actor.ask.remote("close", (), {}), timeout=ORDER_LIMIT_S)
        ray.kill(actor)
