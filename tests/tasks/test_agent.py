"""Trails of notes: the value lies only in the box, two dependent calls away."""

import json

import pytest

from consilience.conf.errors import TaskError
from consilience.rollout.encoding import encode_messages
from consilience.rollout.tokenizer import Tokenizer
from consilience.tasks.agent import AgentParameters
from consilience.tasks.registry import load_domain


@pytest.mark.parametrize("parameters", [{}, {"hops": 4, "letters": 2, "value_digits": 4, "distractors": 8}])
def test_following_the_notes_leads_to_the_value_and_nothing_else_does(parameters):
    hops = parameters.get("hops", 2)
    for problem in load_domain({"kind": "agent", "parameters": parameters}).problems("train", 100):
        question = problem.messages[-1]["content"]
        name = _bracketed(question)
        for _ in range(hops - 1):
            name = _bracketed(problem.files[name])
        value = problem.metadata["answer"]
        assert problem.files[name] == f"the number is [{value}]"
        assert sum(_bracketed(text) == value for text in problem.files.values()) == 1
        assert len(problem.files) == hops + parameters.get("distractors", 3)
        prompt = json.dumps(list(problem.messages))
        assert f"[{value}]" not in prompt
        assert f"[{name}]" not in prompt


def _bracketed(text):
    return text.partition("[")[2].partition("]")[0]


def test_the_demo_calls_read_for_each_file_and_answers_with_the_value():
    (problem,) = load_domain("agent").problems("train", 1)
    first, result, second, value, answer = problem.demo
    called = [m["tool_calls"][0]["function"]["arguments"]["path"] for m in (first, second)]
    assert [problem.files[path] for path in called] == [result["content"], value["content"]]
    assert result["content"] == f"see note [{called[1]}]"
    assert value["content"] == f"the number is [{answer['content']}]"
    assert [m["reasoning_content"] for m in (first, second, answer)] == [*called, answer["content"]]
    (silent,) = load_domain({"kind": "agent", "effort": "chat"}).problems("train", 1)
    assert not any("reasoning_content" in m for m in silent.demo)


def test_an_episode_in_the_prompt_protocol_is_at_least_256_tokens():
    domain = load_domain("agent")
    (problem,) = domain.problems("train", 1)
    text = encode_messages([*problem.messages, *problem.demo], domain.effort)
    tokenizer = Tokenizer.train([text], 512)
    assert text.count("<tool_result>") == 2
    assert len(tokenizer.encode(text)) >= 256


def test_the_default_space_has_millions_of_trails():
    assert AgentParameters().num_trails == 260 * 259 * 90


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"digits": 0, "distractors": 20}, "26 file names for 22 files"),
        ({"digits": 0, "value_digits": 1, "distractors": 0}, "at least 20000"),
        ({"hops": 1}, "hops"),
        ({"hops": 8, "hop_reward": 0.15}, "reaches the full reward"),
        ({"distracters": 2}, "did you mean 'distractors'"),
    ],
)
def test_each_mistake_in_the_parameters_is_named(parameters, words):
    with pytest.raises(TaskError, match=words):
        load_domain({"kind": "agent", "parameters": parameters})
