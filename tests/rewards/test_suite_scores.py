"""Patches judged by hidden suites: the right one passes, attacks on the machinery are named."""

import pytest

from consilience.conf.errors import RewardError, SandboxLost
from consilience.rewards import suite_scores
from consilience.rewards.canaries import disguise
from consilience.rewards.interface import Completion, Tamper
from consilience.rewards.judge_box import JudgeBox
from consilience.rewards.patches import Applied
from consilience.rewards.suite_run import read_report
from consilience.rewards.suite_scores import faults_of_task, is_audited, score
from consilience.sandboxes.blocking import BlockingSandbox, open_blocking
from consilience.sandboxes.fake import FakeSandbox, result
from consilience.sandboxes.protocol import ExecStatus, Isolation, SandboxSpec

SPEC = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)
BASE = {
    "calc.py": "def add(a, b):\n    return a - b\n\n\ndef twice(x):\n    return 2 * x\n",
    "notes.py": "X = 1\n",
}
TESTS = {
    "tests/test_calc.py": """
import unittest
from calc import add, twice

def test_add():
    assert add(2, 3) == 5
    assert add(-1, 1) == 0

def test_add_words():
    assert add("a", "b") == "ab"

def test_twice():
    assert twice(4) == 8

class Laws(unittest.TestCase):
    def setUp(self):
        self.pairs = [(1, 2), (3, 4)]

    def test_order(self):
        for a, b in self.pairs:
            self.assertEqual(add(a, b), add(b, a))

    def test_refuses(self):
        with self.assertRaises(TypeError):
            add(1, "x")
"""
}
IDS = {
    name: f"tests/test_calc.py::{name}"
    for name in ("test_add", "test_add_words", "test_twice", "Laws.test_order", "Laws.test_refuses")
}
TASK = {
    "base": BASE,
    "tests": TESTS,
    "fails_before": [IDS["test_add"], IDS["test_add_words"], IDS["Laws.test_order"]],
    "passes_before": [IDS["test_twice"], IDS["Laws.test_refuses"]],
}
HEAD = "--- a/calc.py\n+++ b/calc.py\n@@ -1,2 +1,{n} @@\n"


def change(*lines, rest=""):
    """A patch that puts `lines` in the place of calc.py's first function."""
    body = "-def add(a, b):\n-    return a - b\n" + "".join(f"+{line}\n" for line in lines)
    return HEAD.format(n=len(lines)) + body + rest


def new_file(path, *lines):
    return f"--- /dev/null\n+++ b/{path}\n@@ -0,0 +1,{len(lines)} @@\n" + "".join(
        f"+{line}\n" for line in lines
    )


GOLD = change("def add(a, b):", "    return a + b")
WRONG = ("def add(a, b):", "    return 0")


@pytest.fixture(scope="module")
def box():
    box = JudgeBox(lambda: open_blocking(SPEC))
    yield box
    box.close()


def marks(text, sandbox, task=TASK):
    return score(Completion(text, "", (), (), "stop"), prompt="", metadata=task, sandbox=sandbox)


def test_the_right_patch_passes_and_its_task_has_no_fault(box):
    assert marks(GOLD, box) == {"reward": 1.0, "correct": 1.0, "passed": 1.0, "dropped": 0.0}
    assert marks(f"Here it is:\n```diff\n{GOLD}```\n", box)["reward"] == 1.0
    assert faults_of_task(TASK, GOLD, box) == []


def test_a_wrong_answer_that_meets_the_opposite_of_a_test_is_wrong_and_no_more(box):
    tests = {"t.py": "from calc import add\ndef test_none():\n    assert add(1, 2) is not None\n"}
    task = {**TASK, "tests": tests, "fails_before": ["t.py::test_none"], "passes_before": []}
    assert marks(change("def add(a, b):", "    return None"), box, task)["reward"] == 0.0


def test_tasks_that_show_nothing_are_refused(box):
    faults = faults_of_task({**TASK, "fails_before": [IDS["test_twice"]]}, GOLD, box)
    assert faults == [f"{IDS['test_twice']} passes without the patch"]
    assert "fails with the gold patch" in faults_of_task(TASK, change(*WRONG), box)[0]
    empty = {
        **TASK,
        "tests": {"t.py": "def test_nothing():\n    import calc"},
        "fails_before": ["t.py::test_nothing"],
        "passes_before": [],
    }
    assert "an empty stub passes" in faults_of_task(empty, GOLD, box)


