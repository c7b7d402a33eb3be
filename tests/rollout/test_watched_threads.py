import subprocess
import sys
import threading
import time

from consilience.rollout.watched_threads import Task, WatchedThreads


def eventually(condition, limit_s=20.0):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_work_is_done_in_order_by_at_most_so_many_threads_and_all_of_it_before_the_end():
    threads, seen, most = WatchedThreads(2, "t"), [], []
    lock = threading.Lock()

    def work(i):
        with lock:
            most.append(len(most))
        time.sleep(0.01)
        seen.append(i)

    for i in range(8):
        threads.submit(Task(lambda i=i: work(i), "x", 10.0))
    assert threads.close(20.0) == 0
    assert sorted(seen) == list(range(8)) and threads.overdue() == []


def test_a_thread_that_is_late_is_given_up_once_and_its_place_is_taken():
    threads, release, done = WatchedThreads(1, "t"), threading.Event(), []
    stuck = Task(lambda: release.wait(30), "tool", 0.1, ("a",))
    threads.submit(stuck)
    threads.submit(Task(lambda: done.append(1), "tool", 10.0))
    time.sleep(0.05)
    assert threads.overdue() == [] and done == []
    eventually(lambda: stuck.waited_s > 0.1)
    assert threads.overdue() == [stuck] and stuck.is_given_up and threads.overdue() == []
    eventually(lambda: done == [1])  # what was queued behind it goes on while it still hangs
    assert not release.is_set() and threads.close(5.0) == 0
    release.set()


def test_a_limit_begins_when_a_thread_takes_the_task():
    threads, first = WatchedThreads(1, "t"), threading.Event()
    threads.submit(Task(lambda: first.wait(30), "x", 30.0))
    waiting = Task(lambda: None, "x", 0.01)
    threads.submit(waiting)
    time.sleep(0.1)
    assert threads.overdue() == [] and waiting.began is None
    first.set()
    threads.close(20.0)


def test_what_a_task_raises_ends_neither_its_thread_nor_the_pool():
    threads, done = WatchedThreads(1, "t"), []
    threads.submit(Task(lambda: 1 / 0, "release", 10.0))
    threads.submit(Task(lambda: done.append(1), "release", 10.0))
    assert threads.close(20.0) == 0 and done == [1]


def test_a_thread_that_never_comes_back_keeps_no_process_from_ending():
    program = (
        "import threading\n"
        "from consilience.rollout.watched_threads import Task, WatchedThreads\n"
        "threads = WatchedThreads(1, 't')\n"
        "threads.submit(Task(threading.Event().wait, 'tool', 60.0))\n"
        "print(threads.close(0.2))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("1\n", 0), done.stderr
