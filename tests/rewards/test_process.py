"""Hostile and broken reward functions: every fault is one typed verdict, and the batch goes on."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from consilience.conf.errors import RewardError
from consilience.rewards.interface import Completion
from consilience.rewards.process import RewardProcess, ScoreItem
from consilience.rollout.records import OutcomeKind
from consilience.sandboxes.protocol import Isolation, SandboxSpec

REWARDS = """
import asyncio, math, os, sys, time
import numpy

def score(completion, *, prompt, metadata, sandbox):
    act = completion.text
    if act == "hang":
        while True: pass
    if act == "sleep": time.sleep(1000)
    if act == "exit": sys.exit(0)
    if act == "hard exit": os._exit(0)
    if act == "segfault": os.kill(os.getpid(), 11)
    if act == "raise": raise ValueError("no luck")
    if act == "interrupt": raise KeyboardInterrupt
    if act == "nan": return math.nan
    if act == "inf part": return {"reward": 1.0, "length": math.inf}
    if act == "sum overflow": return {"a": 1e308, "b": 1e308}
    if act == "huge int": return 10 ** 400
    if act == "text": return "1.0"
    if act == "none": return None
    if act == "empty": return {}
    if act == "many": return {str(i): 1.0 for i in range(100_000)}
    if act == "long name": return {"x" * 10_000_000: 1.0}
    if act == "nested": return {"reward": {"a": 1.0}}
    if act == "print":
        print("x" * 10_000_000); sys.stderr.write("y" * 10_000_000)
        os.write(1, b"z" * 1_000_000); return 0.25
    if act == "lost":
        from consilience.conf.errors import SandboxLost
        raise SandboxLost("the box is gone")
    if act == "tamper":
        from consilience.rewards.interface import Tamper
        raise Tamper("it patched the judge")
    if act == "pid": return {"reward": 0.0, "pid": os.getpid()}
    if act == "orphan":
        if os.fork() == 0: time.sleep(1000)
        while True: pass
    if act == "numpy": return numpy.float32(0.5)
    if act == "bool": return True
    if act == "echo": return {"a": float(len(prompt)), "b": metadata["x"], "c": len(completion.token_ids)}
    return len(act)

async def later(completion, *, prompt, metadata, sandbox):
    await asyncio.sleep(0.001)
    if completion.text == "hang": await asyncio.sleep(1000)
    return 0.5
"""


def item(text, **metadata):
    return ScoreItem(Completion(text, "", (1, 2, 3), (), "stop"), "prompt", metadata)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    file = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    file.write_text(REWARDS)
    return str(file)


@pytest.fixture(scope="module")
def process(rewards):
    with RewardProcess(f"{rewards}:score", timeout_s=0.5) as process:
        yield process


def test_a_number_is_the_reward_and_a_dict_without_reward_is_summed(process):
    first, second = process.score([item("four"), item("echo", x=2.5)])
    assert (first.reward, first.parts) == (4.0, {"reward": 4.0})
    assert (second.reward, second.parts) == (11.5, {"a": 6.0, "b": 2.5, "c": 3.0})
    assert first.outcome.kind is second.outcome.kind is OutcomeKind.GRADED
    assert (first.isolation, first.sandbox_ids) == ("none", ())


@pytest.mark.parametrize(("act", "reward"), [("numpy", 0.5), ("bool", 1.0), ("print", 0.25)])
def test_other_numbers_count_and_prints_are_harmless(process, act, reward):
    assert process.score([item(act)])[0].reward == reward


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("raise", "ValueError: no luck (my_rewards.py, line 13)"),
        ("exit", "SystemExit"),
        ("interrupt", "KeyboardInterrupt"),
        ("nan", "'reward' is nan"),
        ("inf part", "'length' is inf"),
        ("sum overflow", "sum of the reward parts is inf"),
        ("huge int", "is inf"),
        ("text", "returned a str"),
        ("none", "returned a NoneType"),
        ("empty", "returned 0 parts"),
        ("many", "100000 parts"),
        ("long name", "at most 64 characters"),
        ("nested", "'reward' is a dict"),
    ],
)
def test_a_fault_is_a_typed_failure_and_the_process_lives_on(process, act, words):
    before = process.num_restarts
    verdict, after = process.score([item(act), item("four")])
    assert verdict.outcome.kind is OutcomeKind.FAILED
    assert verdict.reward is None
    assert words in verdict.outcome.detail
    assert len(verdict.outcome.detail) <= 500
    assert after.reward == 4.0
    assert process.num_restarts == before


def test_a_lost_sandbox_is_infrastructure_and_no_failure_of_the_function(process):
    verdict, after = process.score([item("lost"), item("four")])
    assert (verdict.reward, verdict.outcome.kind) == (None, OutcomeKind.INFRA)
    assert "the box is gone" in verdict.outcome.detail
    assert after.reward == 4.0


def test_tampering_is_an_outcome_of_its_own_and_earns_nothing(process):
    verdict, after = process.score([item("tamper"), item("four")])
    assert (verdict.reward, verdict.outcome.kind) == (0.0, OutcomeKind.TAMPER)
    assert verdict.outcome.is_scored and "it patched the judge" in verdict.outcome.detail
    assert after.reward == 4.0


ENDS_ITS_BOX = """
import os, pathlib
from consilience.conf.errors import SandboxLost

