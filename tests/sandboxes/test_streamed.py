"""Programs that are talked to while they run: order, back-pressure, commands beside them, their end."""

from __future__ import annotations

import time

import pytest

from consilience.sandboxes.protocol import ExecStatus
from consilience.sandboxes.streamed import WINDOW_BYTES


def test_a_program_is_talked_to_line_by_line_with_commands_beside_it(box):
    code = "import sys\nfor line in sys.stdin: print(line.strip().upper(), flush=True)\n"
    code += "print('bye', file=sys.stderr)"
    process = box.spawn(["python3", "-I", "-c", code])
    for number in range(3):
        process.write(b"line %d\n" % number)
        assert process.read(timeout_s=10) == b"LINE %d\n" % number
        assert box.exec(["echo", "beside"]).stdout == b"beside\n"
        assert box.run_python("print(1)").stdout == b"1\n"
    process.close_stdin()
    ended = process.wait(10)
    assert (ended.status, ended.exit_code, ended.stdout_bytes) == (ExecStatus.OK, 0, 21)
    assert process.read(is_stderr=True, timeout_s=5) == b"bye\n"
    assert process.read(timeout_s=5) == b"" == process.read(is_stderr=True, timeout_s=5)
    with pytest.raises(BrokenPipeError):
        process.write(b"late")


def test_a_program_nobody_reads_stands_still_and_goes_on_when_it_is_read(box):
    code = (
        "import os, sys\nfor i in range(64):\n    os.write(1, b'x' * 65536)\n"
        "    open('/workspace/count', 'w').write(str(i + 1))"
    )
    process = box.spawn(["python3", "-I", "-c", code])
    time.sleep(1.0)
    stood_at = int(box.read("count"))
    assert stood_at * 65536 <= WINDOW_BYTES + 4 * 65536  # what the window and the pipe hold
    total = 0
    while chunk := process.read(timeout_s=10):
        total += len(chunk)
    assert total == 64 * 65536 and process.wait(10).is_ok


def test_input_is_taken_at_the_speed_of_the_program(box):
    process = box.spawn(["sh", "-c", "sleep 0.3; wc -c"], stdin=b"a" * 100_000)
    process.write(b"b" * 3_000_000)
    process.close_stdin()
    assert process.read(timeout_s=10).strip() == b"3100000"
    assert process.wait(10).is_ok


def test_a_program_that_closes_its_input_and_one_that_is_refused_are_outcomes(box):
    process = box.spawn(["sh", "-c", "exec 0<&-; sleep 0.2; echo out"], stdin=b"x" * 1_000_000)
    assert process.read(timeout_s=10) == b"out\n" and process.wait(10).is_ok
    missing = box.spawn(["no-such-program"]).wait(10)
    assert (missing.status, missing.exit_code) == (ExecStatus.DENIED, 127)
    assert box.spawn(["echo", "a\0b"]).wait(10).status is ExecStatus.DENIED
    with pytest.raises(ValueError, match="argv"):
        box.spawn([])


def test_a_killed_program_takes_all_it_started_with_it(box):
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(100)\n"
    code += "print('up', flush=True)\ntime.sleep(100)"
    process = box.spawn(["python3", "-I", "-c", code], timeout_s=60)
    assert process.read(timeout_s=10) == b"up\n"
    process.kill(15)
    ended = process.wait(10)
    assert (ended.status, ended.exit_code) == (ExecStatus.NONZERO, -15)
    count = box.run_python("import os; print(sum(n.isdigit() for n in os.listdir('/proc')))")
    assert int(count.stdout) == 2
    other = box.spawn(["sleep", "100"])
    other.kill()
    assert other.wait(10).exit_code == -9


def test_its_time_limit_is_its_own(box):
    process = box.spawn(["sleep", "100"], timeout_s=0.3)
    with pytest.raises(TimeoutError):
        process.wait(0.05)
    ended = process.wait(10)
    assert (ended.status, ended.exit_code) == (ExecStatus.TIMEOUT, None) and ended.wall_s < 2


def test_reset_ends_streamed_programs_and_frees_their_places(box):
    processes = [box.spawn(["sleep", "100"]) for _ in range(16)]
    refused = box.spawn(["sleep", "100"]).wait(10)
    assert refused.status is ExecStatus.DENIED and b"kept already" in refused.stderr
    box.reset()
    assert all(process.wait(10).exit_code in (-9, None) for process in processes)
    assert box.spawn(["true"]).wait(10).is_ok


def test_a_large_part_of_output_is_read_in_the_pieces_asked_for(box):
    process = box.spawn(["printf", "abcdefgh"])
    assert process.wait(10).is_ok
    assert [process.read(3, timeout_s=5) for _ in range(4)] == [b"abc", b"def", b"gh", b""]
