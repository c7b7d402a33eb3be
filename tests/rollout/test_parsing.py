import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ProtocolError
from consilience.conf.errors import ProtocolFault as F
from consilience.rollout.dsml import ToolCall
from consilience.rollout.parsing import ParsedTurn, parse_turn
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


@pytest.mark.parametrize(
    "text, thinking, fault",
    [
        ("", False, F.NO_END),
        ("no end", False, F.NO_END),
        (f"early{EOS}late{EOS}", False, F.SPECIAL_TOKEN),
        (f"no mark{EOS}", True, F.NO_END_THINK),
        (f"a</think>b</think>c{EOS}", True, F.SPECIAL_TOKEN),
        (f"a<think>b{EOS}", False, F.SPECIAL_TOKEN),
        (f"{BLOCK}</think>x{EOS}", True, F.SPECIAL_TOKEN),
        (f"{BLOCK} and more{EOS}", False, F.BLOCK),
        (BLOCK[1:] + EOS, False, F.SPECIAL_TOKEN),  # one newline before the block
        (f"\n\n<{D}tool_calls>\n</{D}tool_calls>{EOS}", False, F.BLOCK),
        (BLOCK.replace(">\n<", "><", 1) + EOS, False, F.BLOCK),
        (BLOCK.replace("</" + D + "tool_calls>", "") + EOS, False, F.BLOCK),
    ],
)  # fmt: skip
def test_anything_malformed_is_an_error_with_its_fault_and_never_repaired(text, thinking, fault):
    with pytest.raises(ProtocolError) as caught:
        parse_turn(text, thinking)
    assert caught.value.fault is fault and str(caught.value)


def test_the_typed_error_survives_the_way_between_processes():
    with pytest.raises(ProtocolError) as caught:
        parse_turn("no end", False)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.fault, str(copy)) == (F.NO_END, str(caught.value))


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
