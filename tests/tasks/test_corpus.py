"""Training conversations: prompt and demo in order, a known share of slips; exercises in copying."""

import random

import pytest

from consilience.conf.errors import TaskError
from consilience.rollout.encoding import encode_messages
from consilience.tasks.corpus import base_texts, conversation, join_episodes, sft_examples, with_slip
from consilience.tasks.domain import Problem
from consilience.tasks.fake_domain import FakeDomain
from consilience.tasks.recall import recall_texts
from consilience.tasks.registry import load_domain


def wrong_share(texts):
    finals = [(t.messages[0]["content"], t.messages[-1]["content"]) for t in texts]
    return sum(eval(question.removesuffix("=")) != int(answer) for question, answer in finals) / len(texts)


def test_every_domain_gives_conversations_that_the_prompt_protocol_encodes():
    domains = [load_domain(kind) for kind in ("mathematics", "code", "agent")]
    texts = base_texts(domains, 31, seed=0)
    assert sorted(t.domain for t in texts) == ["agent"] * 10 + ["code"] * 10 + ["mathematics"] * 11
    for text in texts:
        assert text.messages[text.num_prompt]["role"] == "assistant"
        encoded = encode_messages(text.messages, text.effort)
        assert encoded.endswith("<｜end▁of▁sentence｜>")
        assert ("</think>" in encoded) and (
            text.effort == "chat" or text.messages[-1]["reasoning_content"] in encoded
        )


def test_sft_examples_are_the_train_split_from_a_start_on():
    domain = FakeDomain()
    problems = domain.problems("train", 20)
    examples = sft_examples(domain, 5, start=10)
    assert [e.messages[0] for e in examples] == [p.messages[0] for p in problems[10:15]]
    assert wrong_share(examples) == 0
    assert all(e.num_prompt == 1 for e in examples)


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_noise_makes_that_share_of_finals_wrong_and_keeps_their_form(noise):
    texts = base_texts([FakeDomain()], 1000, seed=1, noise={FakeDomain().name: noise})
    assert wrong_share(texts) == pytest.approx(noise, abs=0.001)
    assert all(t.messages[-1]["content"].isdigit() for t in texts)


def test_a_slip_is_one_word_of_the_other_text_at_the_same_place():
    rng = random.Random(0)
    text, other = "return (x[2]+X[3])", "return (x[5]+x[0])"
    seen = {with_slip(text, other, rng) for _ in range(100)}
    assert seen == {"return (x[5]+X[3])", "return (x[2]+x[3])", "return (x[2]+X[0])"}
    assert with_slip("58", "71", rng) == "71"
    assert with_slip("58", "58", rng) is None and with_slip("", "7", rng) is None


def test_noise_of_one_domain_leaves_the_others_alone():
    texts = base_texts([FakeDomain()], 200, seed=1, noise={"another": 1.0})
    assert wrong_share(texts) == 0


def test_recall_is_answered_by_what_stands_in_brackets():
    texts = recall_texts(300, seed=3)
    assert texts == recall_texts(300, seed=3) != recall_texts(300, seed=4)
    for text in texts:
        user, assistant = text.messages
        copied = user["content"].partition("[")[2].partition("]")[0]
        assert assistant["content"] == assistant["reasoning_content"] == copied
        assert text.num_prompt == 1
    assert {len(t.messages[0]["content"].split()) for t in texts} == {3, 4, 7}  # all three phrases
    assert all("reasoning_content" not in t.messages[1] for t in recall_texts(5, seed=3, effort="chat"))


def test_the_same_seed_gives_the_same_texts_and_another_another_order():
    noise = {FakeDomain().name: 0.2}
    first, again, other = (base_texts([FakeDomain()], 100, seed=s, noise=noise) for s in (5, 5, 6))
    assert first == again != other


def test_problems_without_a_demo_and_senseless_numbers_are_refused():
    bare = Problem("1", "d", ({"role": "user", "content": "?"},), {})
    with pytest.raises(TaskError, match="has no worked solution"):
        conversation(FakeDomain(), bare)
    for domains, num, noise in (([], 1, {}), ([FakeDomain()], -1, {}), ([FakeDomain()], 1, {"fake": 1.5})):
        with pytest.raises(TaskError, match="base texts"):
            base_texts(domains, num, 0, noise=noise)


def test_joined_episodes_follow_each_other_under_one_tool_declaration():
    domain = load_domain("agent")
    single = sft_examples(domain, 7)
    joined = join_episodes(single, 3)
    assert len(joined) == 2  # the seventh is left out
    for number, text in enumerate(joined):
        parts = single[3 * number : 3 * number + 3]
        questions = [m["content"] for m in text.messages if m["role"] == "user"]
        assert questions == [m["content"] for part in parts for m in part.messages if m["role"] == "user"]
        assert [m["role"] for m in text.messages].count("system") == 1
        assert text.messages[: text.num_prompt] == parts[0].messages[: parts[0].num_prompt]
        encoded = encode_messages(text.messages, text.effort)
        for part in parts:
            assert part.messages[-1]["content"] in encoded
            # With tools declared, the reasoning of every turn stays in the stream.
            assert all(m["reasoning_content"] in encoded for m in part.messages if m["role"] == "assistant")


def test_every_result_of_a_joined_conversation_answers_a_call_of_its_own_episode():
    (joined,) = join_episodes(sft_examples(load_domain("agent"), 4), 4)
    calls = [c["id"] for m in joined.messages for c in m.get("tool_calls") or ()]
    answers = [m["tool_call_id"] for m in joined.messages if m["role"] == "tool"]
    assert len(set(calls)) == len(calls) >= 8 and answers == calls
    assert {call.partition("_")[0] for call in calls} == {"0", "1", "2", "3"}


def test_examples_without_tools_and_single_episodes_are_returned_as_they_are():
    plain, tooled = sft_examples(FakeDomain(), 5), sft_examples(load_domain("agent"), 3)
    assert join_episodes(plain, 4) == plain
    assert join_episodes(tooled, 1) == tooled
    assert join_episodes([], 4) == []
    assert join_episodes(tooled, 4) == []
    before = sft_examples(load_domain("agent"), 3)
    join_episodes(tooled, 3)
    assert tooled == before  # joining changes no example in place
