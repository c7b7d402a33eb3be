"""Where the roles of a run are on a Ray cluster: bundles of cores and GPUs, reserved together or not at all.

    apart        trainer  [rank 0] [rank 1] …        rollout  [worker + its boxes] [worker + its boxes] …
    colocated    [rank 0 + workers 0, R, … + their boxes] [rank 1 + workers 1, R + 1, … + their boxes] …

Rank 0 is the driver: its bundle is on the driver's node, and what is in it is kept free for it. Teachers
score in the trainer's bundles, one at a time. A node's sandbox host is an actor of its own that outlives
drivers, so it is in no bundle; the cores of its boxes are, beside the worker that uses them. When a node is
lost, Ray moves its bundles to nodes that have room.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from consilience.conf.errors import ConfigError, EngineError

NODE_LABEL = "ray.io/node-id"
_KIND = "accelerator_type:"
_ASK_LIMIT_S = 60.0
_SHARE = 1e-4  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True, slots=True)
class Needs:
    """What the roles of one run take of a cluster.

    ranks, rank_cores, rank_gpus         of the trainer: 0 or 1 GPU a rank
    workers, worker_cores, worker_gpus   of rollout, cores of its boxes included; a part of a GPU is allowed
    """

    ranks: int
    rank_cores: int
    rank_gpus: int
    workers: int
    worker_cores: int
    worker_gpus: float


@dataclass(frozen=True, slots=True)
class Seat:
    """A place for one actor in a reserved bundle."""

    group: Any
    bundle: int
    cores: float
    gpus: float

    def options(self) -> dict[str, Any]:
        """What Ray takes to start an actor or a task there."""
        there = PlacementGroupSchedulingStrategy(self.group, self.bundle, False)
        return {"num_cpus": self.cores, "num_gpus": self.gpus, "scheduling_strategy": there}


@dataclass(slots=True)
class Placement:
    """The seats of the trainer's ranks and of the rollout workers, until `release`."""

    trainer: list[Seat]
    workers: list[Seat]
    groups: list[Any] = field(default_factory=list)

    def nodes(self, seats: Sequence[Seat]) -> list[str]:
        """Node id of each seat."""
        tables: dict[Any, Any] = {group.id: placement_group_table(group) for group in self.groups}
        return [tables[seat.group.id]["bundles_to_node_id"][seat.bundle] for seat in seats]

    def wait(self, limit_s: float) -> bool:
        """Whether all bundles are there within the limit; those of a lost node may be on their way."""
        until = time.monotonic() + limit_s
        return all(g.wait(max(1, math.ceil(until - time.monotonic()))) for g in self.groups)  # whole seconds

    def gpu_kinds(self) -> list[str]:
        """Kind of GPU at each of the trainer's seats, "" where Ray does not know."""
        rows: Any = ray.nodes()
        kinds = {row["NodeID"]: _kind(row["Resources"]) for row in rows}
        return [kinds.get(node, "") for node in self.nodes(self.trainer)]

    def driver_gpu(self) -> int | None:
        """Number, on this machine, of the GPU that the driver's bundle has; None: it has none."""
        seat = self.trainer[0]
        if not seat.gpus:
            return None
        ask = ray.remote(max_retries=0)(_gpus_here).options(**seat.options() | {"num_cpus": 0})
        found: list[int] = ray.get(ask.remote(), timeout=_ASK_LIMIT_S)
        return found[0]

    def release(self) -> None:
        """Give the bundles back; whatever still runs in them ends. Safe to call twice."""
        groups, self.groups = self.groups, []
        for group in groups:
            with contextlib.suppress(Exception):  # the cluster may be gone
                remove_placement_group(group)


def reserve(needs: Needs, *, is_colocated: bool, spread: bool, limit_s: float) -> Placement:
    """Reserve the bundles of all roles, workers on as few nodes as hold them or `spread` over many.

    EngineError, and nothing stays reserved, where the cluster does not have them within `limit_s` (in which
    an autoscaler may start nodes). ConfigError where colocated workers leave the trainer nothing of a GPU.
    """
    place = Placement([], [])
    strategy = "SPREAD" if spread else "PACK"
    try:
        if is_colocated:
            _colocated(place, needs, strategy)
        else:
            rank = {"CPU": float(needs.rank_cores), "GPU": float(needs.rank_gpus)}
            worker = {"CPU": float(needs.worker_cores), "GPU": needs.worker_gpus}
            place.trainer = _seats(place, [rank] * needs.ranks, "PACK", driver_first=True)
            place.workers = _seats(place, [worker] * needs.workers, strategy)
        if not place.wait(limit_s):
            raise EngineError(_too_large(needs, is_colocated, limit_s))
    except BaseException:
        place.release()
        raise
    return place


