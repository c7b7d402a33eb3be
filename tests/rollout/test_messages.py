import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consilience.conf.errors import ProtocolError
from consilience.conf.errors import ProtocolFault as F
from consilience.rollout.dsml import ToolCall
from consilience.rollout.messages import calls_of, merge_turns, message_text, schemas_of


def user(text):
    return {"role": "user", "content": text}


def asking(*ids):
    return {"role": "assistant", "tool_calls": [{"id": i, "function": {"name": "f"}} for i in ids]}


def result(call_id):
    return {"role": "tool", "tool_call_id": call_id, "content": f"of {call_id}"}


def test_results_and_the_text_after_them_are_one_user_turn_in_call_order():
    merged = merge_turns([user("a"), user("b"), asking("x", "y"), result("y"), result("x"), user("c")])
    assert [message["role"] for message in merged] == ["user", "assistant", "user"]
    assert merged[0]["blocks"] == [("a", False), ("b", False)]
    assert merged[2]["blocks"] == [("of x", True), ("of y", True), ("c", False)]


def test_an_id_may_stand_in_the_function_and_a_result_of_no_call_comes_first():
    asked = {"role": "assistant", "tool_calls": [ToolCall("g"), {"function": {"id": "x", "name": "f"}}]}
    (_, turn) = merge_turns([asked, result("x"), result("?")])
    assert turn["blocks"] == [("of ?", True), ("of x", True)]


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 3))
def test_results_take_the_order_of_their_calls_whatever_order_they_came_in(order, at):
    results = [result(f"c{i}") for i in order]
    (_, turn) = merge_turns([asking("c0", "c1", "c2", "c3"), *results[:at], user("and"), *results[at:]])
    expected = [(f"of c{i}", True) for i in range(4)]
    assert turn["blocks"] == [*expected[:at], ("and", False), *expected[at:]]


def test_a_task_ends_its_turn_so_what_follows_starts_another():
    merged = merge_turns([{**user("a"), "task": "query"}, user("b")])
    assert [message["blocks"] for message in merged] == [[("a", False)], [("b", False)]]
    assert merged[0]["task"] == "query"


def test_calls_and_schemas_are_read_in_both_of_their_forms():
    calls = [ToolCall("f", {"a": 1}), {"name": "f", "arguments": {"a": 1}}]
    calls.append({"function": {"name": "f", "arguments": '{"a": 1}'}})
    assert calls_of({"role": "assistant", "tool_calls": calls}) == [ToolCall("f", {"a": 1})] * 3
    assert (
        schemas_of({"tools": [{"name": "f"}, {"type": "function", "function": {"name": "f"}}]})
        == [{"name": "f"}] * 2
    )
    assert calls_of({"role": "assistant"}) == []


def test_blocks_of_text_are_joined_and_others_named():
    blocks = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert message_text({"role": "tool", "content": blocks}, "content") == "a\n\n[Unsupported image]\n\nb"
    assert message_text({"role": "user"}, "content") == ""


def test_what_nests_beyond_any_stack_is_still_a_typed_refusal():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    for broken, fault in (
        ({"role": "assistant", "tool_calls": [{"name": deep}]}, F.CALL),
        ({"role": "assistant", "tool_calls": deep}, F.CALL),
    ):
        with pytest.raises(ProtocolError) as caught:
            calls_of(broken)
        assert caught.value.fault is fault
    with pytest.raises(ProtocolError) as caught:
        merge_turns([{**user("a"), "task": deep}])
    assert caught.value.fault is F.TASK
