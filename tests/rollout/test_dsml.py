import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ProtocolError
from consilience.conf.errors import ProtocolFault as F
from consilience.rollout import protocol as p
from consilience.rollout.dsml import BLOCK_START, MAX_JSON_DEPTH, ToolCall, parse_block, render_calls, to_json
from consilience.rollout.parsing import parse_turn

D = p.DSML
PARAMETER = f'<{D}parameter name="a" string="true">x</{D}parameter>\n'
CALL = f'<{D}invoke name="f">\n{PARAMETER}</{D}invoke>\n'


def block(calls):
    """What follows BLOCK_START."""
    return f">\n{calls}</{D}tool_calls>"


def json_block(value):
    return block(CALL.replace('"true">x', f'"false">{value}'))


def written(calls):
    return "".join(text for text, _ in render_calls(calls)).removeprefix(BLOCK_START)


def test_a_call_is_written_and_read_as_the_grammar_says():
    call = ToolCall("f", {"a": 'x"<y\n', "b": [1, "é"], "c": None})
    text = (
        f'<{D}invoke name="f">\n<{D}parameter name="a" string="true">x"<y\n</{D}parameter>\n'
        f'<{D}parameter name="b" string="false">[1, "é"]</{D}parameter>\n'
        f'<{D}parameter name="c" string="false">null</{D}parameter>\n</{D}invoke>\n'
    )
    assert written([call]) == block(text)
    assert parse_block(block(text + CALL)) == (call, ToolCall("f", {"a": "x"}))


def test_names_and_values_are_not_trusted():
    pieces = render_calls([ToolCall("f", {p.USER: p.EOS, "k": {p.THINK: 1}})])
    untrusted = [text for text, is_trusted in pieces if not is_trusted]
    assert untrusted == ['"f"', f'"{p.USER}"', p.EOS, '"k"', f'{{"{p.THINK}": 1}}']


def test_three_other_spellings_mean_the_same_call():
    empty = f'<{D}invoke name="g">\n\n</{D}invoke>\n'
    assert written([ToolCall("g")]) == block(empty)
    assert (
        parse_block(block(empty)) == parse_block(block(empty.replace("\n\n", "\n"))) == (ToolCall("g", {}),)
    )
    (call,) = parse_block(json_block(' {"k":[1,2.50,"\\u00e9"]} '))
    assert call == ToolCall("f", {"a": {"k": [1, 2.5, "é"]}})
    assert parse_block(json_block('"x"')) == parse_block(block(CALL))


