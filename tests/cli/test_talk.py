"""Answers and the chat loop, over the shipped fake engine."""

import pytest

from consilience.cli.talk import Talker, chat_loop
from consilience.rollout.fake_engine import FakeRolloutEngine
from consilience.rollout.protocol import EOS
from consilience.rollout.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello there, how are you? I am fine. 1 2 3 4 5"] * 4, 400)


def talker(tokenizer: Tokenizer, said: str, **options) -> Talker:
    ids = tuple(tokenizer.encode(said))
    return Talker(FakeRolloutEngine(lambda request, context: ids, **options), tokenizer)


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_answers_come_in_the_order_asked_and_parsed(tokenizer):
    speaking = talker(tokenizer, f"I am fine.{EOS}", max_running=1)
    answers = speaking.answer([ask("hello"), ask("how are you?"), ask("hello")])
    assert [a.text for a in answers] == ["I am fine."] * 3
    assert answers[0].turn is not None
    assert answers[0].turn.content == "I am fine."


def test_an_answer_cut_short_keeps_its_text_and_says_why(tokenizer):
    speaking = talker(tokenizer, "hello there, how are you?")
    speaking.max_tokens = 2
    (answer,) = speaking.answer([ask("hello")])
    assert (answer.finish, answer.num_tokens, answer.turn) == ("length", 2, None)
    assert answer.text


def converse(speaking: Talker, lines: list[str]) -> list[str]:
    written: list[str] = []
    rest = iter(lines)

    def read(_prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    assert chat_loop(speaking, read, written.append) == 0
    return written


def test_a_conversation_carries_what_was_said_and_forgets_on_new(tokenizer):
    lengths: list[int] = []
    ids = tuple(tokenizer.encode(f"I am fine.{EOS}"))

    def reply(_request, context):
        lengths.append(len(context))
        return ids

    speaking = Talker(FakeRolloutEngine(reply), tokenizer)
    assert converse(speaking, ["hello", "", "hello", "/new", "hello"]) == ["I am fine."] * 3
    assert lengths[1] > lengths[0] == lengths[2]


def test_a_line_that_does_not_fit_is_said_so_and_the_chat_goes_on(tokenizer):
    speaking = talker(tokenizer, f"I am fine.{EOS}", max_context=40)
    written = converse(speaking, ["hello " * 60, "hello"])
    assert "/new starts over" in written[0]
    assert written[1] == "I am fine."