def require_shared(
    folder: Path, nodes: Iterable[str], sees: Callable[[str], bool] = lambda path: Path(path).exists()
) -> None:
    """ConfigError unless each of these nodes sees what this process writes into `folder`, which is made.

    sees  looks for a path, on the node
    """
    others = set(nodes) - {ray.get_runtime_context().get_node_id()}
    if not others:
        return
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".seen-{secrets.token_hex(8)}"
    token.touch()
    look = ray.remote(num_cpus=0)(sees)
    try:
        for node in sorted(others):
            there = NodeAffinitySchedulingStrategy(node, soft=False)
            answer = look.options(scheduling_strategy=there).remote(str(token))
            if not ray.get(answer, timeout=_ASK_LIMIT_S):
                raise ConfigError(
                    f"node {node[:8]} of the cluster does not see the run folder {folder}: ranks and workers "
                    "there read and write it; set run.folder to a filesystem that all machines share"
                )
    except (RayError, GetTimeoutError) as error:
        raise EngineError(f"a node of the cluster gave no answer: {str(error).splitlines()[0]}") from None
    finally:
        token.unlink()


def _colocated(place: Placement, needs: Needs, strategy: str) -> None:
    """One bundle a rank, with every R-th worker in it; a GPU is the rank's but for the workers' parts."""
    bundles, counts = [], [len(range(rank, needs.workers, needs.ranks)) for rank in range(needs.ranks)]
    for count in counts:
        cores = needs.rank_cores + count * needs.worker_cores
        bundles.append({"CPU": float(cores), "GPU": float(needs.rank_gpus)})
    left = needs.rank_gpus - max(counts) * needs.worker_gpus
    if needs.worker_gpus and left < _SHARE:
        raise ConfigError(
            f"cluster.worker_gpus is {needs.worker_gpus:g}, and up to {max(counts)} workers share the GPU of "
            "a rank, which needs a part of it too; lower cluster.worker_gpus or rollout.num_workers"
        )
    group = _group(place, bundles, strategy, driver_first=True)
    rank_gpus = max(0.0, math.floor(left / _SHARE) * _SHARE)
    place.trainer = [Seat(group, i, needs.rank_cores, rank_gpus) for i in range(needs.ranks)]
    place.workers = [
        Seat(group, i % needs.ranks, needs.worker_cores, needs.worker_gpus) for i in range(needs.workers)
    ]


def _seats(
    place: Placement, bundles: Sequence[Mapping[str, float]], strategy: str, *, driver_first: bool = False
) -> list[Seat]:
    """A seat that fills it in each of these bundles."""
    if not bundles:
        return []
    group = _group(place, bundles, strategy, driver_first=driver_first)
    return [Seat(group, i, bundle["CPU"], bundle["GPU"]) for i, bundle in enumerate(bundles)]


def _group(
    place: Placement, bundles: Sequence[Mapping[str, float]], strategy: str, *, driver_first: bool
) -> Any:
    given = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
    labels: list[dict[str, str]] = [{} for _ in given]
    if driver_first:
        labels[0] = {NODE_LABEL: ray.get_runtime_context().get_node_id()}
    group = placement_group(given, strategy=strategy, bundle_label_selector=labels)
    place.groups.append(group)
    return group


def _too_large(needs: Needs, is_colocated: bool, limit_s: float) -> str:
    rows: Any = ray.nodes()
    there = [row["Resources"] for row in rows if row["Alive"]]
    machines = ", ".join(f"{r.get('CPU', 0):g} cores and {r.get('GPU', 0):g} GPUs" for r in there)
    free = ray.available_resources()
    how = "together" if is_colocated else "and"
    return (
        f"the cluster cannot hold {needs.ranks} ranks of {needs.rank_cores} cores and {needs.rank_gpus} GPUs "
        f"{how} {needs.workers} workers of {needs.worker_cores} cores and {needs.worker_gpus:g} GPUs (with "
        f"rank 0 on this machine): it has {len(there)} nodes ({machines}), of which {free.get('CPU', 0):g} "
        f"cores and {free.get('GPU', 0):g} GPUs were free after {limit_s:g} s; lower engine.ranks, "
        "rollout.num_workers, rollout.threads_per_worker or the sizes in group cluster, or add nodes"
    )


def _kind(resources: Mapping[str, float]) -> str:
    return next((name.removeprefix(_KIND) for name in resources if name.startswith(_KIND)), "")


def _gpus_here() -> list[int]:
    return [int(found) for found in ray.get_gpu_ids()]
