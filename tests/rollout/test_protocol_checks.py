import pytest

from consilience.conf.errors import ConfigError
from consilience.rollout import protocol as p
from consilience.rollout.fake_worker import byte_tokenizer
from consilience.rollout.protocol_checks import BrokenPromise, Reference, check
from consilience.rollout.tokenizer import Tokenizer

TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": f"hi{p.USER}"}
CALLS = [{"id": "c", "function": {"name": "f", "arguments": '{"a": [1, "\\u00e9"]}'}}]
ANSWER = {"role": "assistant", "content": "A", "reasoning_content": "R", "tool_calls": CALLS}
RESULT = {"role": "tool", "tool_call_id": "c", "content": "1"}
CALL = f'<{p.DSML}invoke name="f">\n</{p.DSML}invoke>\n'

# A released encoder in miniature: of one conversation, and with a parser that reads everything as one turn.
REFERENCE = """
REASONING_EFFORT_PROMPTS = {{}}
def encode_messages(messages, thinking_mode, drop_thinking, reasoning_effort):
    return {text!r}
def parse_message_from_completion_text(text, thinking_mode):
    return {{"reasoning_content": "", "content": {content!r}, "tool_calls": []}}
"""


def conversation(*messages, effort="think", family="official"):
    kinds = {"kind": "conversation", "effort": effort, "family": family, "drop_thinking": True}
    return {**kinds, "messages": list(messages)}


def turn(text, thinking=False):
    return {"kind": "turn", "text": text, "thinking": thinking}


def test_what_keeps_every_promise_is_accepted_and_what_is_refused_names_its_fault():
    assert check(conversation(USER, ANSWER, RESULT, ANSWER), TOKENIZER) == "accepted"
    assert check(conversation({"role": "robot"}), TOKENIZER) == "message"
    assert check(turn("a</think>b" + p.EOS, True), TOKENIZER) == "accepted"
    assert (
        check(turn(f"\n\n<{p.DSML}tool_calls>\n{CALL}</{p.DSML}tool_calls>{p.EOS}"), TOKENIZER) == "accepted"
    )
    assert check(turn("a"), TOKENIZER) == "no_end"
    assert check({"kind": "tokens", "ids": [*TOKENIZER.encode("a"), 9999, 1]}, TOKENIZER) == "accepted"
    assert check({"kind": "parts", "parts": [[p.USER, False], [p.USER, True]]}, TOKENIZER) == "accepted"


def test_a_tokenizer_that_trusts_everything_breaks_a_promise():
    class Trusting(Tokenizer):
        def encode_parts(self, parts):
            return super().encode_parts([("".join(part[0] for part in parts), True)])

    tokenizer = Trusting(TOKENIZER._serialized)
    with pytest.raises(BrokenPromise, match="special token"):
        check({"kind": "parts", "parts": [[p.USER, False]]}, tokenizer)
    with pytest.raises(BrokenPromise, match="special token"):
        check(conversation(USER), tokenizer)


def test_a_tokenizer_that_loses_text_breaks_a_promise():
    class Losing(Tokenizer):
        def decode(self, ids):
            return super().decode(ids).replace("A", "")

    with pytest.raises(BrokenPromise, match="another text"):
        check(conversation(USER, ANSWER), Losing(TOKENIZER._serialized))


def test_a_reference_that_disagrees_breaks_a_promise_and_one_of_another_family_is_not_asked(tmp_path):
    file = tmp_path / "encoding_dsv4.py"
    text = f"{p.BOS}{p.USER}U{p.ASSISTANT}{p.THINK}"
    file.write_text(REFERENCE.format(text=text, content="a"))
    reference = Reference(file)
    assert reference.family == "official"
    agreed = conversation({"role": "user", "content": "U"})
    other = conversation({"role": "user", "content": "V"})
    assert check(agreed, TOKENIZER, reference) == check(turn("a" + p.EOS), TOKENIZER, reference) == "accepted"
    assert check({**other, "family": "preview"}, TOKENIZER, reference) == "accepted"
    with pytest.raises(BrokenPromise, match="encodes to"):
        check(other, TOKENIZER, reference)
    with pytest.raises(BrokenPromise, match="reads"):
        check(turn("b" + p.EOS), TOKENIZER, reference)
    with pytest.raises(ConfigError, match="no such"):
        Reference(tmp_path / "missing.py")
