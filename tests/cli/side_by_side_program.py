"""Stage functions that run in child processes, and a program of them for tests that send signals.

`python side_by_side_program.py FOLDER forever`: base, then two stages side by side that never end by
themselves. With `plain` they do, at once.
Every stage leaves `FOLDER/<stage>.pid` (with a dash for the slash).
"""

import os
import signal
import sys
import time
from pathlib import Path

from consilience.cli.graph import Graph
from consilience.cli.progress_display import ProgressLines
from consilience.cli.stage import Stage, StageContext
from consilience.cli.stage_process import warm_up
from consilience.conf.errors import EngineError
from consilience.conf.schema import Config, EngineConfig
from consilience.training.run_folder import RunFolder

NEEDS = {
    "base": (),
    "sft/a": ("base",),
    "sft/b": ("base",),
    "grpo/a": ("sft/a",),
    "grpo/b": ("sft/b",),
    "distill": ("grpo/a", "grpo/b"),
}
LIGHT = ("pytest", "consilience.cli.stage_process")
FOREVER_S = 100.0


class OddError(Exception):
    """An error that does not survive a pickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def plain(context: StageContext) -> dict[str, object]:
    here(context)
    return {
        "pid": os.getpid(),
        "threads": context.threads,
        "inputs": sorted(context.inputs),
        "tree": sys.modules["consilience"].__path__[0],
        "cwd": os.getcwd(),
        "variable": os.environ.get("OF_THE_PARENT"),
        "omp": os.environ.get("OMP_NUM_THREADS"),
    }


def meets(context: StageContext) -> dict[str, object]:
    """Ends only after the other specialist's stage of the same kind has begun."""
    kind, _, domain = context.name.partition("/")
    result = plain(context)
    wait_until_here(context, f"{kind}/{'b' if domain == 'a' else 'a'}")
    return result


def overtakes(context: StageContext) -> dict[str, object]:
    """sft/b ends only after grpo/a has begun."""
    result = plain(context)
    if context.name == "sft/b":
        wait_until_here(context, "grpo/a")
    return result


def lingers(context: StageContext) -> dict[str, object]:
    """sft/b ends only after grpo/a is done, so that grpo/b has nothing beside it."""
    result = plain(context)
    if context.name == "sft/b":
        done = context.run.stage("grpo-a").path / "done.json"
        wait_for_file(done, f"{context.name} waited for grpo/a")
    return result


def counts(context: StageContext) -> dict[str, object]:
    context.progress.start(context.name, 3, "step")
    for step in range(3):
        context.progress.advance(1, loss=float(step), tokens=10)
    context.progress.finish()
    return {}


def forever(context: StageContext) -> dict[str, object]:
    result = plain(context)
    if context.name != "base":
        time.sleep(FOREVER_S)
    return result


def stubborn(context: StageContext) -> dict[str, object]:
    """Does not end when it is asked to."""
    began = time.monotonic()
    while time.monotonic() - began < FOREVER_S:
        try:
            forever(context)
        except KeyboardInterrupt:
            continue
    return {}


def fails(context: StageContext) -> dict[str, object]:
    wait_until_here(context, "sft/b")
    raise EngineError("loss is not finite")


def breaks(context: StageContext) -> dict[str, object]:
    raise OddError("this", "that")


def divides(context: StageContext) -> dict[str, object]:
    return {"value": 1 // 0}


def is_killed(context: StageContext) -> dict[str, object]:
    here(context)
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def freezes(context: StageContext) -> dict[str, object]:
    """Stops as by SIGSTOP, where no signal handler and no thread of its own can help it."""
    here(context)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(FOREVER_S)
    return {}


def stops_itself(context: StageContext) -> dict[str, object]:
    here(context)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(FOREVER_S)
    return {}


def leaves_an_object(context: StageContext) -> dict[str, object]:
    return {"function": lambda: None}


def attaches(context: StageContext) -> dict[str, object]:
    """Meets the other one, both with a worker on the cluster that the environment names."""
    import ray

    from consilience.rollout.ray_cluster import start_ray, stop_ray

    cluster = start_ray()
    result = {"is_ours": cluster.is_ours, "node": ray.get_runtime_context().get_node_id()}
    result["answer"] = ray.get(ray.remote(num_cpus=1)(lambda: os.getpid()).remote(), timeout=FOREVER_S) > 0
    meets(context)
    stop_ray(cluster)
    return result


def here(context: StageContext) -> None:
    path = pid_file(context.run.path, context.name)
    beside = path.with_suffix(".new")
    beside.write_text(str(os.getpid()))
    beside.rename(path)
    with (context.run.path / "order.txt").open("a") as log:
        log.write(f"{context.name}\n")


def pid_file(folder: Path, stage: str) -> Path:
    return folder / f"{stage.replace('/', '-')}.pid"


def wait_until_here(context: StageContext, other: str) -> None:
    wait_for_file(pid_file(context.run.path, other), f"{context.name} waited for {other}")


def wait_for_file(path: Path, complaint: str) -> None:
    deadline = time.monotonic() + FOREVER_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(complaint)
        time.sleep(0.01)


def stages(default=plain, threads: int = 0, needs_workers: str = "", **functions) -> list[Stage]:
    """The graph; `sft_a=fails` names one stage's function. Stages that begin with `needs_workers` do."""
    cfg = Config(engine=EngineConfig(threads=threads))
    return [
        Stage(
            name,
            needs,
            functions.get(name.replace("/", "_"), default),
            cfg,
            needs_workers=bool(needs_workers) and name.startswith(needs_workers),
        )
        for name, needs in NEEDS.items()
    ]


def main() -> None:
    warm_up(LIGHT)
    function = {"forever": forever, "plain": plain}[sys.argv[2]]
    Graph(RunFolder(Path(sys.argv[1])), stages(function), ProgressLines(sys.stdout)).run(slots=2)


if __name__ == "__main__":
    main()
