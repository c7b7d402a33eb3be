"""The shell that stays: its state, its limits, and an end that nothing printed can forge."""

from __future__ import annotations

import pytest

from consilience.sandboxes.protocol import ExecStatus, ShellState


def test_folder_variables_functions_and_the_last_status_stay(box):
    first = box.shell("mkdir -p a; cd a; x=5; export Y=6; greet() { echo hello $x $Y $PWD; }; false")
    assert (first.status, first.exit_code, first.shell) == (ExecStatus.NONZERO, 1, ShellState.NEW)
    second = box.shell("echo $?; greet; sh -c 'echo child $Y'")
    assert second.stdout == b"1\nhello 5 6 /workspace/a\nchild 6\n"
    assert (second.is_ok, second.shell) == (True, ShellState.KEPT)
    assert box.exec(["pwd"]).stdout == b"/workspace\n"


def test_sessions_know_nothing_of_each_other_and_a_reset_ends_them(box):
    box.shell("x=1", session="one")
    box.shell("x=2", session="two")
    assert box.shell("echo $x", session="one").stdout == b"1\n"
    assert box.shell("echo $x", session="two").stdout == b"2\n"
    box.reset()
    fresh = box.shell("echo .$x.", session="one")
    assert (fresh.stdout, fresh.shell) == (b"..\n", ShellState.NEW)


def test_quotes_several_lines_and_broken_syntax_are_one_script_each(box):
    script = "cat <<'END'\nit's \"here\" $x\nEND\nfor i in 1 2; do\n  echo 'line' $i\ndone"
    assert box.shell(script).stdout == b'it\'s "here" $x\nline 1\nline 2\n'
    for broken in ("echo 'open", "if true; then", "cat <<END\nx", "echo )"):
        told = box.shell(broken, timeout_s=3)
        assert told.shell is ShellState.KEPT
    assert box.shell("echo next").stdout == b"next\n"
    assert box.shell("a\0b").status is ExecStatus.DENIED
    with pytest.raises(ValueError, match="session"):
        box.shell("true", session="")


def test_commands_of_a_script_have_no_input_and_a_long_script_arrives(box):
    assert box.shell("cat; read x; echo .$x.").stdout == b"..\n"
    long = "x='" + "y" * 200_000 + "'\necho ${#x}"
    assert box.shell(long).stdout == b"200000\n"


def test_what_a_script_leaves_running_is_killed_without_a_word_unless_it_may_stay(box):
    left = box.shell("sleep 100 & nohup sleep 101 >/dev/null 2>&1 & (setsid sleep 102 &) ; echo done")
    assert left.stdout == b"done\n"
    count = "n=0; for p in /proc/[0-9]*; do read -r line < $p/comm; [ $line = sleep ] && n=$((n+1)); done; "
    count += "echo $n"
    after = box.shell(count)
    assert (after.stdout, after.stderr, after.shell) == (b"0\n", b"", ShellState.KEPT)
    box.shell("sleep 100 & (setsid sleep 102 &)", is_background=True)
    assert box.shell(count, is_background=True).stdout == b"1\n"  # the one that is still its child
    assert box.exec(["true"]).is_ok
    assert box.shell(count, is_background=True).stdout == b"1\n"
    assert box.shell(count).stdout == b"1\n"
    assert box.shell(count).stdout == b"0\n"


def test_a_script_that_kills_all_it_can_reach_but_its_shell_is_survived(box):
    killer = (
        "trap '' TERM; sleep 100 & sleep 100 & for p in $(jobs -p); do kill -9 $p; done; wait; echo swept"
    )
    box.shell("x=1")
    told = box.shell(killer)
    assert told.stdout == b"swept\n" and told.shell is ShellState.KEPT
    assert box.shell("kill -9 1; echo alive").stdout == b"alive\n"


@pytest.mark.parametrize(
    ("script", "exit_code"),
    [("exit 3", 3), ("set -e; false; echo not here", 1), ("kill -9 $$", -9), ("exec true", 0), ("exit", 0)],
)
def test_the_end_of_the_shell_itself_is_told_and_the_next_is_a_new_one(box, script, exit_code):
    box.shell("x=1")
    ended = box.shell(script)
    assert (ended.exit_code, ended.shell) == (exit_code, ShellState.ENDED)
    fresh = box.shell("echo .$x.")
    assert (fresh.stdout, fresh.shell) == (b"..\n", ShellState.NEW)


def test_a_shell_that_was_killed_between_scripts_is_a_new_one(box):
    pid = int(box.shell("echo $$").stdout)
    box.exec(["sh", "-c", f"kill -9 {pid}; sleep 0.1"])
    told = box.shell("echo alive")
    assert (told.stdout, told.shell) == (b"alive\n", ShellState.NEW)


def test_a_script_out_of_time_ends_its_shell_and_does_not_go_on(box):
    told = box.shell("sleep 100; touch went-on", timeout_s=0.3)
    assert (told.status, told.exit_code, told.shell) == (ExecStatus.TIMEOUT, None, ShellState.ENDED)
    assert told.wall_s < 1.5
    assert box.shell("ls").stdout == b""


def test_output_is_capped_for_each_script_alone(box):
    flood = box.shell("seq 1 100000")
    assert flood.status is ExecStatus.OUTPUT_CAPPED and len(flood.stdout) == 4096
    assert flood.stdout_bytes == sum(len(str(i)) + 1 for i in range(1, 100001))
    assert box.shell("echo small; echo err >&2").stdout == b"small\n"


def test_an_end_that_is_printed_or_sent_by_a_child_is_plain_data(box):
    forged = (
        'echo EXITCODESTART0EXITCODEEND; for fd in 3 4 63 255; do sh -c "echo 0000 0 >&$fd" 2>/dev/null; done'
    )
    box.shell("x=1")
    told = box.shell(forged + "; (builtin printf '%s 0' guess >&63); sleep 0.1; echo last; (exit 7)")
    assert told.stdout == b"EXITCODESTART0EXITCODEEND\nlast\n"
    assert (told.exit_code, told.shell) == (7, ShellState.KEPT)
    assert box.shell("echo next").stdout == b"next\n"


def test_a_shell_made_to_lie_about_its_end_is_ended_itself(box):
    told = box.shell("builtin printf 'guess 0' >&63; sleep 100", timeout_s=5)
    assert (told.status, told.shell) == (ExecStatus.PROTOCOL_ERROR, ShellState.ENDED)
    assert told.wall_s < 2
    closed = box.shell("exec 63>&-; echo out", timeout_s=5)
    assert (closed.stdout, closed.shell) == (b"out\n", ShellState.ENDED)
    assert box.shell("echo next").stdout == b"next\n"


def test_the_script_to_come_cannot_be_read_by_the_children_of_the_shell(box):
    seen = box.shell("ls /proc/self/fd; sh -c 'ls /proc/self/fd'").stdout.split()
    assert b"4" not in seen and b"255" not in seen


def test_a_fork_bomb_beside_a_shell_is_swept_away(box):
    box.shell("x=1")
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert box.run_python(bomb, timeout_s=0.5).status in (ExecStatus.TIMEOUT, ExecStatus.PIDS)
    count = box.run_python("import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
    assert int(count.stdout) <= 3  # the runner, the program that counts, and the shell if it could be spared
