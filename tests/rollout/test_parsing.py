import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ProtocolError
from consilience.rollout.parsing import ParsedTurn, ToolCall, parse_turn
from consilience.rollout.protocol import DSML as D
from consilience.rollout.protocol import EOS

PARAMETER = f'<{D}parameter name="a" string="true">x</{D}parameter>\n'
CALL = f'<{D}invoke name="f">\n{PARAMETER}</{D}invoke>\n'
BLOCK = f"\n\n<{D}tool_calls>\n{CALL}</{D}tool_calls>"


def test_a_plain_turn_and_a_turn_with_a_call():
    assert parse_turn(f"2 + 2</think>4{EOS}", True) == ParsedTurn("2 + 2", "4")
    assert parse_turn(f"4{EOS}", False) == ParsedTurn("", "4")
    assert parse_turn(f"hm</think>ok{BLOCK}{EOS}", True) == ParsedTurn(
        "hm", "ok", (ToolCall("f", {"a": "x"}),)
    )


def test_strings_are_raw_and_the_rest_is_json():
    second = f'<{D}parameter name="b" string="false">{{"k": [1, null]}}</{D}parameter>\n'
    block = BLOCK.replace(PARAMETER, PARAMETER.replace("x", '1 < 2 & "q"\n') + second)
    (call,) = parse_turn(block + EOS, False).tool_calls
    assert call.arguments == {"a": '1 < 2 & "q"\n', "b": {"k": [1, None]}}


def test_a_call_without_parameters_may_have_the_blank_line_of_the_reference_encoder():
    for inside in ("", "\n"):
        text = f'\n\n<{D}tool_calls>\n<{D}invoke name="g">\n{inside}</{D}invoke>\n</{D}tool_calls>{EOS}'
        assert parse_turn(text, False).tool_calls == (ToolCall("g", {}),)


@pytest.mark.parametrize(
    "text, thinking",
    [
        ("no end", False),
        (f"early{EOS}late{EOS}", False),
        (f"no mark{EOS}", True),
        (f"a</think>b</think>c{EOS}", True),
        (f"a<think>b{EOS}", False),
        (f"{BLOCK}</think>x{EOS}", True),
        (f"{BLOCK} and more{EOS}", False),
        (BLOCK[1:] + EOS, False),  # one newline before the block
        (f"\n\n<{D}tool_calls>\n</{D}tool_calls>{EOS}", False),
        (BLOCK.replace(">\n<", "><", 1) + EOS, False),
        (BLOCK.replace("</" + D + "invoke>\n", "</" + D + "invoke>") + EOS, False),
        (BLOCK.replace("</" + D + "tool_calls>", "") + EOS, False),
        (BLOCK.replace('name="f"', "name=f") + EOS, False),
        (BLOCK.replace('name="f"', 'name=""') + EOS, False),
        (BLOCK.replace('string="true"', 'string="yes"') + EOS, False),
        (BLOCK.replace(' string="true"', "") + EOS, False),
        (BLOCK.replace('"true">x', '"false">x') + EOS, False),
        (BLOCK.replace('"true">x', '"false">NaN') + EOS, False),
        (BLOCK.replace('"true">x', '"false">' + "[" * 100_000) + EOS, False),
        (BLOCK.replace('"true">x', '"false">"\\ud800"') + EOS, False),
        (BLOCK.replace('"true">x', '"false">' + "9" * 5000) + EOS, False),
        (BLOCK.replace(f"</{D}parameter>", "") + EOS, False),
        (BLOCK.replace(CALL, CALL.replace(f"</{D}invoke>", "") + CALL) + EOS, False),
        (BLOCK.replace(PARAMETER, PARAMETER * 2) + EOS, False),  # the same name twice
    ],
)  # fmt: skip
def test_anything_malformed_is_an_error_and_never_repaired(text, thinking):
    with pytest.raises(ProtocolError):
        parse_turn(text, thinking)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_turn_either_parses_or_raises_the_typed_error(data):
    text = f"why</think>ok{BLOCK}{EOS}"
    at = data.draw(st.integers(0, len(text)))
    gone = data.draw(st.integers(0, 12))
    put = data.draw(st.sampled_from(["", "\n", "<", D, EOS, '"', "</think>", CALL]))
    damaged = text[:at] + put + text[at + gone :]
    try:
        turn = parse_turn(damaged, True)
    except ProtocolError as error:
        assert str(error)
    else:
        assert D not in turn.content + turn.reasoning and EOS not in turn.content
