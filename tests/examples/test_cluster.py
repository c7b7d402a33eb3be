"""The examples for `ray up` and Slurm: Ray takes one, a shell the other, and their commands exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from consilience.cli.main import parse
from consilience.conf.load import compose

FOLDER = Path(__file__).parents[2] / "examples" / "cluster"
SHIM = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
"""
SRUN = SHIM + 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'


def whole_lines(path):
    """The file's lines, continued ones joined, comments without their mark."""
    text = re.sub(r"\\\n#?\s*", " ", path.read_text())
    return [line.removeprefix("#").strip() for line in text.splitlines()]


def commands(path, program):
    """What the file calls `program` with: words each."""
    text = [os.path.expandvars(line) for line in whole_lines(path)]
    found = [re.search(rf"(?:^|\s|;){program} (.*)", line) for line in text]
    return [shlex.split(each[1].removesuffix("&").partition(">")[0]) for each in found if each]


@pytest.mark.parametrize("name", ["ray-up.yaml", "slurm.sh"])
def test_every_command_of_an_example_is_one_that_the_program_takes(name, monkeypatch):
    for variable, value in {"RUNS": "/shared/runs", "PORT": "20001", "ADDRESS": "10.0.0.1"}.items():
        monkeypatch.setenv(variable, value)
    (words,) = [words for words in commands(FOLDER / name, "consilience") if "cluster=join" in words]
    words = [word.replace("${RUN:-$SLURM_JOB_NAME}", "example") for word in words]
    command = parse(words)
    cfg = compose(command.overrides, command.config_dir)
    assert command.verb == "run" and cfg.cluster.placement == "apart" and cfg.cluster.worker_gpus == 1


@pytest.mark.parametrize(("name", "num"), [("ray-up.yaml", 2), ("slurm.sh", 2)])
def test_ray_start_knows_the_options_of_an_example(name, num):
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    joined = FOLDER / name
    starts = [words for words in commands(joined, "ray") if words[0] == "start"]
    assert len(starts) == num
    for words in starts:
        options = {word.partition("=")[0] for word in words[1:] if word.startswith("--")}
        assert options and options <= known


def test_ray_up_takes_its_example():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((FOLDER / "ray-up.yaml").read_text()))
    validate_config(config)
    assert config["provider"]["type"] == "local" and config["max_workers"] == 2


@pytest.mark.parametrize("status", [0, 3])
def test_the_slurm_example_starts_a_cluster_runs_and_ends_as_its_run_does(status, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    shims = {"srun": SRUN, "ray": SHIM, "consilience": f"{SHIM}exit {status}\n"}
    shims |= {"scontrol": "#!/bin/bash\nprintf 'node1\\nnode2\\n'\n"}
    shims |= {"hostname": "#!/bin/bash\necho 10.0.0.1 fe80::1\n"}
    for name, text in shims.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}
    env |= {"SLURM_JOB_ID": "77", "SLURM_NNODES": "3", "SLURM_JOB_NODELIST": "node[1-3]"}
    env |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NAME": "consilience"}
    done = subprocess.run(
        ["bash", FOLDER / "slurm.sh"], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    started = [call for call in calls if call.startswith("ray start")]
    assert sorted("--head" in call for call in started) == [False, True]
    assert "--address=10.0.0.1:20077" in next(call for call in started if "--head" not in call)
    assert any(call.startswith("consilience run cluster=join") for call in calls)
    assert not list((tmp_path / "runs").glob(".ray-token*")), "the token goes with the job"
