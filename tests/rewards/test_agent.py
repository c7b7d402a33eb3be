"""The agent judge: the right number counts only after both files were really read."""

import pytest

from consilience.rewards.agent import score
from consilience.rewards.interface import Completion, ToolCall

CHAIN = [{"path": "b7", "text": "see note [q4]"}, {"path": "q4", "text": "the number is [58]"}]
FIRST = ToolCall("read", {"path": "b7"}, "see note [q4]")
SECOND = ToolCall("read", {"path": "q4"}, "the number is [58]")
ASTRAY = ToolCall("read", {"path": "zz"}, "error: no file 'zz'")


def marks(calls, text="58", hop_reward=0.0):
    metadata = {"answer": "58", "chain": CHAIN, "hop_reward": hop_reward}
    return score(Completion(text, "", (), tuple(calls), "stop"), prompt="", metadata=metadata, sandbox=None)


def test_both_reads_and_the_number_are_worth_everything():
    assert marks([FIRST, SECOND]) == {"reward": 1.0, "correct": 1.0, "read": 1.0}
    assert marks([ASTRAY, FIRST, ASTRAY, FIRST, SECOND], " 58\n")["reward"] == 1.0
    assert marks([ToolCall("read", {"path": "./b7"}, "see note [q4]\n"), SECOND])["reward"] == 1.0


@pytest.mark.parametrize(
    ("calls", "read"),
    [
        ([], 0.0),
        ([FIRST], 0.5),
        ([SECOND], 0.0),
        ([SECOND, FIRST], 0.5),
        ([FIRST, ToolCall("read", {"path": "q4"}, None)], 0.5),
        ([FIRST, ToolCall("read", {"path": "q4"}, "error: no file 'q4'")], 0.5),
        ([FIRST, ToolCall("list", {"path": "q4"}, "the number is [58]")], 0.5),
        ([FIRST, ToolCall("read", {"path": 4}, "the number is [58]")], 0.5),
        ([FIRST, ToolCall("read", {}, "the number is [58]")], 0.5),
    ],
)
def test_the_right_number_without_the_reading_is_worth_nothing(calls, read):
    assert marks(calls) == {"reward": 0.0, "correct": 0.0, "read": read}


@pytest.mark.parametrize("text", ["57", "", "the number is 58", "5 8", "[58]"])
def test_another_text_is_wrong(text):
    assert marks([FIRST, SECOND], text)["reward"] == 0.0


def test_hops_are_paid_only_where_the_domain_says_so_and_less_than_the_answer():
    assert marks([FIRST], "57", 0.1)["reward"] == pytest.approx(0.1)
    assert marks([FIRST, SECOND], "57", 0.1) == {"reward": pytest.approx(0.2), "correct": 0.0, "read": 1.0}
    assert marks([FIRST, SECOND], "58", 0.1)["reward"] == 1.0
