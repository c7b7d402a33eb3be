import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from consilience.rollout.deadlines import (
    REDISPATCHED,
    STALLS,
    Stall,
    StallLog,
    dump_stacks,
    num_stalls,
    open_stacks,
    read_stalls,
    stalls_of,
)


def stall(*uids, **facts):
    return Stall("tool", 12.5, 10.0, "rollout worker 1", uids, REDISPATCHED, "far", 77, time=3.0, **facts)


def test_a_stall_names_sample_actor_host_process_and_what_was_done(tmp_path):
    log = StallLog(tmp_path / "run" / STALLS)
    log.add(stall("grpo/3/1/0"))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / STALLS).read_text().splitlines()]
    assert row == {
        "stage": "tool", "waited_s": 12.5, "limit_s": 10.0, "actor": "rollout worker 1",
        "uids": ["grpo/3/1/0"], "action": "redispatched", "host": "far", "pid": 77, "stacks": "", "time": 3.0,
    }  # fmt: skip
    assert read_stalls(tmp_path / "run" / STALLS) == log.stalls == [stall("grpo/3/1/0")]
    assert str(log.stalls[0]) == (
        "rollout worker 1 (process 77 on far) was silent in 'tool' for 12.5 s, allowed are 10 s, 1 samples, "
        "grpo/3/1/0 the first: redispatched"
    )


def test_several_writers_share_a_file_and_a_torn_line_costs_itself_only(tmp_path):
    path = tmp_path / STALLS
    for uid in "abc":
        StallLog(path).add(stall(uid))
    path.write_bytes(path.read_bytes()[:-20])
    assert [s.uids for s in read_stalls(path)] == [("a",), ("b",)]
    assert read_stalls(tmp_path / "none") == []


def test_a_disk_that_takes_no_line_does_not_end_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    log = StallLog(tmp_path / "file" / STALLS)
    log.add(stall("a"))
    assert len(log.stalls) == 1


def test_the_stalls_of_a_phase_are_those_its_samples_were_in_and_one_wait_counts_once():
    mine, other = stall("a", "b"), stall("z")
    assert stalls_of([mine, other], ["b", "c"]) == [mine]
    again = Stall("tool", 1, 1, "", ("c",), host="far", pid=77, time=3.0)
    assert num_stalls([mine, again]) == 1 and num_stalls([mine, Stall("grade", 1, 1, "", ("c",))]) == 2


def test_stacks_tell_where_every_thread_is(tmp_path):
    release = threading.Event()

    def waits_in_a_function_of_this_name():
        release.wait(20)

    thread = threading.Thread(target=waits_in_a_function_of_this_name)
    thread.start()
    try:
        with open_stacks(tmp_path / "stacks", "driver") as file:
            assert dump_stacks(file) == file.name
        text = next((tmp_path / "stacks").iterdir()).read_text()
    finally:
        release.set()
        thread.join(20)
    assert "waits_in_a_function_of_this_name" in text and "test_stacks_tell" in text


PROGRAM = """
import sys, time
from pathlib import Path

import pytest
from consilience.rollout.deadlines import StallLog, Watch

def trains(seconds):
    time.sleep(seconds)

watch = Watch("stage grpo/math", 0.5, StallLog(Path(sys.argv[1])), grace_s=1.0, look_s=0.02)
for _ in range(3):
    watch.begin("publish")
    time.sleep(0.02)
    watch.end()
time.sleep(0.7)  # nothing is at work now, which may take as long as it likes
print("fine so far", flush=True)
watch.begin("train")
try:
    trains(600)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    if sys.argv[2] == "ends":
        watch.close()
        sys.exit(7)
    trains(600)
"""


@pytest.mark.parametrize("way, code", [("ends", 7), ("hangs", -signal.SIGKILL)])
def test_a_watch_ends_a_process_whose_work_takes_too_long_and_says_where_it_was(tmp_path, way, code):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / STALLS), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, "fine so far\ninterrupted\n"), done.stderr
    (found,) = read_stalls(tmp_path / STALLS)
    assert (found.stage, found.actor, found.action) == ("train", "stage grpo/math", "ended")
    assert 0.5 < found.waited_s < 60 and "in trains" in Path(found.stacks).read_text()
