"""Training conversations: prompt and demo in order, a known share of wrong finals."""

import pytest

from consilience.conf.errors import TaskError
from consilience.rollout.encoding import encode_messages
from consilience.tasks.corpus import base_texts, conversation, sft_examples
from consilience.tasks.domain import Problem
from consilience.tasks.fake_domain import FakeDomain
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
    texts = base_texts([FakeDomain()], 1000, seed=1, noise=noise)
    assert wrong_share(texts) == pytest.approx(noise, abs=0.001)
    assert all(t.messages[-1]["content"].isdigit() for t in texts)


def test_the_same_seed_gives_the_same_texts_and_another_another_order():
    first, again, other = (base_texts([FakeDomain()], 100, seed=s, noise=0.2) for s in (5, 5, 6))
    assert first == again != other


def test_problems_without_a_demo_and_senseless_numbers_are_refused():
    bare = Problem("1", "d", ({"role": "user", "content": "?"},), {})
    with pytest.raises(TaskError, match="has no worked solution"):
        conversation(FakeDomain(), bare)
    for domains, num, noise in (([], 1, 0.0), ([FakeDomain()], -1, 0.0), ([FakeDomain()], 1, 1.5)):
        with pytest.raises(TaskError, match="base texts"):
            base_texts(domains, num, 0, noise=noise)