def score(completion, *, prompt, metadata, sandbox):
    places = pathlib.Path(metadata["log"])
    with places.open("a") as log: log.write(sandbox.id + "\\n")
    is_first = len(places.read_text().splitlines()) == 1
    if completion.text == "always" or (completion.text == "once" and is_first):
        sandbox._box.destroy()  # as a program does that makes the kernel kill the runner
    return float(sandbox.run_python("print(2)").stdout == b"2\\n")
"""


def test_a_candidate_that_ends_two_boxes_is_told_from_a_box_that_was_lost_once(tmp_path):
    (tmp_path / "ends.py").write_text(ENDS_ITS_BOX)
    spec = SandboxSpec("insecure_subprocess", Isolation.NONE, allow_insecure=True)
    with RewardProcess(f"{tmp_path}/ends.py:score", sandbox=spec) as process:
        logs = [str(tmp_path / name) for name in ("a", "b", "c")]
        texts = ("once", "always", "never")
        once, always, never = process.score([item(t, log=log) for t, log in zip(texts, logs)])
    assert (once.reward, once.outcome.kind) == (1.0, OutcomeKind.GRADED)
    assert (always.reward, always.outcome.kind) == (0.0, OutcomeKind.TAMPER)
    assert "ended two boxes" in always.outcome.detail
    assert (never.reward, never.outcome.kind) == (1.0, OutcomeKind.GRADED)
    assert [len(set(Path(log).read_text().split())) for log in logs] == [2, 2, 1]


@pytest.mark.parametrize(
    ("act", "words"),
    [("hang", "took over 0.5 s"), ("hard exit", "exit code 0"), ("segfault", "signal SIGSEGV")],
)
def test_a_hang_or_a_crash_costs_one_item_and_one_process(process, act, words):
    before = process.num_restarts
    began = time.monotonic()
    verdicts = process.score([item("a"), item(act), item("bb"), item("ccc")])
    assert time.monotonic() - began < 10
    assert [v.reward for v in verdicts] == [1.0, None, 2.0, 3.0]
    assert verdicts[1].outcome.kind is OutcomeKind.FAILED
    assert words in verdicts[1].outcome.detail
    assert process.num_restarts == before + 1


def test_descendants_of_a_hung_call_die_with_it(process):
    pid = int(process.score([item("pid")])[0].parts["pid"])
    assert process.score([item("orphan")])[0].outcome.kind is OutcomeKind.FAILED
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError("a process of the killed group is still there")


def test_a_coroutine_function_is_awaited_and_limited_too(rewards):
    with RewardProcess(f"{rewards}:later", timeout_s=0.5) as process:
        verdicts = process.score([item("a"), item("hang"), item("b")])
    assert [v.reward for v in verdicts] == [0.5, None, 0.5]
    assert "took over" in verdicts[1].outcome.detail


def test_a_child_that_was_killed_while_idle_costs_no_sample(rewards):
    with RewardProcess(f"{rewards}:score") as process:
        pid = int(process.score([item("pid")])[0].parts["pid"])
        os.kill(pid, 9)
        time.sleep(0.2)
        assert process.score([item("four")])[0].reward == 4.0
        assert process.num_restarts == 1


def test_batches_larger_than_a_chunk_keep_their_order_and_cost_little(process):
    process.score([item("warm")])
    items = [item("x" * (i % 7)) for i in range(1000)]
    began = time.perf_counter()
    verdicts = process.score(items)
    took = time.perf_counter() - began
    assert [v.reward for v in verdicts] == [float(i % 7) for i in range(1000)]
    # 0.1 ms an item on an idle core; ten times that leaves room for a loaded machine.
    assert took < 1.0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("def other(a): pass", "no function 'score'; valid: other"),
        ("def score(completion): return 1.0", "must be callable as score"),
        ("def score(:", "line 1"),
        ("import os\nos._exit(3)", "exit code 3"),
        ("raise RuntimeError('not today')", "RuntimeError: not today"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_one_error(tmp_path, content, words):
    file = tmp_path / "broken.py"
    file.write_text(content)
    with RewardProcess(f"{file}:score") as process, pytest.raises(RewardError, match=words):
        process.score([item("x")])


def test_an_import_that_hangs_is_one_error(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text("while True: pass")
    with (
        RewardProcess(f"{file}:score", load_timeout_s=1.0) as process,
        pytest.raises(RewardError, match="took over 1 s to load"),
    ):
        process.start()


def test_a_process_that_is_stopped_in_the_middle_of_a_call_is_ended_and_the_next_goes_on(process):
    (verdict,) = process.score([item("pid")])
    os.kill(int(verdict.parts["pid"]), signal.SIGSTOP)
    began = time.monotonic()
    verdicts = process.score([item("abc"), item("abcd")])
    assert [v.outcome.kind for v in verdicts] == [OutcomeKind.FAILED, OutcomeKind.GRADED]
    assert "was killed" in verdicts[0].outcome.detail and verdicts[1].reward == 4.0
    assert time.monotonic() - began < 60


def test_closing_ends_a_call_that_hangs_and_answers_for_those_behind_it(rewards):
    path, verdicts = f"{rewards}:score", []
    with RewardProcess(path, timeout_s=600.0) as process:
        process.start()
        items = [item("abc"), item("hang"), item("abcd")]
        caller = threading.Thread(target=lambda: verdicts.extend(process.score(items)), daemon=True)
        caller.start()
        time.sleep(1.0)
        process.close()
        caller.join(timeout=60)
    assert [v.outcome.kind for v in verdicts] == [
        OutcomeKind.GRADED,
        OutcomeKind.FAILED,
        OutcomeKind.INFRA,
    ]
    assert "closed" in verdicts[2].outcome.detail
