"""The command line: what is called, what is refused, and with which exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from consilience.cli.main import Command, main, parse
from consilience.cli.stages import load_function
from consilience.cli.verbs import PURPOSE, VERBS
from consilience.conf.errors import ConfigError

ROOT = Path(__file__).parents[2]


def consilience(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "consilience.cli.main", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, **options)


def test_options_may_stand_anywhere():
    expected = Command("grpo", ("specialist=math",), "mine", True)
    assert parse(["--debug", "grpo", "--config-dir", "mine", "specialist=math"]) == expected
    assert parse(["grpo", "specialist=math", "--config-dir=mine", "--debug"]) == expected


def test_nothing_asked_is_help():
    assert parse([]) == Command("help", ())
    assert parse(["grpo", "--help"]) == Command("help", ("grpo",))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpro"], "did you mean 'grpo'"),
        (["run", "--debgu"], "did you mean '--debug'"),
        (["run", "--config-dir"], "needs a folder"),
    ],
)
def test_a_wrong_command_line_is_refused(arguments, said):
    with pytest.raises(ConfigError, match=said):
        parse(arguments)


def test_a_wrong_setting_is_one_line_and_exit_code_2(capsys):
    assert main(["grpo", "grpo.clip_epsilom=0.3"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        captured.err
        == "consilience: unknown setting 'grpo.clip_epsilom'; did you mean 'grpo.clip_epsilon'?\n"
    )


def test_an_error_of_the_run_is_one_line_and_exit_code_1(capsys, tmp_path):
    assert main(["report", f"run.folder={tmp_path}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("consilience: no report at ")
    assert error.count("\n") == 1


def test_debug_shows_where(tmp_path):
    done = consilience("report", f"run.folder={tmp_path}", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def on_a_full_disk(cfg) -> int:
    with open("/dev/full", "w") as file:
        file.write("anything")
    return 0


def test_a_full_disk_is_told_plainly_whoever_met_it(capsys):
    assert main(["doctor"], {"doctor": f"{__name__}:on_a_full_disk"}) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "free space and run again" in error
    assert "--debug" not in error and error.count("\n") == 1


def test_help_lists_every_verb_and_group_and_explains_a_group(capsys):
    assert main(["help"]) == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in PURPOSE)
    assert main(["help", "grpo"]) == 0
    text = capsys.readouterr().out
    assert "grpo.group_size=16" in text
    assert "at least 2" in text
    assert main(["help", "gpro"]) == 2


def test_every_verb_has_a_purpose_and_a_function():
    assert set(VERBS) | {"help"} == set(PURPOSE)
    for path in VERBS.values():
        assert callable(load_function(path)), path


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m consilience.cli.main help grpo | head -n 1"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import sys, time
from pathlib import Path
from consilience.cli.main import main

def slow(cfg):
    Path(sys.argv[1]).touch()
    time.sleep(60)

words = ["run", "run.name=a.b", "run.from=base", "resume=true", "grpo.lr=0.1", "task.seed= 3"]
sys.exit(main(words, {"run": "__main__:slow"}))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_says_in_one_line_how_to_resume(tmp_path, number, code):
    mark = tmp_path / "here"
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(mark)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(number)
        _, error = child.communicate(timeout=30)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == code
    resume = "go on with: consilience run run.name=a.b grpo.lr=0.1 'task.seed= 3'"
    assert error == f"consilience: interrupted; finished stages are kept, {resume}\n"