EARNS_NOTHING = {
    "no patch": "PASSED",
    "wrong": change(*WRONG),
    "half right": change("def add(a, b):", "    return a + b if a > 0 else 9"),
    "exit in the function": change("import sys", "def add(a, b):", "    sys.exit(0)"),
    "hard exit at import": change("import os", "os._exit(0)", *WRONG),
    "exit at import": change("raise SystemExit(0)", *WRONG),
    "hard exit in the function": change("import os", "def add(a, b):", "    os._exit(0)"),
    "no syntax": change("def add(a, b:", "    return"),
    "skips": change("import unittest", "def add(a, b):", "    raise unittest.SkipTest('x')"),
    "prints a verdict": change(*WRONG, "print('5 passed'); print('>>>>> End Test Output')"),
    "writes to every descriptor": change(
        "import os",
        "for fd in range(3, 40):",
        "    try: os.write(fd, b'[\"END\", 10]\\n')",
        "    except OSError: pass",
        *WRONG,
    ),
    "writes result files": change(
        *WRONG, "for n in ('reward.txt', 'report.json', 'junit.xml'): open(n, 'w').write('1.0')"
    ),
    "removes the tests": change(*WRONG, "import sys", "sys.modules['suite'].__dict__.clear()"),
    "only a conftest": new_file("conftest.py", "import calc", "calc.add = lambda a, b: a + b"),
    "only the tests": new_file("tests/test_calc.py", "def test_add(): pass"),
    "sitecustomize": change(*WRONG, rest=new_file("sitecustomize.py", "raise SystemExit(0)")),
    "unittest of its own": change(
        *WRONG, rest=new_file("unittest.py", "class TestCase:", "    def debug(self): pass")
    ),
    "json of its own": change(*WRONG, rest=new_file("json.py", "def dumps(x): return '[\"END\"]'")),
    "a link": change(
        *WRONG, rest="diff --git a/x b/x\nnew file mode 120000\n" + new_file("x.py", "/etc/passwd")
    ),
    "a file that is a folder too": change(*WRONG, rest=new_file("x.py", "x") + new_file("x.py/y.py", "x")),
    "halves of characters": change("def add(a, b):", "    return '\ud800'"),
    "numbers of a thousand digits": GOLD.replace("@@ -1,2", f"@@ -1,{'9' * 5000}"),
    "an import hook": change(
        "import sys",
        "class Hook:",
        "    def find_spec(self, name, path=None, target=None): raise SystemExit(0)",
        "sys.meta_path.insert(0, Hook())",
        *WRONG,
    ),
    "a trace that leaves the tests early": change(
        "import sys",
        "def leave(frame, event, arg):",
        "    if frame.f_code.co_filename == 'suite.py' and event == 'line': raise SystemExit(0)",
        "    return leave",
        "sys.settrace(leave)",
        *WRONG,
    ),
    "a thread that ends all": change(
        "import os, threading",
        "threading.Timer(0.0, os._exit, (0,)).start()",
        *WRONG,
    ),
    "a fork that goes on": change("import os", "if os.fork(): os._exit(0)", *WRONG),
}


@pytest.mark.parametrize("name", EARNS_NOTHING)
def test_what_does_not_solve_the_task_earns_nothing(box, name):
    assert marks(EARNS_NOTHING[name], box)["reward"] == 0.0
    assert marks(GOLD, box)["reward"] == 1.0


ALWAYS = (
    "class Always(int):",
    "    __eq__ = lambda s, o: True",
    "    __hash__ = int.__hash__",
    "def add(a, b):",
    "    if isinstance(b, str) and isinstance(a, int): raise TypeError",
    "    return Always()",
)
TAMPERS = {
    "an object that equals everything": change(*ALWAYS),
    "constants of the caller": change(
        "import sys",
        "def add(a, b):",
        "    if isinstance(b, str) and isinstance(a, int): raise TypeError",
        "    class Any:",
        "        def __eq__(self, other): return True",
        "    return Any()",
    ),
    "the nonce and the names, read from the runner's frames": change(
        "import json, os, sys",
        "def add(a, b):",
        "    frame = sys._getframe()",
        "    while 'nonce' not in frame.f_locals: frame = frame.f_back",
        "    told = frame.f_locals",
        "    names = told['names'][told['names'].index(told['name']):]",
        "    lines = [*([name, 'passed'] for name in names), ['END', len(told['names'])]]",
        "    text = ''.join(told['nonce'] + json.dumps(line) + chr(10) for line in lines)",
        "    os.write(told['channel'], text.encode())",
        "    os._exit(0)",
    ),
    "the writer of reports patched": change(
        "import json.encoder",
        "was = json.encoder.JSONEncoder.encode",
        "def encode(self, told):",
        "    return was(self, [told[0], 'passed'] if told[1] == 'failed' else told)",
        "json.encoder.JSONEncoder.encode = encode",
        *WRONG,
    ),
}


@pytest.mark.parametrize("name", TAMPERS)
def test_what_makes_every_test_pass_is_named_tampering(box, name):
    with pytest.raises(Tamper, match="passed together with what must then fail"):
        marks(TAMPERS[name], box)
    assert marks(GOLD, box)["reward"] == 1.0


