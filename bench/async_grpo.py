"""GRPO sync, one step off and asynchronous: seconds of a step, on two cores (one for a worker, one to train).

    python bench/async_grpo.py [--rounds 3] [--steps 6] [--max-age 2]

The stage itself runs, through Ray: tiny model, 64 samples of up to 160 tokens a step, a reward that means
nothing (a hash of the answer), so that every group has a signal. Modes take turns, in reversed order every
other round; wall seconds from the stage's clock (workers started before), so run it on a machine that does
nothing else. A step takes at least the longer of sampling and training; sync takes their sum.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import zlib
from pathlib import Path
from typing import Any

MODES = ("sync", "one_step_off", "async")
SHORT = {"steps": 2, "tokens_per_step": 1024, "row_tokens": 256, "num_examples": 64, "warmup": 1}
PLAIN = {
    "task": {
        "domains": {"math": {"kind": "math", "max_tokens": 160, "reward": f"{__file__}:score"}},
        "vocab_size": 672,
    },
    "model": {"preset": "tiny"},
    "engine": {"threads": 1, "device": "cpu", "micro_batch_rows": 16},
    "log": {"wandb": "disabled"},
    "base": SHORT,
    "sft": SHORT,
    "rollout": {"num_workers": 1, "max_batch": 64},
}


def score(completion: Any, *, prompt: str, metadata: Any, sandbox: Any) -> float:
    return float(zlib.crc32(repr(completion.token_ids).encode()) % 2)


def context(plain: dict[str, Any], root: Path, name: str, domain: str | None = None) -> Any:
    from consilience.cli.stage import StageContext
    from consilience.conf.load import from_plain
    from consilience.training.progress import SilentProgress
    from consilience.training.run_folder import RunFolder

    run = RunFolder(root)
    folder = run.stage(name.replace("/", "-")).create()
    return StageContext(name, domain, from_plain(plain), folder, run, {}, SilentProgress())


def measure(root: Path, mode: str, init: str, steps: int, max_age: int) -> dict[str, float]:
    """Seconds a step: all, training, waiting for samples; mean age in versions; tokens a step."""
    from consilience.cli.grpo_stage import run_grpo
    from consilience.training.metrics import read_metrics

    grpo = {"steps": steps, "prompts_per_step": 8, "group_size": 8, "lr": 1e-3, "mode": mode}
    stage = context(
        {**PLAIN, "grpo": {**grpo, "max_age": max_age, "init": init, "row_tokens": 256}},
        root,
        "grpo/math",
        "math",
    )
    result = run_grpo(stage)
    rows, phases = read_metrics(stage.folder.metrics), result["time"]["phases"]
    return {
        "step_s": result["time"]["wall_s"] / steps,
        "train_s": phases["train"] / steps,
        "wait_s": (phases.get("rollout", 0.0) + phases.get("wait", 0.0)) / steps,
        "age": statistics.mean(row["age_mean"] for row in rows),
        "tokens": result["sampled_tokens"] / steps,
    }


def main() -> None:
    from consilience.cli import supervised_stages
    from consilience.cli.ray_session import close_session

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--max-age", type=int, default=2)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = supervised_stages.run_base(context(PLAIN, root, "base"))
        init = str(root / base["checkpoint"])
        try:
            for number in range(given.rounds):
                for mode in MODES[:: -1 if number % 2 else 1]:
                    place = root / f"{number}-{mode}"
                    found[mode].append(measure(place, mode, init, given.steps, given.max_age))
        finally:
            close_session()
    print(
        f"| mode | s a step (min to max of {given.rounds}) | training | waiting | mean age | tokens a step |"
    )
    print("|---|---|---|---|---|---|")
    for mode, rows in found.items():
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        least, most = (pick(row["step_s"] for row in rows) for pick in (min, max))
        print(
            f"| {mode} | {middle['step_s']:.2f} ({least:.2f} to {most:.2f}) | {middle['train_s']:.2f} | "
            f"{middle['wait_s']:.2f} | {middle['age']:.2f} | {middle['tokens']:.0f} |"
        )


if __name__ == "__main__":
    main()
