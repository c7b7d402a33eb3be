"""Programs from stdin to stdout: right ones pass, everything else earns nothing."""

import pytest

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards.interface import Completion
from consilience.rewards.judge_box import JudgeBox
from consilience.rewards.program_scores import CHECKERS, score
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation, SandboxSpec

# The weakest driver runs everywhere; what is judged here does not rest on isolation.
SPEC = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)
CASES = {"inputs": ["1 2\n", "3 4\n", "10 -3\n"], "outputs": ["3\n", "7\n", "7\n"]}


@pytest.fixture(scope="module")
def box():
    box = JudgeBox(lambda: open_blocking(SPEC))
    yield box
    box.close()


def marks(text, sandbox, **more):
    completion = Completion(text, "", (), (), "stop")
    return score(completion, prompt="", metadata={**CASES, **more}, sandbox=sandbox)


def test_a_right_program_passes_and_one_that_is_right_once_does_not(box):
    assert marks("print(sum(map(int, input().split())))", box)["reward"] == 1.0
    assert (
        marks("```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split())))\n```", box)["correct"]
        == 1
    )
    found = marks("print(3)", box)
    assert found == {"reward": 0.0, "correct": 0.0, "passed": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "print('PASSED')",
        "print('>>>>> Start Test Output\\n3 passed\\n>>>>> End Test Output')",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "print(sum(map(int, input().split())))\nraise SystemExit(1)",
        "print(sum(map(int, input().split())))\nprint('reward: 1.0')",
        "import os\nprint(sum(map(int, input().split())), flush=True)\nos.kill(os.getpid(), 9)",
        "import os\nwhile True: os.write(1, b'3\\n7\\n7\\n' * 9999)",
        "print('3\\n7\\n7')",
        "import sys\nfor name in list(sys.modules): print(vars(sys.modules[name]).get('outputs'))",
        "nan = float('nan')\nprint(nan)",
        "import os\nn = len(os.listdir('.'))\nopen(str(n), 'w')\nprint([3, 7, 7][n])",
        "import sys\nf = sys._getframe()\nwhile f: print(f.f_locals.get('expected')); f = f.f_back",
    ],
)
def test_a_program_that_does_something_else_earns_nothing(box, text):
    found = marks(text, box)
    assert found["reward"] == 0.0 and found["correct"] == 0.0
    if box.is_soiled:
        box.renew()
    assert marks("print(sum(map(int, input().split())))", box)["reward"] == 1.0


def test_nothing_that_enters_the_box_holds_an_expected_output():
    seen = []
    fake = FakeSandbox(lambda argv, stdin, files: seen.append((argv, stdin)) or result(b""))
    metadata = {"inputs": ["1", "2"], "outputs": ["secret-a", "secret-b"]}
    completion = Completion("print(1)", "", (), (), "stop")
    score(completion, prompt="", metadata=metadata, sandbox=JudgeBox(lambda: BlockingSandbox(fake)))
    assert len(seen) == 2 and "secret" not in repr(seen)


@pytest.mark.parametrize("status", [ExecStatus.SANDBOX_LOST, ExecStatus.PROTOCOL_ERROR])
def test_a_box_that_fails_is_infrastructure(status):
    fake = FakeSandbox(lambda argv, stdin, files: result(status=status, exit_code=None))
    with pytest.raises(SandboxLost):
        marks("print(1)", JudgeBox(lambda: BlockingSandbox(fake)))
    with pytest.raises(RewardError, match="needs a sandbox"):
        marks("print(1)", None)
    with pytest.raises(RewardError, match="does not exist"):
        marks("print(1)", JudgeBox(lambda: BlockingSandbox(fake)), checker="anything")


@pytest.mark.parametrize(
    ("name", "got", "want", "is_same"),
    [
        ("lines", "a  \nb\n\n", "a\nb", True),
        ("lines", "a\n\nb", "a\nb", False),
        ("lines", " a", "a", False),
        ("tokens", "a\n b", "a b", True),
        ("tokens", "a b c", "a b", False),
        ("numbers", "1.0000001 2", "1 2", True),
        ("numbers", "1.00001 2", "1 2", False),
        ("numbers", "nan", "1", False),
        ("numbers", "inf", "inf", False),
        ("numbers", "1 2 3", "1 2", False),
        ("numbers", "", "1", False),
        ("numbers", "one", "1", False),
    ],
)
def test_each_checker_says_what_is_the_same(name, got, want, is_same):
    assert CHECKERS[name](got, want) is is_same
