import json

import pytest

from consilience.conf.errors import ConfigError, SandboxLost
from consilience.rollout.boxes import FakeBoxes
from consilience.rollout.encoding import encode_messages
from consilience.rollout.parsing import ToolCall
from consilience.rollout.tools import TOOLS, cut, declare_tools, run_tool, tool_schemas
from consilience.sandboxes.blocking import open_blocking
from consilience.sandboxes.protocol import Isolation, SandboxSpec

ALL = tuple(TOOLS)


def box(run=lambda box, argv, stdin: (0, json.dumps([*argv, stdin.decode()]).encode())):
    return FakeBoxes(1, run).lease()


def test_write_then_read_then_list():
    b = box(lambda box, argv, stdin: (0, "\n".join(box.files).encode()))
    assert run_tool(b, ToolCall("write", {"path": "a.txt", "content": "é"}), ALL) == "wrote 2 bytes"
    assert run_tool(b, ToolCall("read", {"path": "a.txt"}), ALL) == "é"
    assert run_tool(b, ToolCall("list", {"path": "."}), ALL) == "a.txt"
    assert "no file 'b.txt'" in run_tool(b, ToolCall("read", {"path": "b.txt"}), ALL)


def test_commands_run_in_a_shell_and_code_in_python():
    assert json.loads(run_tool(box(), ToolCall("shell", {"command": "ls | wc"}), ALL)) == [
        "sh",
        "-c",
        "ls | wc",
        "",
    ]
    assert json.loads(run_tool(box(), ToolCall("python", {"code": "print(1)"}), ALL))[2] == "print(1)"
    failed = box(lambda box, argv, stdin: (3, b"oops\n"))
    assert run_tool(failed, ToolCall("shell", {"command": "x"}), ALL) == "oops\n[exit code 3]"
    silent = box(lambda box, argv, stdin: (1, b""))
    assert run_tool(silent, ToolCall("shell", {"command": "false"}), ALL) == "[exit code 1]"


@pytest.mark.parametrize(
    "call, found",
    [
        (ToolCall("fly", {}), "unknown tool 'fly'"),
        (ToolCall("write", {"path": "a", "content": "b"}), "unknown tool 'write'"),
        (ToolCall("read", {}), "'path' of read is missing"),
        (ToolCall("read", {"path": 3}), "not text but int"),
        (ToolCall("read", {"path": "a", "mode": "r"}), "no argument 'mode'"),
        (ToolCall("read", {"path": "a\0b"}), "characters that are not text"),
        (ToolCall("read", {"path": "\udc80"}), "characters that are not text"),
    ],
)
def test_a_mistake_of_the_model_is_a_text_it_sees(call, found):
    answer = run_tool(box(), call, ("read", "list"))
    assert answer.startswith("error: ") and found in answer


@pytest.mark.parametrize(
    ("printed", "seen"),
    [
        (b"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[?25l", "red"),
        (b"a\x1b]52;c;aGk=\x07b\x1b]0;title\x1b\\c", "abc"),
        (b"a\x1bP1$tx\x1b\\b\x1b(Bc\x1b7d\x1b", "abcd"),
        (b"a\xc2\x9b1;1Hb\xc2\x9d0;t\xc2\x9cc", "abc"),
        (b"a\x1b]never ended\x1b[0m", "anever ended"),
        (b"a\0b\x08\x7f\t\r\n.", "a\\x00b\\x08\\x7f\t\r\n."),
        (b"\xe2\x82", "\ufffd"),
        (b"\x1b[" * 100_000, ""),
        ("täglich ✓ <|im_end|>".encode(), "täglich ✓ <|im_end|>"),
    ],
)
def test_output_gives_no_orders_to_a_terminal(printed, seen):
    printing = box(lambda box, argv, stdin: (0, printed))
    assert run_tool(printing, ToolCall("shell", {"command": "x"}), ALL) == seen


def test_output_is_cut_in_the_middle():
    assert cut("a" * 50 + "b" * 50, 10) == "aaaaa\n[90 characters cut]\nbbbbb"
    assert cut("short", 10) == "short" and cut("abc", 1).endswith("c")
    long = box(lambda box, argv, stdin: (0, b"x" * 9000))
    assert len(run_tool(long, ToolCall("shell", {"command": "yes"}), ALL, max_chars=100)) < 140


def test_a_lost_box_is_not_an_answer():
    b = box()
    b.is_lost = True
    with pytest.raises(SandboxLost):
        run_tool(b, ToolCall("read", {"path": "a"}), ALL)


def test_schemas_go_onto_the_system_message_once():
    user = {"role": "user", "content": "U"}
    declared = declare_tools([{"role": "system", "content": "S"}, user], ("read",))
    assert declared[0]["content"] == "S" and declared[0]["tools"] == tool_schemas(["read"])
    assert declare_tools(declared, ("shell",)) == declared
    assert declare_tools([user], ("read",))[0]["role"] == "system"
    assert declare_tools([user], ()) == [user]
    assert '"required": ["path", "content"]' in encode_messages(declare_tools([user], ("write",)))
    with pytest.raises(ConfigError, match="teleport"):
        declare_tools([user], ("teleport",))


def test_an_edit_replaces_what_is_there_once_and_says_what_is_not():
    spec = SandboxSpec(driver="insecure_subprocess", min_isolation=Isolation.NONE, allow_insecure=True)
    b = open_blocking(spec)
    try:
        b.write("a.py", b"x = 1\r\ny = 1\n")
        edit = lambda old, new, path="a.py": run_tool(
            b, ToolCall("edit", {"path": path, "old": old, "new": new}), ALL
        )
        assert edit("x = 1", "x = '\u00e9'") == "edited a.py\n"
        assert b.read("a.py") == "x = '\u00e9'\r\ny = 1\n".encode()
        assert edit("z", "w") == "error: 0 places of a.py hold that text; one must"
        assert edit("=", "w") == "error: 2 places of a.py hold that text; one must"
        assert edit("", "w").startswith("error: 0 places")
        assert edit("x", "y", "none.py") == "error: none.py: No such file or directory"
        assert b.read("a.py") == "x = '\u00e9'\r\ny = 1\n".encode()
    finally:
        b.destroy()
