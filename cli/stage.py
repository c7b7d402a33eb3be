"""A stage of the run graph: what it is, what it gets, and the order of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consilience.conf.errors import RunError
from consilience.conf.fields import nearest
from consilience.conf.schema import Config
from consilience.training.progress import Progress
from consilience.training.run_folder import RunFolder, StageFolder

if TYPE_CHECKING:
    from consilience.model.ranks import Ranks


@dataclass(frozen=True)
class StageContext:
    """What a stage function gets.

    cfg       settings as this stage sees them (a specialist's own values applied)
    folder    stages/<stage>; survives an interruption, so a stage keeps its checkpoints there
    run       the run folder; paths in a result are relative to it, so that it may be moved
    inputs    results of the stages it needs, by stage name
    progress  start(stage, total, unit), advance(n, **info), finish()
    threads   CPU threads of its trainer, its share beside other stages; None: as `engine.threads` says
    ranks     this process among those that train the stage (`model.ranks.Ranks`); None: it is alone
    """

    name: str
    domain: str | None
    cfg: Config
    folder: StageFolder
    run: RunFolder
    inputs: Mapping[str, Mapping[str, Any]]
    progress: Progress
    threads: int | None = None
    ranks: Ranks | None = None


@dataclass(frozen=True)
class Stage:
    """A node. `run` returns a JSON-plain result, which is all that later stages see of it.

    settings  digest of the settings it depends on
    files     files outside the run whose content it depends on
    needs_workers  whether it samples, so that a Ray cluster must be there
    """

    name: str
    needs: tuple[str, ...]
    run: Callable[[StageContext], Mapping[str, Any]]
    cfg: Config
    settings: str = ""
    domain: str | None = None
    files: tuple[str, ...] = ()
    needs_workers: bool = False


def in_order(stages: Iterable[Stage]) -> list[Stage]:
    """Every stage after what it needs, otherwise as given. RunError on a cycle, a gap or a double name."""
    waiting = list(stages)
    names = [stage.name for stage in waiting]
    for stage in waiting:
        if names.count(stage.name) > 1:
            raise RunError(f"two stages are called '{stage.name}'")
        for need in stage.needs:
            if need not in names:
                raise RunError(
                    f"stage '{stage.name}' needs '{need}', which does not exist; {nearest(need, names)}"
                )
    ordered: list[Stage] = []
    while waiting:
        known = {stage.name for stage in ordered}
        ready = next((stage for stage in waiting if known.issuperset(stage.needs)), None)
        if ready is None:
            raise RunError(f"stages need each other in a circle: {', '.join(s.name for s in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def up_to(stages: Sequence[Stage], targets: Iterable[str]) -> list[Stage]:
    """The targets and everything they need, in order. RunError on an unknown target."""
    by_name = {stage.name: stage for stage in stages}
    wanted: set[str] = set()
    frontier = list(targets)
    while frontier:
        name = frontier.pop()
        if name not in by_name:
            raise RunError(f"there is no stage '{name}'; {nearest(name, by_name)}")
        if name not in wanted:
            wanted.add(name)
            frontier += by_name[name].needs
    return [stage for stage in in_order(stages) if stage.name in wanted]


def dependents(stages: Sequence[Stage], name: str) -> set[str]:
    """`name` and every stage that needs it, directly or not. RunError if it does not exist."""
    found = {up_to(stages, [name])[-1].name}
    for stage in in_order(stages):
        if found.intersection(stage.needs):
            found.add(stage.name)
    return found
