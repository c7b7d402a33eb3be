"""String programs: how many there are, that examples determine them, that demos compute the cases."""

import itertools

import pytest

from consilience.conf.errors import TaskError
from consilience.tasks.code_domain import MIN_PROGRAMS, CodeParameters
from consilience.tasks.programs import ProgramSpace, Term, apply_program, source_of
from consilience.tasks.registry import load_domain


def run(source, x):
    namespace = {}
    exec(source, namespace)
    return namespace["f"](x)


def test_a_program_by_hand():
    program = (Term("index", 2), Term("index", 3, "upper"), Term("literal", "4"), Term("index", 0, "mark"))
    source = source_of(program, ("upper", "mark"))
    assert source == "def f(x):\n X=x.upper()\n M=[c+'!' for c in x]\n return (x[2]+X[3]+str(4)+M[0])"
    assert apply_program(program, "cahkeb") == "hK4c!" == run(source, "cahkeb")


def test_the_default_space_has_at_least_100_000_programs():
    space = CodeParameters().space()
    assert space.num_programs == (6 * 2 + 10) ** 4 == 234_256
    assert space.num_programs >= MIN_PROGRAMS
    assert load_domain("code").source.num_programs == space.num_programs


def test_the_count_is_that_of_distinct_functions():
    space = ProgramSpace(2, 1, 2, "abc", ("upper", "mark"), "7")
    terms = [Term("index", i, t) for i in range(2) for t in ("", "upper", "mark")] + [Term("literal", "7")]
    programs = [p for n in (1, 2) for p in itertools.product(terms, repeat=n)]
    inputs = ["".join(p) for p in itertools.permutations("abc", 2)]
    behaviours = {tuple(apply_program(p, x) for x in inputs) for p in programs}
    assert len(behaviours) == len(programs) == space.num_programs == 7 + 49


def test_one_visible_example_already_determines_the_program():
    space = ProgramSpace(2, 1, 2, "abc", ("upper", "mark"), "7")
    terms = [Term("index", i, t) for i in range(2) for t in ("", "upper", "mark")] + [Term("literal", "7")]
    programs = [p for n in (1, 2) for p in itertools.product(terms, repeat=n)]
    for x in ("ab", "ca"):
        assert len({apply_program(p, x) for p in programs}) == space.num_programs


def test_problems_show_examples_keep_fresh_cases_and_never_show_the_answer():
    for problem in load_domain("code").problems("train", 200):
        (message,) = problem.messages
        source = problem.demo[0]["content"]
        shown = [line.replace(",", "").split(" -> ") for line in message["content"].splitlines()]
        assert len(shown) == 2
        for x, y in shown:
            assert len(set(x)) == len(x) == 6
            assert run(source, x) == y
        inputs, outputs = problem.metadata["inputs"], problem.metadata["outputs"]
        assert len(inputs) == len(outputs) == len(set(inputs)) >= 5
        assert not set(inputs) & {x for x, _ in shown}
        assert [run(source, x) for x in inputs] == outputs
        assert not problem.files


def test_no_two_problems_of_a_domain_share_a_program():
    answers = [p.metadata["answer"] for p in load_domain("code").problems("train", 3000)]
    assert len(set(answers)) == len(answers)


def test_knobs_change_what_is_shown():
    parameters = {
        "example_inputs": "random",
        "show_positions": True,
        "num_examples": 1,
        "output_separator": "",
        "work": "characters",
        "transforms": [],
        "min_terms": 3,
        "max_terms": 5,
        "length": 9,
    }
    problems = load_domain({"kind": "code", "effort": "think", "parameters": parameters}).problems(
        "train", 50
    )
    for problem in problems:
        shown, output = problem.messages[0]["content"].split(" -> ")
        assert shown[1::2] == "012345678"
        assert problem.demo[0]["reasoning_content"][::2] == output
        assert 3 <= len(output) <= 5
        assert "upper" not in problem.demo[0]["content"]
    assert len({p.messages[0]["content"].split(" -> ")[0] for p in problems}) == 50


def test_thinking_may_be_the_sum_that_the_function_returns():
    settings = {"kind": "code", "effort": "think", "parameters": {"quote_output": True}}
    (problem,) = load_domain(settings).problems("train", 1)
    (demo,) = problem.demo
    assert demo["content"].endswith(f" return ({demo['reasoning_content']})")
    assert problem.messages[0]["content"].count('"') == 16


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"max_terms": 3, "min_terms": 3}, "10648 possible programs, at least 100000"),
        ({"alphabet": "abcdef"}, "more than 6 letters"),
        ({"num_examples": 5}, "5 ordered examples of length 6 need 30 letters"),
        ({"alphabet": "abcdefgA"}, "lower-case"),
        ({"alphabet": "aabcdefgh"}, "distinct"),
        ({"min_terms": 5}, "min_terms 5 is above max_terms 4"),
        ({"literals": "a1"}, "literals"),
        ({"transforms": ["uper"]}, "upper"),
        ({"num_hidden": 4}, "num_hidden"),
        ({"num_term": 4}, "num_term"),
    ],
)
def test_each_mistake_in_the_parameters_is_named(parameters, words):
    with pytest.raises(TaskError, match=words):
        load_domain({"kind": "code", "parameters": parameters})
