"""Reward functions by path: what loads, and what each mistake says."""

import pytest

from consilience.conf.errors import RewardError
from consilience.rewards.interface import Completion
from consilience.rewards.load import load_reward

ANSWER = Completion("14", "", (), (), "stop")


def test_an_import_path_names_a_function_of_a_package():
    score = load_reward("consilience.rewards.exact_match:score")
    assert score(ANSWER, prompt="", metadata={"answer": "14"}, sandbox=None) == {
        "reward": 1.0,
        "correct": 1.0,
    }


def test_a_file_may_import_its_neighbours_and_be_named_like_a_module(tmp_path):
    (tmp_path / "my_constants_of_this_test.py").write_text("VALUE = 0.75")
    (tmp_path / "json.py").write_text(
        "from my_constants_of_this_test import VALUE\n"
        "def score(completion, *, prompt, metadata, sandbox): return VALUE"
    )
    assert load_reward(f"{tmp_path}/json.py:score")(ANSWER, prompt="", metadata={}, sandbox=None) == 0.75
    import json

    assert json.loads("[1]") == [1]


def test_objects_with_a_call_and_keyword_catchers_are_accepted(tmp_path):
    (tmp_path / "r.py").write_text(
        "class Judge:\n def __call__(self, completion, **facts): return 1.0\n"
        "judge = Judge()\nasync def later(completion, *, prompt, metadata, sandbox): return 1.0"
    )
    assert callable(load_reward(f"{tmp_path}/r.py:judge"))
    assert callable(load_reward(f"{tmp_path}/r.py:later"))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("my_rewards.py", "expected 'package.module:function'"),
        (":score", "expected"),
        ("a.py:not a name", "expected"),
        ("nowhere/at/all.py:score", "there is no file"),
        ("consilience.rewards.nothing:score", "ModuleNotFoundError"),
        ("consilience.rewards.exact_match:scores", "did you mean 'score'"),
        ("consilience.rewards.exact_match:__doc__", "is a str; a function score"),
    ],
)
def test_each_mistake_in_a_path_is_named(path, words):
    with pytest.raises(RewardError, match=words):
        load_reward(path)


def test_an_error_inside_the_file_names_its_line(tmp_path):
    file = tmp_path / "r.py"
    file.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(RewardError, match=r"line 2 \(ZeroDivisionError"):
        load_reward(f"{file}:score")


@pytest.mark.parametrize(
    "signature",
    ["completion", "completion, prompt, metadata", "", "completion, *, prompt, metadata, sandbox, more"],
)
def test_a_function_that_cannot_take_the_four_arguments_is_refused(tmp_path, signature):
    file = tmp_path / "r.py"
    file.write_text(f"def score({signature}): return 1.0")
    with pytest.raises(RewardError, match="must be callable as score"):
        load_reward(f"{file}:score")
