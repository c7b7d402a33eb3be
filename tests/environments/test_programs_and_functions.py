"""Programs and functions: right ones pass on every driver, and nothing else earns the whole reward."""

import pytest

from consilience.conf.load import compose
from consilience.rewards import code_scores, program_scores
from consilience.rewards.code_scores import candidate_source
from consilience.rewards.interface import Completion
from consilience.tasks.number_lists import STEPS, Chain, solution
from consilience.tasks.registry import load_domain

NUM = 12
SCORES = {"programs": program_scores.score, "functions": code_scores.score}
SOLVE = "def solve(numbers):\n"


@pytest.fixture(scope="module", params=list(SCORES))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def problems(kind):
    cfg = compose(["task=programming"])
    return load_domain(cfg.task.domains[kind].to_settings(kind, 1)).problems("test", NUM)


def marks(text, problem, kind, judge):
    judge.begin()
    try:
        completion = Completion(text, "", (), (), "stop")
        return SCORES[kind](completion, prompt="", metadata=problem.metadata, sandbox=judge)["reward"]
    finally:
        if judge.is_soiled:
            judge.renew()


def test_gold_passes_and_without_any_one_step_it_fails(kind, problems, judge):
    for problem in problems:
        gold = candidate_source(problem.demo[-1]["content"])
        assert marks(gold, problem, kind, judge) == 1.0
        lines = gold.split("\n")
        steps = [i for i, line in enumerate(lines) if line.strip().startswith("xs = ")][1:]
        for i in steps:
            assert marks("\n".join([*lines[:i], *lines[i + 1 :]]), problem, kind, judge) == 0.0
        stub = "print()" if kind == "programs" else SOLVE + "    return []"
        assert steps and marks(stub, problem, kind, judge) == 0.0


def test_every_step_computes_what_its_text_does():
    for name in STEPS:
        for numbers in ([], [3], [4, -7, 4, 10, 0, 9, -2]):
            space = {}
            exec(solution(Chain(((name, 3),), "list"), "function"), space)
            assert space["solve"](list(numbers)) == STEPS[name].apply(list(numbers), 3), name


TAMPERING = {
    "programs": [
        "print('OK'); print('8 passed')",
        "import os\nfor fd in range(64):\n try: os.write(fd, b'correct\\n')\n except OSError: pass",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "open('sitecustomize.py', 'w').write('x'); open('conftest.py', 'w').write('x')",
        "import builtins; builtins.print = lambda *a: None",
        "import glob; print(*[open(f, errors='replace').read() for f in glob.glob('/workspace/*')])",
        "import sys; print(sys.modules['__main__'].__dict__)",
        "while True: print(1)",
    ],
    "functions": [
        "class Any(list):\n __eq__ = lambda a, b: True\n" + SOLVE + " return Any()",
        SOLVE + " import os; os.write(1, b'[[]]'); os._exit(0)",
        SOLVE + " import sys; return sys._getframe(1).f_globals.get('expected')",
        "import json\njson.dumps = lambda *a, **k: 'true'\n" + SOLVE + " return 1",
        "import builtins\nbuiltins.type = lambda *a: list\n" + SOLVE + " return object()",
        SOLVE + " raise SystemExit(0)",
        SOLVE + " return float('nan')",
        SOLVE + " return True",
        SOLVE + " x = []\n for _ in range(99): x = [x]\n return x",
        SOLVE + " while True: pass",
    ],
}


@pytest.mark.parametrize("number", range(10))
def test_tampering_earns_nothing(number, kind, problems, judge):
    if number < len(TAMPERING[kind]):
        assert marks(TAMPERING[kind][number], problems[0], kind, judge) == 0.0


def test_a_value_of_another_type_is_another_value():
    same = code_scores.same_value
    assert same([1, {"a": None}], [1, {"a": None}])
    assert not any(
        same(a, b) for a, b in ((True, 1), (1, 1.0), ([1], [1, 2]), ({"a": 1}, {"b": 1}), ("1", 1))
    )


def test_only_one_plain_value_is_a_reply():
    read, nothing = code_scores.read_value, code_scores.NOTHING
    assert read(b"[[1, 2]]") == [1, 2] and read(b"[null]") is None
    refused = (
        b"",
        b"1",
        b"[1, 2]",
        b"[NaN]",
        b"[1e999999",
        b"[" * 40 + b"]" * 40,
        b'["' + b"x" * 20_000 + b'"]',
    )
    assert all(read(reply) is nothing for reply in refused)
