"""Ranks beside the first as Ray actors in the trainer's bundles, on whatever machines these are.

They meet at a store in the first rank's process (`rank_meeting.py`) and do what ranks of one machine do
(`rank_follower.take_part`). They read checkpoints and the tokenizer, so every machine must have the run
folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from consilience.cli.engines import backend_of
from consilience.cli.rank_follower import Ending, Run, take_part
from consilience.cli.rank_meeting import StoreMeeting, open_store
from consilience.cli.ray_session import placement_of
from consilience.cli.stage import StageContext
from consilience.cli.stages import SAMPLING
from consilience.conf.errors import EngineError
from consilience.rollout.deadlines import STALLS, StallLog
from consilience.rollout.ray_cluster import worker_environment
from consilience.rollout.ray_mailbox import Place, ask_for_stacks, end_process, own_place
from consilience.rollout.ray_placement import Seat, require_shared
from consilience.rollout.ray_slots import last_line
from consilience.training.progress import SilentProgress
from consilience.training.run_folder import RunFolder

START_LIMIT_S = 300.0
_PASSED = ("NCCL_", "GLOO_", "TORCH_", "CONSILIENCE_")  # environment of this process that the others get too


class RankMailbox:
    """The actor."""

    def arrive(self, folder: str, stacks: str | None, who: str) -> Place:
        """Where this process is, which works in `folder` if that is there."""
        with contextlib.suppress(OSError):  # relative paths of the settings, where they are here too
            os.chdir(folder)
        return own_place(stacks, who)[0]

    def take_part(self, *given: Any) -> Ending:
        return take_part(*given)


class RayRank:
    """A `rank_processes.Follower`: an actor that has arrived, at its part from construction on."""

    def __init__(self, rank: int, actor: Any, place: Place, part: Any) -> None:
        self.rank, self._actor, self._place, self._part = rank, actor, place, part
        self.pid, self.place = place.pid, f"process {place.pid} on {place.host}"
        self.stacks = Path(place.stacks) if place.stacks else None
        self.ending: Ending | None = None
        self._death = ""

    @property
    def has_ended(self) -> bool:
        self.hear()
        return self.ending is not None or bool(self._death)

    @property
    def has_died(self) -> bool:
        self.hear()
        return bool(self._death)

    def hear(self) -> None:
        if self.ending is not None or self._death or not self.is_over(0):
            return
        try:
            ending: Ending = ray.get(self._part, timeout=START_LIMIT_S)
        except RayActorError as death:
            self._death = last_line(death)
        except (RayError, GetTimeoutError) as error:
            why = EngineError(f"rank {self.rank} could not begin: {last_line(error)}")
            self.ending = "error", time.monotonic(), False, why, str(why)
        else:  # its clock is another machine's
            self.ending = ending if ending[0] == "done" else (ending[0], time.monotonic(), *ending[2:])

    def is_over(self, limit_s: float) -> bool:
        return bool(ray.wait([self._part], timeout=limit_s)[0])

    def death(self) -> str:
        return self._death

    def dump(self) -> None:
        ask_for_stacks(self._place)

    def kill(self) -> None:
        ray.kill(self._actor)

    def close(self) -> None:
        ray.kill(self._actor)
        end_process(self._place, has_stacks=False)  # one that is stopped does not hear Ray


@contextlib.contextmanager
def placed_ranks(
    run: Run, context: StageContext
) -> Iterator[tuple[StageContext, Callable[[int], RayRank], StoreMeeting, str, int | None]]:
    """(the first rank's context, what begins another rank, their meeting, backend, the first rank's GPU).

    The actors have arrived when it begins, and are gone when it ends. ConfigError where a machine does not
    see the run folder; EngineError where an actor does not start, or `cluster.port` is in use.
    """
    cfg = context.cfg
    place = placement_of(cfg, samples=context.name.partition("/")[0] in SAMPLING)
    assert place is not None  # cluster.placement is not free
    has_gpus = bool(place.trainer[0].gpus)
    kinds = place.gpu_kinds() if has_gpus else None
    backend = backend_of(cfg, len(kinds) if kinds else None, kinds)
    threads = cfg.cluster.trainer_cores * cfg.engine.ranks  # divided by the ranks again, where they are set
    context = replace(context, cfg=replace(cfg, engine=replace(cfg.engine, threads=threads)))
    require_shared(context.run.path, place.nodes(place.trainer))
    store = open_store(cfg.cluster.port)
    meeting = StoreMeeting(ray.util.get_node_ip_address(), store.port, cfg.engine.ranks)
    actors: list[Any] = []
    try:
        actors += [_spawn(seat, cfg.cluster.trainer_cores) for seat in place.trainer[1:]]
        places = _arrived(context, actors)

        def start(rank: int) -> RayRank:
            actor = actors[rank - 1]
            part = actor.take_part.remote(run, _sent(context), meeting, rank, backend)
            return RayRank(rank, actor, places[rank - 1], part)

        yield context, start, meeting, backend, torch.cuda.current_device() if has_gpus else None
    finally:
        for actor in actors:
            ray.kill(actor)
        del store


def _spawn(seat: Seat, num_threads: int) -> Any:
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED)}
    runtime = {"env_vars": passed | worker_environment(num_threads)}
    return ray.remote(RankMailbox).options(**seat.options(), max_restarts=0, runtime_env=runtime).remote()


def _arrived(context: StageContext, actors: Sequence[Any]) -> list[Place]:
    """Where the actors' processes are."""
    stacks = StallLog(context.run.path.resolve() / STALLS).stacks
    names = [f"stage-{context.name.replace('/', '-')}-rank-{rank}" for rank in range(1, len(actors) + 1)]
    asked = [actor.arrive.remote(os.getcwd(), str(stacks), name) for actor, name in zip(actors, names)]
    places: list[Place] = []
    try:
        for answer in asked:
            places.append(ray.get(answer, timeout=START_LIMIT_S))
    except (RayError, GetTimeoutError) as error:
        size = len(actors) + 1
        raise EngineError(f"rank {len(places) + 1} of {size} did not start: {last_line(error)}") from None
    return places


def _sent(context: StageContext) -> StageContext:
    """The context as another machine takes it: paths are absolute, and nobody draws progress there."""
    cfg, root = context.cfg, context.run.path.resolve()
    cfg = replace(cfg, run=replace(cfg.run, folder=str(Path(cfg.run.folder).resolve())))
    run = RunFolder(root)
    folder = run.stage(context.folder.name)
    return replace(context, cfg=cfg, run=run, folder=folder, progress=SilentProgress(), ranks=None)
