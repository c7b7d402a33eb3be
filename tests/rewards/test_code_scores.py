"""Hostile candidates: none of them gets a reward, none of them harms the next."""

import json

import pytest

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.code_scores import (
    NOTHING,
    candidate_source,
    read_value,
    run_candidate,
    score,
    shuffled,
)
from consilience.rewards.interface import Completion
from consilience.rewards.judge_box import JudgeBox
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation, SandboxSpec
from consilience.tasks.registry import load_domain

# The weakest driver runs everywhere; what is judged here does not rest on isolation.
SPEC = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)


@pytest.fixture(scope="module")
def box():
    box = JudgeBox(lambda: open_blocking(SPEC))
    yield box
    box.close()


@pytest.fixture(scope="module")
def problems():
    return load_domain("code").problems("test", 20)


def marks(text, problem, sandbox):
    return score(Completion(text, "", (), (), "stop"), prompt="", metadata=problem.metadata, sandbox=sandbox)


def test_every_demo_passes_and_every_other_program_fails(box, problems):
    for problem, other in zip(problems, [*problems[1:], problems[0]]):
        assert marks(problem.demo[0]["content"], problem, box) == {
            "reward": 1.0,
            "correct": 1.0,
            "passed": 1.0,
        }
        assert marks(other.demo[0]["content"], problem, box)["reward"] == 0.0
    assert not box.is_soiled


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        "def f(x): return",
        "def f(x):\n return (",
        "def g(x):\n return x",
        "def f(x, y):\n return x",
        "def f(x):\n return None",
        "def f(x):\n return [x]",
        "def f(x):\n return x * 10**9",
        "def f(x):\n return x[99]",
        "def f(x):\n return f(x)",
        "def f(x):\n return '\\ud800'",
        "def f(x):\n raise SystemExit(0)",
        "import sys\ndef f(x): pass\nsys.exit(0)",
        "import os\ndef f(x): pass\nos._exit(0)",
        "import os\ndef f(x): os.kill(os.getpid(), 9)",
        "def f(x):\n class S(str):\n  __eq__ = lambda s, o: True\n return S('no')",
        "def f(x): pass\nprint('\"a\"')",
        "import builtins\nbuiltins.type = lambda *a: str\ndef f(x): return 1",
        "import sys\ndef f(x): return str(sys._getframe(1).f_globals) + str(sys._getframe(1).f_locals)",
        "import gc\ndef f(x): return max((o for o in gc.get_objects() if isinstance(o, list)), key=len)",
        "def f(x):\n S = type('S', (str,), {'__eq__': lambda s, o: True})\n return S('no')",
        "import atexit, os\ndef f(x): return ''\natexit.register(lambda: os.write(1, b'\"late\"'))",
        "def f(x): return float('nan')",
        "class R:\n def __reduce__(self): return (print, ('x',))\ndef f(x): return R()",
        "import os\ndef f(x): pass\nfor fd in range(1, 64):\n"
        ' try: os.write(fd, b\'["a", "b", "c", "d", "e", "f"]\')\n except OSError: pass\nos._exit(0)',
        "import json\ndef f(x): return ''\njson.dumps = lambda v: 'true'",
        "import json\ndef f(x): return ''\njson.dumps = lambda v: '['*100000",
        "import os\ndef f(x): return ''\nos.write(1, b'x' * 10_000_000)",
        "def f" + "x" * 100_000,
    ],
)
def test_a_hostile_or_broken_candidate_earns_nothing_and_the_next_is_judged_rightly(box, problems, text):
    problem = problems[0]
    assert marks(text, problem, box) == {"reward": 0.0, "correct": 0.0, "passed": 0.0}
    if box.is_soiled:
        box.renew()
    box.begin()
    assert marks(problem.demo[0]["content"], problem, box)["correct"] == 1.0


def test_an_endless_loop_is_stopped_and_soils_the_box(box, problems):
    assert marks("def f(x):\n while 1: pass", problems[0], box)["reward"] == 0.0
    assert box.is_soiled
    old = box.id
    box.renew()
    assert box.id != old
    assert not box.is_soiled


