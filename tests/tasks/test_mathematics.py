"""Sums and other generators of reasoning-gym: short questions, right worked solutions."""

import json

import pytest

from consilience.conf.errors import TaskError
from consilience.rewards.interface import Completion
from consilience.rewards.reasoning_gym_scores import score
from consilience.tasks.mathematics import columns, open_generator, running_totals, steps
from consilience.tasks.registry import load_domain


def marks(problem, text):
    completion = Completion(text, "", (), (), "stop")
    return score(completion, prompt="", metadata=json.loads(json.dumps(problem.metadata)), sandbox=None)


def test_the_running_totals_of_the_worked_example():
    assert running_totals("4 + 7 - 2 + 5") == "11 9 14"
    assert running_totals("3 - 9") == "-6"
    assert running_totals("8") == ""
    assert steps("4 + 7 - 2 + 5") == "4+7=11-2=9+5=14"


def test_the_columns_of_worked_examples():
    assert columns("795 + 670") == "5+0+0=05 9+7+0=16 7+6+1=14"
    assert columns("99 + 1") == "9+1+0=10 9+0+1=10"
    assert columns("9 + 8 + 7") == "9+8+7+0=24"


def test_questions_are_the_bare_arithmetic_and_columns_add_up():
    for problem in load_domain("mathematics").problems("train", 300):
        (message,) = problem.messages
        answer = str(eval(message["content"].replace("+0", "+").replace("++", "+0+")))
        (demo,) = problem.demo
        assert demo["content"] == answer
        sums = [column.split("=") for column in demo["reasoning_content"].split()]
        assert all(sum(map(int, left.split("+"))) == int(right) for left, right in sums)
        units = "".join(right[1] for _, right in reversed(sums))
        assert (sums[-1][1][0] + units).lstrip("0") == answer.lstrip("0")


def test_running_totals_of_chain_sums_end_at_the_answer():
    settings = {"kind": "math", "parameters": {"generator": "chain_sum"}}
    for problem in load_domain(settings).problems("train", 300):
        expression = problem.messages[0]["content"].removesuffix("=")
        assert len(expression) == 7
        (demo,) = problem.demo
        assert demo["content"] == str(eval(expression)) == demo["reasoning_content"].split()[-1]


def test_every_demo_is_right_and_every_other_number_is_wrong():
    for problem in load_domain("mathematics").problems("test", 100):
        answer = problem.demo[-1]["content"]
        assert marks(problem, answer) == {"reward": 1.0, "correct": 1.0, "score": 1.0}
        wrong = [str(int(answer) + d) for d in (-1, 1, 10)] + ["1" + answer, answer + "1", "", "abc", "nan"]
        for text in wrong:
            assert marks(problem, text)["reward"] == marks(problem, text)["correct"] == 0.0, (answer, text)


def test_partial_credit_is_what_reasoning_gym_gives():
    parameters = {"partial_credit": True, "generator": "chain_sum", "work": "totals"}
    domain = load_domain({"kind": "mathematics", "parameters": parameters})
    problem = next(p for p in domain.problems("train", 50) if p.metadata["answer"] == "4")
    assert marks(problem, "is 4")["reward"] == pytest.approx(0.25)
    assert marks(problem, "is 4")["correct"] == 0.0


def test_our_marks_agree_with_reasoning_gym_on_other_generators():
    for generator in (
        "basic_arithmetic",
        "gcd",
        "spell_backward",
        "fraction_simplification",
    ):
        domain = load_domain(
            {"kind": "mathematics", "effort": "chat", "parameters": {"generator": generator}}
        )
        dataset = open_generator(generator, {}, seed=0)
        for problem in domain.problems("train", 20):
            for text in (problem.demo[0]["content"], "7", "x"):
                expected = dataset.score_answer(text, problem.metadata["entry"])
                assert marks(problem, text)["score"] == pytest.approx(expected)
            assert marks(problem, problem.demo[0]["content"])["correct"] == 1.0


def test_difficulty_is_a_matter_of_settings():
    domain = load_domain(
        {
            "kind": "math",
            "parameters": {
                "compact": False,
                "generator": "chain_sum",
                "work": "totals",
                "params": {"min_terms": 6, "max_terms": 6, "min_digits": 3, "max_digits": 3},
            },
        }
    )
    for problem in domain.problems("train", 20):
        terms = problem.messages[0]["content"].split()[:-1:2]
        assert len(terms) == 6
        assert all(len(term) == 3 for term in terms)


def test_chat_mode_and_hidden_work_leave_the_thinking_out():
    for settings in ({"effort": "chat"}, {"parameters": {"work": "none"}}):
        (problem,) = load_domain({"kind": "math", **settings}).problems("train", 1)
        assert "reasoning_content" not in problem.demo[0]


def test_neighbouring_seeds_draw_different_streams():
    one, other = (open_generator("chain_sum", {}, seed=seed) for seed in (1, 2))
    assert {one[i]["question"] for i in range(50)} & {other[i]["question"] for i in range(50)} == set()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"generator": "chain_sums"}, "did you mean 'chain_sum'"),
        ({"params": {"min_term": 2}}, "min_term"),
        ({"params": {"min_terms": 9}}, "max_terms must be >= min_terms"),
        ({"params": {"operators": ["-"]}, "work": "columns"}, "shows sums of whole numbers"),
        ({"generator": "chain_sum", "work": "columns"}, "shows sums of whole numbers"),
        ({"question_pattern": "("}, "no regular expression"),
        ({"question_pattern": "problem"}, "has no group"),
        ({"generater": "chain_sum"}, "did you mean 'generator'"),
        ({"generator": 3}, "generator"),
    ],
)
def test_each_mistake_in_the_parameters_is_named(parameters, words):
    with pytest.raises(TaskError, match=words):
        load_domain({"kind": "math", "parameters": parameters})