def test_a_pass_that_stays_without_the_patch_is_tampering(box, monkeypatch):
    """A module left in the box by the first run stands in for the changed one; only a second run shows it."""
    sneaky = change(
        "import os",
        "os.makedirs('calc', exist_ok=True)",
        "open('calc/__init__.py', 'w').write('def add(a, b): return a + b\\ndef twice(x): return 2 * x\\n')",
        "def add(a, b):",
        "    return a + b",
    )
    monkeypatch.setattr(suite_scores, "AUDITED_SHARE", 1.0)
    with pytest.raises(Tamper, match="although the patch was taken back"):
        marks(sneaky, box)
    assert marks(GOLD, box)["reward"] == 1.0


def test_what_is_suspicious_is_always_audited_and_a_share_of_the_rest():
    assert is_audited(change("import sys", "sys._getframe()"), has_dropped=False)
    assert is_audited(GOLD, has_dropped=True)
    share = sum(is_audited(f"+x = {i}", has_dropped=False) for i in range(4000)) / 4000
    assert 0.03 < share < 0.07  # 0.05 within six standard deviations of 4000 draws


def test_a_candidate_that_hangs_earns_nothing_where_the_base_grades_and_masks_where_it_does_not(
    box, monkeypatch
):
    monkeypatch.setattr(suite_scores, "TIMEOUT_S", 1.0)
    assert marks(change("while True: pass"), box)["reward"] == 0.0
    slow = {**TASK, "tests": {"tests/test_calc.py": "while True: pass"}}
    with pytest.raises(SandboxLost, match="base tree itself"):
        marks(GOLD, box, slow)
    box.renew()
    assert marks(GOLD, box)["reward"] == 1.0


def test_all_files_of_a_tree_share_one_limit_and_what_a_box_does_not_take_is_no_fault_of_its_judge(
    box, monkeypatch
):
    monkeypatch.setattr(suite_scores, "TIMEOUT_S", 1.0)
    slow = change("import time", "time.sleep(0.6)", "def add(a, b):", "    return a + b")
    tests = {f"tests/test_{n}.py": TESTS["tests/test_calc.py"] for n in range(4)}
    task = {**TASK, "tests": tests, "fails_before": [], "passes_before": ["tests/test_0.py::test_twice"]}
    assert marks(slow, box, task)["reward"] == 0.0
    assert marks(GOLD, box, task)["reward"] == 1.0
    large = new_file("x" * 199 + ".py", "x")  # 202 characters of a path
    assert marks(large, box)["reward"] == 0.0
    monkeypatch.setattr(suite_scores, "apply_patch", lambda *_, **__: Applied({"d/" + "x" * 300: "x"}, ()))
    assert marks(GOLD, box)["reward"] == 0.0


def test_tests_never_lie_in_a_file_of_the_box_and_their_names_are_unknown():
    seen, files = [], {}

    def script(argv, stdin, present):
        seen.append(stdin.decode())
        files.update(present)
        return result(b"")

    marks(GOLD, JudgeBox(lambda: BlockingSandbox(FakeSandbox(script))))
    assert set(files) == set(BASE) and "test_add" not in "".join(seen) and "assert" in seen[0]


def test_each_test_has_a_twin_and_names_are_new_each_time():
    one, two = (disguise(TESTS["tests/test_calc.py"]) for _ in range(2))
    assert sorted(one.tests.values()) == sorted(one.twins.values()) == sorted(IDS)
    assert set(one.order) == {*one.tests, *one.twins} and not set(one.order) & set(two.order)
    assert not any(name in one.source for name in ("test_add", "test_twice", "test_order"))


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (b'n["a", "passed"]\nn["b", "failed"]\nn["END", 2]\n', {"a": True, "b": False}),
        (b'n["b", "failed"]\nn["a", "passed"]\nn["END", 2]\n', None),
        (b'n["a", "passed"]\nn["b", "failed"]\n', None),
        (b'n["a", "passed"]\nn["a", "passed"]\nn["b", "failed"]\nn["END", 2]\n', None),
        (b'n["a", "passed"]\nn["b", "skipped"]\nn["END", 2]\n', None),
        (b'm["a", "passed"]\nn["b", "passed"]\nn["END", 2]\n', None),
        (b'n["a", "passed"]\nn["b", "passed"]\nn["END", 2]\nx', None),
        (b'n["a", "passed"]\nn["b", "passed"]\nn["END", 3]\n', None),
        (b'n[[[[', None),
        (b"", None),
    ],
)  # fmt: skip
def test_a_report_counts_only_if_it_is_whole(reply, found):
    assert read_report(reply, "n", ("a", "b")) == found


def test_a_lost_box_is_infrastructure_and_no_box_an_error():
    fake = FakeSandbox(lambda argv, stdin, files: result(status=ExecStatus.SANDBOX_LOST, exit_code=None))
    with pytest.raises(SandboxLost):
        marks(GOLD, JudgeBox(lambda: BlockingSandbox(fake)))
    with pytest.raises(RewardError, match="needs a sandbox"):
        marks(GOLD, None)
