"""What the sandbox hosts of a run's nodes have done, among the numbers of its steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from consilience.training.metrics import MetricsSink, RolloutRow

PREFIX = "sandbox/"


class WithSandboxHosts:
    """A sink whose rows also have `sandbox/…`: `SandboxHost.metrics` over all nodes, where there are hosts.

    `tell` gives each host's numbers by node; None: those of the Ray cluster that this process is part of.
    """

    def __init__(
        self, sink: MetricsSink, tell: Callable[[], Mapping[str, Mapping[str, float]]] | None = None
    ) -> None:
        self._sink, self._tell = sink, tell or hosts_here

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        self._sink.scalars(step, {**values, **over_all(self._tell())})

    def rollouts(self, step: int, rows: Sequence[RolloutRow]) -> None:
        self._sink.rollouts(step, rows)

    def finish(self) -> None:
        self._sink.finish()


def hosts_here() -> Mapping[str, Mapping[str, float]]:
    """Of this process's cluster; none outside one."""
    if "ray" not in sys.modules:
        return {}
    from consilience.sandboxes.ray_host import host_metrics, is_here

    return host_metrics() if is_here() else {}


def over_all(hosts: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sums over the hosts, the slowest host's latencies (`…_ms`), how many there are; nothing where none is.

    With several hosts each one's own numbers stand beside them, under the first 8 characters of its node.
    """
    if not hosts:
        return {}
    found: dict[str, float] = {f"{PREFIX}hosts": float(len(hosts))}
    for node, numbers in hosts.items():
        for name, value in numbers.items():
            key = PREFIX + name
            is_latency = name.endswith("_ms")
            found[key] = max(found.get(key, 0.0), value) if is_latency else found.get(key, 0.0) + value
            if len(hosts) > 1:
                found[f"{PREFIX}{node[:8]}/{name}"] = value
    return found