@pytest.mark.parametrize(
    "text, fault",
    [
        (block(""), F.BLOCK),
        (CALL, F.BLOCK),
        (block(CALL) + " ", F.BLOCK),
        (block(CALL.replace('name="f"', "name=f")), F.BLOCK),
        (block(CALL.replace('name="f"', 'name=""')), F.BLOCK),
        (block(CALL.replace('name="f"', f'name="{D}"')), F.NAME),
        (block(CALL.replace(f"</{D}invoke>\n", f"</{D}invoke>")), F.CALL),
        (block(CALL.replace(f"</{D}invoke>", "") + CALL), F.CALL),
        (block(CALL.replace('string="true"', 'string="yes"')), F.CALL),
        (block(CALL.replace(' string="true"', "")), F.CALL),
        (block(CALL.replace(f"</{D}parameter>", "")), F.PARAMETER),
        (block(CALL.replace(f"x</{D}parameter>", f"/{D}parameter>")), F.PARAMETER),
        (block(CALL.replace(f"x</{D}parameter>", f"x/{D}parameter></{D}parameter>")), F.PARAMETER),
        (block(CALL.replace(PARAMETER, PARAMETER[:-1])), F.PARAMETER),
        (block(CALL.replace(PARAMETER, PARAMETER * 2)), F.DUPLICATE),
        (json_block("x"), F.JSON),
        (json_block(""), F.JSON),
        (json_block("NaN"), F.JSON),
        (json_block("[-Infinity]"), F.JSON),
        (json_block("1e999"), F.JSON),  # Python reads infinity, which nothing could write
        (json_block('{"k": 1, "k": 2}'), F.JSON),
        (json_block('"\\ud800"'), F.JSON),
        (json_block("9" * 5000), F.JSON),
        (json_block("[" * (MAX_JSON_DEPTH + 1) + "]" * (MAX_JSON_DEPTH + 1)), F.JSON),
        (json_block("[" * 100_000), F.JSON),
        (json_block(f'"\\u002f{D}parameter"'), F.PARAMETER),  # readable, but nothing could write it
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_its_fault(text, fault):
    with pytest.raises(ProtocolError) as caught:
        parse_block(text)
    assert caught.value.fault is fault


@pytest.mark.parametrize(
    "name, arguments, fault",
    [
        ("", {}, F.NAME),
        ('a"b', {}, F.NAME),
        ("f", {"a\nb": 1}, F.NAME),
        ("f", {D: 1}, F.NAME),
        ("f", {1: 1}, F.NAME),
        ("f", {"a": p.PARAMETER_CLOSE}, F.PARAMETER),
        ("f", {"a": [p.PARAMETER_CLOSE]}, F.PARAMETER),
        ("f", {"a": {1, 2}}, F.JSON),
        ("f", {"a": ["\ud800"]}, F.JSON),
        ("f", {"a": json.loads("[" * 101 + "]" * 101)}, F.JSON),
    ],
)
def test_what_dsml_cannot_carry_is_not_written(name, arguments, fault):
    with pytest.raises(ProtocolError) as caught:
        render_calls([ToolCall(name, arguments)])
    assert caught.value.fault is fault


def test_json_has_no_nan_at_any_depth_and_a_depth_of_its_own():
    for value in (float("nan"), [float("inf")], {"k": [{"k": float("-inf")}]}):
        with pytest.raises(ProtocolError, match="finite"):
            to_json(value)
    deepest = json.loads("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)
    assert json.loads(to_json(deepest)) == deepest


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
tricky = st.lists(st.sampled_from([*p.SPECIAL_TOKENS, "<", "</", "｜", "\n", '"', ">", "invoke"]) | text).map(
    "".join
)
names = text.filter(lambda name: name and not set(name) & {'"', "\n"} and D not in name)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | tricky,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(tricky, inner, max_size=3),
    max_leaves=6,
)
all_calls = st.lists(
    st.builds(ToolCall, names, st.dictionaries(names, values, max_size=3)), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(all_calls)
def test_reading_inverts_writing_in_every_type(calls):
    try:
        text = written(calls)
    except ProtocolError as error:
        assert error.fault is F.PARAMETER and f"/{D}parameter" in repr(calls)
        return
    read = parse_block(text)
    assert repr(read) == repr(tuple(calls))  # 1, 1.0 and True are equal, their spellings are not
    assert written(read) == text


def _calls(line, count):
    return BLOCK_START + block(f'<{D}invoke name="f">\n' + line * count + f"</{D}invoke>\n") + p.EOS


HOSTILE = {
    "open brackets": lambda n: "<" * n + p.EOS,
    "newlines": lambda n: "\n" * n + p.EOS,
    "marks": lambda n: D * n + p.EOS,
    "ends": lambda n: p.END_THINK * n + p.EOS,
    "blocks": lambda n: (BLOCK_START + ">\n") * n + p.EOS,
    "heads": lambda n: BLOCK_START + ">\n" + f'<{D}invoke name="f">\n' * n + p.EOS,
    "half heads": lambda n: BLOCK_START + ">\n" + f'<{D}invoke name="' * n + p.EOS,
    "long name": lambda n: BLOCK_START + f'>\n<{D}invoke name="' + "x" * n + p.EOS,
    "calls": lambda n: BLOCK_START + block(CALL * n) + p.EOS,
    "parameters": lambda n: _calls("".join(PARAMETER.replace('"a"', f'"{i}"') for i in range(n)), 1),
    "parameter heads": lambda n: _calls(f'<{D}parameter name="a" string="true">', n),
    "parameter marks": lambda n: _calls(f"/{D}parameter", n),
    "open lists": lambda n: BLOCK_START + json_block("[" * n) + p.EOS,
    "nested lists": lambda n: BLOCK_START + json_block("[" * n + "]" * n) + p.EOS,
    "long list": lambda n: BLOCK_START + json_block("[" + "1," * n + "1]") + p.EOS,
    "keys": lambda n: BLOCK_START + json_block(json.dumps({str(i): i for i in range(n)})) + p.EOS,
    "digits": lambda n: BLOCK_START + json_block("9" * n) + p.EOS,
    "decimals": lambda n: BLOCK_START + json_block("1." + "3" * n) + p.EOS,
    "exponent": lambda n: BLOCK_START + json_block("1e" + "3" * n) + p.EOS,
    "escapes": lambda n: BLOCK_START + json_block('"' + "\\u0041" * n + '"') + p.EOS,
}  # fmt: skip


def _cpu_s(text):
    best = float("inf")
    for _ in range(3):
        began = time.process_time()
        for thinking in (True, False):
            try:
                parse_turn(text, thinking)
            except ProtocolError:
                continue
        best = min(best, time.process_time() - began)
    return best


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_reading_takes_time_linear_in_the_text(make):
    """Eight times the text takes eight times as long; sixteen leaves room for caches, 64 would be squared."""
    small = make(5_000)
    large = make(40_000)
    assert _cpu_s(large) < 16 * _cpu_s(small) + 0.02