def test_nothing_that_enters_the_box_holds_an_expected_output(problems):
    problem = problems[0]
    seen = []
    fake = FakeSandbox(lambda argv, stdin, files: seen.append((argv, stdin)) or result(b"null"))
    marks(problem.demo[0]["content"], problem, JudgeBox(lambda: BlockingSandbox(fake)))
    requests = [json.loads(stdin) for _, stdin in seen]
    assert {source for source, _ in requests} == {problem.demo[0]["content"]}
    assert sorted(x for _, x in requests) == sorted(problem.metadata["inputs"])
    for argv, stdin in seen:
        for output in problem.metadata["outputs"]:
            assert output not in stdin.decode()
            assert output not in "".join(argv)


def test_no_case_learns_from_another_and_their_order_follows_from_the_candidate(box, problems):
    problem = problems[0]
    counting = "n = 0\ndef f(x):\n global n\n n += 1\n return str(n)"
    outputs = run_candidate(counting, problem.metadata["inputs"], box)
    assert outputs == ["1"] * len(problem.metadata["inputs"])
    leaving = "def f(x):\n import os\n open('left', 'a').write('x')\n return os.path.getsize('left')"
    assert run_candidate(leaving, problem.metadata["inputs"], box) == [1] * len(problem.metadata["inputs"])
    orders = {tuple(shuffled(6, f"def f(x): return {i}")) for i in range(20)}
    assert len(orders) > 10 and all(sorted(order) == list(range(6)) for order in orders)
    assert shuffled(6, "def f") == shuffled(6, "def f")


def test_what_the_candidate_prints_is_not_its_answer_and_does_no_harm(box, problems):
    source = problems[1].demo[0]["content"].replace("\n X", "\n print('noise')\n X")
    assert marks(source, problems[1], box)["correct"] == 1.0


def test_a_half_right_program_is_paid_only_where_the_domain_says_so(box, problems):
    problem = problems[2]
    wrong_on_one = problem.demo[0]["content"].replace(
        "return (", f"return '' if x == {problem.metadata['inputs'][0]!r} else ("
    )
    found = marks(wrong_on_one, problem, box)
    assert (found["reward"], found["correct"], found["passed"]) == (0.0, 0.0, pytest.approx(5 / 6))
    paid = score(
        Completion(wrong_on_one, "", (), (), "stop"),
        prompt="",
        metadata={**problem.metadata, "pass_reward": 0.3},
        sandbox=box,
    )
    assert paid["reward"] == pytest.approx(0.25)


@pytest.mark.parametrize("status", [ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR, ExecStatus.DENIED])
def test_a_box_that_fails_is_infrastructure_and_no_zero(problems, status):
    fake = FakeSandbox(lambda argv, stdin, files: result(status=status, exit_code=None))
    with pytest.raises(SandboxLost):
        marks(problems[0].demo[0]["content"], problems[0], JudgeBox(lambda: BlockingSandbox(fake)))
    with pytest.raises(RewardError, match="needs a sandbox"):
        marks(problems[0].demo[0]["content"], problems[0], None)


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        (b"[1]", 1),
        (b'[{"a": [1.5, null]}]', {"a": [1.5, None]}),
        (b"1", NOTHING),
        (b"[1, 2]", NOTHING),
        (b"[1] [1]", NOTHING),
        (b"[NaN]", NOTHING),
        (b"[1e999]", NOTHING),
        (b"[-1e999]", NOTHING),
        (b"[" * 8000 + b"]" * 8000, NOTHING),
        (b"[" * 20 + b"]" * 20, NOTHING),
        (b"[" + b"9" * 5000 + b"]", NOTHING),
        (b"[" + b" " * 20_000 + b"1]", NOTHING),
        (b"[\xff]", NOTHING),
    ],
)
def test_a_reply_is_one_plain_finite_value_or_nothing(reply, value):
    found = read_value(reply)
    assert found is value or found == value


def test_code_may_come_in_a_fence():
    assert candidate_source(" def f(x): return x\n") == "def f(x): return x"
    assert candidate_source("Here:\n```python\ndef f(x):\n return x\n```\nDone.") == "def f(x):\n return x"
    assert candidate_source("```\ndef f(x): return x") == "def f(x): return x"
