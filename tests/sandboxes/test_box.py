"""What every box keeps, whichever driver made it: outcomes, limits, isolation, files, reset."""

from __future__ import annotations

import time

import pytest

from consilience.sandboxes.box import MODEL_ENV
from consilience.sandboxes.protocol import ExecStatus, Limits

NO_REPLY_S = 2.0


def python(box, code: str, **kwargs):
    """The program by its own interpreter, not by the fork."""
    return box.exec(["python3", "-I", "-c", code], **kwargs)


def test_stdout_stderr_and_exit_code_come_back_apart(box):
    result = box.exec(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.status, result.exit_code) == (ExecStatus.NONZERO, 3)
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert box.exec(["true"]).is_ok


def test_stdin_reaches_the_program_whole_whatever_its_size(box):
    for size in (0, 1, 65536, 65537, 3_000_000):
        assert box.exec(["wc", "-c"], stdin=b"x" * size).stdout.strip() == str(size).encode()


def test_stdin_nobody_reads_does_no_harm(box):
    assert box.exec(["true"], stdin=b"x" * 3_000_000).is_ok
    assert (
        box.exec(["sh", "-c", "exec 0<&-; sleep 0.05; echo done"], stdin=b"x" * 3_000_000).stdout == b"done\n"
    )
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_bytes_that_are_no_text_are_kept(box):
    data = bytes(range(256))
    assert box.exec(["cat"], stdin=data).stdout == data


def test_a_program_killed_by_a_signal_says_which(box):
    assert box.exec(["sh", "-c", "kill -SEGV $$"]).exit_code == -11


def test_what_cannot_start_is_denied_and_never_raises(box):
    missing = box.exec(["no-such-program"])
    assert (missing.status, missing.exit_code) == (ExecStatus.DENIED, 127)
    box.write("data.txt", b"x", mode=0o644)
    assert box.exec(["./data.txt"]).exit_code == 126
    assert box.exec(["true"], cwd="/no/such/folder").status is ExecStatus.DENIED
    assert box.exec(["echo", "a\0b"]).status is ExecStatus.DENIED
    assert box.exec(["echo", "\ud800"]).status is ExecStatus.DENIED
    assert box.exec(["echo", "x" * (3 << 20)]).status is ExecStatus.DENIED
    assert box.run_python("print('\ud800')").status is ExecStatus.DENIED
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_our_own_mistakes_are_value_errors(box):
    with pytest.raises(ValueError, match="argv"):
        box.exec([])
    with pytest.raises(ValueError, match="argv"):
        box.exec([b"true"])
    with pytest.raises(ValueError, match="timeout_s"):
        box.exec(["true"], timeout_s=0)
    with pytest.raises(ValueError, match="timeout_s"):
        box.exec(["true"], timeout_s=float("nan"))


def test_env_is_small_fixed_and_extended_by_the_call(box):
    result = box.exec(["env"], env={"MINE": "1"})
    names = {line.split("=")[0] for line in result.stdout.decode().split()}
    assert "MINE" in names
    assert names <= {"MINE", "PWD", "SHLVL", "_", *MODEL_ENV}
    assert box.exec(["pwd"]).stdout == b"/workspace\n"
    assert box.exec(["pwd"], cwd="/tmp").stdout == b"/tmp\n"


def test_frames_printed_by_a_program_are_plain_data(box):
    forged = b"\x00\x00\x00\x10" + b'{"id":1,"exit":0}' * 100
    assert box.exec(["cat"], stdin=forged).stdout == forged
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_a_command_that_sleeps_too_long_is_killed_in_time(box):
    result = box.exec(["sleep", "100"], timeout_s=0.2)
    assert (result.status, result.exit_code) == (ExecStatus.TIMEOUT, None)
    assert result.wall_s < 1.0


def test_a_program_that_ignores_signals_and_closes_its_streams_is_waited_for_then_killed(box):
    code = (
        "import os, signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\n"
        "os.closerange(0, 3)\ntime.sleep(60)"
    )
    result = box.run_python(code, timeout_s=0.3)
    assert result.status is ExecStatus.TIMEOUT
    assert 0.25 < result.wall_s < 1.5


def test_the_box_limit_caps_a_longer_timeout(open_box):
    result = open_box(Limits(wall_s=0.2)).exec(["sleep", "100"], timeout_s=50)
    assert result.status is ExecStatus.TIMEOUT and result.wall_s < 1.5


def test_cpu_time_is_capped_apart_from_wall_time(open_box):
    result = open_box(Limits(cpu_s=1, wall_s=20)).run_python("while True: pass")
    assert result.status is ExecStatus.TIMEOUT and result.exit_code == -24


