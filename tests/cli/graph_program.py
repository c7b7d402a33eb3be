"""A child process that runs a graph of plain stages, for tests that kill it.

`python graph_program.py FOLDER STOP_AT HOW`: in stage STOP_AT it writes a checkpoint, creates
`FOLDER/here` and then sleeps (HOW=sleep), raises (raise) or stops at nothing (none).
"""

import sys
import time
from pathlib import Path

from consilience.cli.graph import Graph
from consilience.cli.progress_display import ProgressLines
from consilience.cli.stage import Stage, StageContext
from consilience.conf.errors import EngineError
from consilience.conf.schema import Config
from consilience.training.run_folder import RunFolder

NAMES = ("base", "sft/math", "sft/code", "distill")
NEEDS = {"base": (), "sft/math": ("base",), "sft/code": ("base",), "distill": ("sft/math", "sft/code")}


def stages(stop_at: str = "", how: str = "none", settings: dict[str, str] | None = None) -> list[Stage]:
    def work(context: StageContext) -> dict[str, object]:
        log = context.run.path / "executed.txt"
        log.write_text(f"{log.read_text() if log.exists() else ''}{context.name}\n")
        checkpoint = context.folder.path / "checkpoint"
        found = checkpoint.read_text() if checkpoint.exists() else "fresh"
        checkpoint.write_text("half way")
        if context.name == stop_at and how != "none":
            (context.run.path / "here").touch()
            if how == "raise":
                raise EngineError("loss is not finite")
            time.sleep(60)
        return {"found": found, "inputs": sorted(context.inputs)}

    given = settings or {}
    return [Stage(n, NEEDS[n], work, Config(), settings=given.get(n, "")) for n in NAMES]


def main() -> None:
    folder, stop_at, how = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    Graph(RunFolder(folder), stages(stop_at, how), ProgressLines(sys.stdout)).run()


if __name__ == "__main__":
    main()
