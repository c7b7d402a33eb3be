"""A distillation stage of twelve teachers, killed with SIGKILL at its n-th event and run again.

    kill_program.py FOLDER frees|keeps|parts N N N …

The store frees what was used, keeps it, or has room for one of a phase's two mini-batches. Each N is a stage
of its own: killed at event N (0: never), then run to its end. One JSON line for each:
{"events", "parts", "digest", "kl", "scored", "again"}; scored: states computed in all attempts, again: those
of them that were stored when the attempt began.
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "training")]

import torch  # noqa: E402
from small_teachers import Sampler, model, registry_of, run, samples  # noqa: E402

from consilience.distill.train import TeacherSide  # noqa: E402
from consilience.model.checkpoint import to_official  # noqa: E402
from consilience.model.digest import weights_digest  # noqa: E402
from consilience.teachers.heads import HeadCache  # noqa: E402
from consilience.teachers.hidden_store import HiddenStore  # noqa: E402
from consilience.teachers.host_teachers import HostTeachers  # noqa: E402
from consilience.teachers.scheduler import TeacherScheduler  # noqa: E402
from consilience.training.metrics import MemorySink  # noqa: E402
from consilience.training.torch_engine import OptimizerSettings, TorchEngine  # noqa: E402

PART_BYTES = 16 << 10
"""A phase of the run has 26 KiB of states, its mini-batches half of that."""
NAMES = [f"t{i:02d}" for i in range(12)]


class Clock:
    """Counts events; the n-th is the last that this process sees."""

    def __init__(self, last):
        self.count, self.last = 0, last

    def tick(self):
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


class Store(HiddenStore):
    def __init__(self, folder, clock, log, mode):
        super().__init__(folder, keeps=mode == "keeps", budget_bytes=PART_BYTES if mode == "parts" else None)
        self.clock, self.log = clock, log
        known = log.read_text().split() if log.exists() else []
        self.held = {key.split(":")[1] for key in known if key.split(":")[1] in self}

    def put(self, states, origin=""):
        self.clock.tick()
        super().put(states, origin)
        with self.log.open("a") as file:
            file.write("".join(f"{'again' if key in self.held else 'new'}:{key}\n" for key in states))
        self.clock.tick()

    def free_taken(self):
        self.clock.tick()
        return super().free_taken()


class Engine(TorchEngine):
    clock = Clock(0)

    def forward_backward(self, *args):
        self.clock.tick()
        return super().forward_backward(*args)

    def step(self, *args, **how):
        self.clock.tick()
        found = super().step(*args, **how)
        self.clock.tick()
        return found

    def save(self, folder):
        self.clock.tick()
        super().save(folder)
        self.clock.tick()


class Log(MemorySink):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def scalars(self, step, values):
        self.clock.tick()
        super().scalars(step, values)


def attempt(folder, registry, last, mode):
    torch.set_num_threads(1)
    clock = Clock(last)
    store = Store(folder / "states", clock, folder / "scored.txt", mode)
    scheduler = TeacherScheduler(registry, HostTeachers(), store, batch_tokens=40)
    engine = Engine(model(), OptimizerSettings(lr=0.01))
    engine.clock = clock
    _, log, result = run(
        folder,
        TeacherSide(registry, scheduler, store, HeadCache()),
        Sampler(lambda step: samples(step, [*NAMES, *NAMES[step:]])),
        steps=2,
        engine=engine,
        log=Log(clock),
        every_s=0.0,
    )
    scored = (folder / "scored.txt").read_text().split()
    found = {
        "events": clock.count,
        "parts": [row["parts"] for row in log.rows],
        "digest": weights_digest(to_official(engine.model)),
        "kl": result["kl"],
        "loads": result["head_loads"],
        "scored": len(scored),
        "again": sum(line.startswith("again") for line in scored),
    }
    (folder / "result.json").write_text(json.dumps(found))


def in_child(*arguments):
    """The exit status of an attempt in a process of its own; -9 when it was killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            attempt(*arguments)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])  # no limit: the caller has one


def main():
    root, mode, points = Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3:]]
    for point in points:
        folder = root / f"killed-at-{point}-{mode}"
        folder.mkdir(parents=True)
        registry = registry_of(root / "teachers", {name: i + 1 for i, name in enumerate(NAMES)})
        if point:
            assert in_child(folder, registry, point, mode) == -signal.SIGKILL
        assert in_child(folder, registry, 0, mode) == 0
        print((folder / "result.json").read_text(), flush=True)


if __name__ == "__main__":
    main()