def test_a_memory_bomb_ends_and_the_box_lives(box):
    result = box.run_python("x = []\nwhile True: x.append(bytearray(1 << 20))")
    if box.enforced.memory_cap == "cgroup":
        assert result.status is ExecStatus.OOM
    else:
        assert result.status is ExecStatus.NONZERO and b"MemoryError" in result.stderr
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_a_cgroup_caps_what_many_processes_hold_together_and_rlimits_do_not(box):
    code = (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n"
        "        held = b'x' * (36 << 20); time.sleep(0.4); os._exit(0)\n"
        "print(sum(os.wait()[1] == 0 for _ in range(6)))"
    )
    survivors = int(box.run_python(code, timeout_s=8).stdout)
    assert survivors <= 2 if box.enforced.memory_cap == "cgroup" else survivors == 6
    assert box.exec(["echo", "next"]).stdout == b"next\n"


def test_a_fork_bomb_meets_the_process_limit_and_is_swept_away(box):
    bomb = (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError as e: os.write(2, b'%d ' % e.errno)"
    )
    began = time.monotonic()
    result = box.run_python(bomb, timeout_s=0.5)
    assert time.monotonic() - began < 0.5 + NO_REPLY_S
    assert result.status in (ExecStatus.TIMEOUT, ExecStatus.OUTPUT_CAPPED) and b"11" in result.stderr
    count = box.run_python("import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
    assert int(count.stdout) == 2  # the runner and the program that counts


def test_threads_count_as_processes(box):
    code = (
        "import threading, time\nstarted = 0\ntry:\n    for _ in range(1000):\n"
        "        threading.Thread(target=time.sleep, args=(5,), daemon=True).start(); started += 1\n"
        "except RuntimeError: print(started)"
    )
    assert 0 < int(box.run_python(code).stdout) <= 24


def test_an_output_flood_is_counted_exactly_and_kept_at_both_ends(box):
    result = box.run_python("import sys\nfor i in range(200000): print(i)")
    whole = "".join(f"{i}\n" for i in range(200000)).encode()
    assert result.status is ExecStatus.OUTPUT_CAPPED and result.exit_code == 0
    assert result.stdout_bytes == len(whole)
    assert result.stdout == whole[:2048] + whole[-2048:]


def test_an_endless_flood_on_both_streams_stops_at_the_time_limit(box):
    result = box.exec(["sh", "-c", "yes & yes out-of-band >&2"], timeout_s=0.4)
    assert result.status is ExecStatus.OUTPUT_CAPPED and result.exit_code is None
    assert (len(result.stdout), len(result.stderr)) == (4096, 4096)
    assert min(result.stdout_bytes, result.stderr_bytes) > 4096


def test_output_of_exactly_the_cap_is_whole(box):
    for size in (4095, 4096):
        result = box.run_python(f"print('x' * {size}, end='')")
        assert result.is_ok and result.stdout == b"x" * size
    assert box.run_python("print('x' * 4097, end='')").status is ExecStatus.OUTPUT_CAPPED


def test_a_daemon_in_its_own_session_dies_with_its_command(box):
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(100)\n"
        "    os._exit(0)"
    )
    began = time.monotonic()
    assert box.run_python(daemon).is_ok
    assert time.monotonic() - began < NO_REPLY_S
    alive = box.exec(["sh", "-c", "for p in /proc/[0-9]*; do echo $p; done"]).stdout.split()
    assert len(alive) == 2


def test_a_thousand_zombies_are_reaped(box):
    code = (
        "import os\nfor _ in range(1000):\n    try:\n        if os.fork() == 0: os._exit(0)\n"
        "    except OSError: pass"
    )
    assert box.run_python(code).is_ok
    count = box.run_python("import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
    assert int(count.stdout) == 2


def test_a_full_workspace_is_told_and_reset_frees_it(box):
    code = "for i in range(100):\n    with open(f'f{i}', 'wb') as f: f.write(bytes(1 << 20))"
    assert box.run_python(code).status is ExecStatus.DISK
    with pytest.raises(OSError, match="No space"):
        box.write("more", b"x" * 100_000)
    box.reset()
    box.write("more", b"x" * 100_000)


def test_a_file_larger_than_its_cap_is_told(box):
    assert box.exec(["sh", "-c", "head -c 6000000 /dev/zero > big"]).exit_code != 0
    assert int(box.exec(["sh", "-c", "wc -c < big"]).stdout) == 4 << 20


def test_no_core_is_dumped(box):
    assert box.exec(["sh", "-c", "kill -ABRT $$"]).exit_code == -6
    assert box.exec(["sh", "-c", "ls -A"]).stdout == b""
