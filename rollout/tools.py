"""Built-in tools of an episode: what the model may call, run inside its leased box.

A mistake of the model (unknown tool, bad arguments, a command that fails) is a text that the model sees.
SandboxLost is the one exception that leaves this file: then the box is gone, and the episode with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from consilience.conf.errors import ConfigError, SandboxLost
from consilience.rollout.boxes import Box
from consilience.rollout.dsml import ToolCall
from consilience.sandboxes.protocol import ExecResult, ExecStatus

MAX_READ_BYTES = 1 << 20
TERMINAL = re.compile(
    r"(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)"  # titles, clipboards
    r"|(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"  # colours, the cursor, what is cleared
    r"|\x1b[ -/]*[0-~]?"  # the rest, and what is cut short
)
CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclass(frozen=True, slots=True)
class Tool:
    """A name, what the prompt says about it, its text arguments (all required), and what it does.

    is_repeatable  run twice in a row, it leaves and answers what it would have once
    """

    name: str
    description: str
    parameters: tuple[str, ...]
    run: Callable[..., str]
    is_repeatable: bool = False

    def schema(self) -> dict[str, Any]:
        """The JSON schema that the prompt's tools block shows."""
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {name: {"type": "string"} for name in self.parameters},
                    "required": list(self.parameters),
                },
            },
        }


def _read(box: Box, path: str) -> str:
    return box.read(path, max_bytes=MAX_READ_BYTES).decode("utf-8", "replace")


def _write(box: Box, path: str, content: str) -> str:
    data = content.encode("utf-8")
    box.write(path, data)
    return f"wrote {len(data)} bytes"


# One command of the box, as every tool's call is: `recovery.py` counts them.
_EDIT = """
import json, sys
path, old, new = json.load(sys.stdin)
try:
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
except (OSError, ValueError) as error:
    sys.exit(f"error: {path}: {getattr(error, 'strerror', None) or 'not text'}")
if not old or text.count(old) != 1:
    sys.exit(f"error: {text.count(old) if old else 0} places of {path} hold that text; one must")
with open(path, "w", encoding="utf-8", newline="") as file:
    file.write(text.replace(old, new))
print(f"edited {path}")
"""


def _edit(box: Box, path: str, old: str, new: str) -> str:
    result = box.run_python(_EDIT, stdin=json.dumps([path, old, new]).encode())
    told = result.stderr.decode("utf-8", "replace").strip()
    return told if result.status is ExecStatus.NONZERO and told.startswith("error: ") else _report(result)


def _list(box: Box, path: str) -> str:
    return _report(box.exec(["ls", "-1Ap", "--", path or "."])) or "(empty)"


def _shell(box: Box, command: str) -> str:
    return _report(box.exec(["sh", "-c", command]))


def _python(box: Box, code: str) -> str:
    return _report(box.run_python(code))


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("read", "Read a file.", ("path",), _read, is_repeatable=True),
        Tool("write", "Write a file.", ("path", "content"), _write, is_repeatable=True),
        Tool("edit", "Replace text that a file holds once.", ("path", "old", "new"), _edit),
        Tool("list", "List a folder.", ("path",), _list, is_repeatable=True),
        Tool("shell", "Run a shell command.", ("command",), _shell),
        Tool("python", "Run Python code.", ("code",), _python),
    )
}


def tool_schemas(names: Sequence[str]) -> list[dict[str, Any]]:
    """Schemas of built-in tools, for the `tools` of a system message. ConfigError on an unknown name."""
    unknown = [name for name in names if name not in TOOLS]
    if unknown:
        raise ConfigError(f"unknown tool {', '.join(unknown)}; built in are {', '.join(TOOLS)}")
    return [TOOLS[name].schema() for name in names]


def declare_tools(messages: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Mapping[str, Any]]:
    """`messages` with the built-in tools on the first system message, unless some message declares tools."""
    if not names or any(message.get("tools") for message in messages):
        return list(messages)
    schemas = tool_schemas(names)
    if messages and messages[0].get("role") == "system":
        return [{**messages[0], "tools": schemas}, *messages[1:]]
    return [{"role": "system", "content": "", "tools": schemas}, *messages]


def argument_error(call: ToolCall, names: Sequence[str]) -> str:
    """Why `call` cannot be run, as the text the model sees; "" if it can."""
    if call.name not in names or call.name not in TOOLS:
        return f"error: unknown tool {call.name!r}; tools are {', '.join(names) or 'none'}"
    wanted = TOOLS[call.name].parameters
    for name in call.arguments:
        if name not in wanted:
            return f"error: {call.name} has no argument {name!r}; it takes {', '.join(wanted)}"
    for name in wanted:
        value = call.arguments.get(name)
        if not isinstance(value, str):
            found = "missing" if name not in call.arguments else f"not text but {type(value).__name__}"
            return f"error: argument {name!r} of {call.name} is {found}"
        if "\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value):
            return f"error: argument {name!r} of {call.name} holds characters that are not text"
    return ""


def run_tool(box: Box, call: ToolCall, names: Sequence[str], *, max_chars: int = 2000) -> str:
    """The text that `call` returns to the model, at most about `max_chars` characters.

    SandboxLost when the box is gone; every other failure is the text.
    """
    if error := argument_error(call, names):
        return error
    try:
        text = TOOLS[call.name].run(box, **call.arguments)
    except SandboxLost:
        raise
    except FileNotFoundError:
        text = f"error: no file {call.arguments.get('path')!r}"
    except (OSError, ValueError) as error:
        text = f"error: {type(error).__name__}: {error}"
    return cut(text, max_chars)


def cut(text: str, max_chars: int) -> str:
    """Head and tail of `text`, half each, with the number of characters left out between."""
    if len(text) <= max_chars:
        return text
    head = max_chars // 2
    tail = max_chars - head
    return f"{text[:head]}\n[{len(text) - max_chars} characters cut]\n{text[len(text) - tail :]}"


def plain(text: str) -> str:
    """Without what is an order to a terminal; other control characters than tabs and line ends as \\xNN.

    For whoever reads it, model or human; the log of the box keeps the bytes.
    """
    return CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", TERMINAL.sub("", text))


def _report(result: ExecResult) -> str:
    """What a terminal would have shown, and a last line if the command did not end well."""
    if result.status is ExecStatus.SANDBOX_LOST:
        raise SandboxLost("the box was lost while a command ran")
    text = plain((result.stdout + result.stderr).decode("utf-8", "replace"))
    if result.status is ExecStatus.OK:
        return text
    if result.status is ExecStatus.NONZERO:
        note = f"exit code {result.exit_code}"
    else:
        note = f"stopped: {result.status.value}"
    return f"{text.rstrip()}\n[{note}]".lstrip("\n")
