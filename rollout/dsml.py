"""DSML, the markup of tool calls: what the encoder writes and the parser reads, and nothing else.

    block  := "\\n\\n<｜DSML｜tool_calls>\\n" call+ "</｜DSML｜tool_calls>"
    call   := '<｜DSML｜invoke name="' NAME '">\\n' param* "</｜DSML｜invoke>\\n"
    param  := '<｜DSML｜parameter name="' KEY '" string="true|false">' VALUE "</｜DSML｜parameter>\\n"

(v4_post_training.md 5.3.) It only looks like XML: a text VALUE is raw and nothing has an escape, so what
would close a parameter early is refused by both sides. Reading repairs nothing. It takes three spellings
that writing does not produce, since each means exactly one value: JSON spaced or escaped otherwise, a
text as JSON under string="false", and a call without parameters that lacks the blank line which the
released encoders write into it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any

from consilience.conf.errors import ProtocolError, ProtocolFault
from consilience.rollout import protocol as p

BLOCK_START = f"\n\n<{p.DSML}tool_calls"
MAX_JSON_DEPTH = 100  # far below what recursion allows, so that no caller's stack decides

_INVOKE = re.compile(f'<{p.DSML}invoke name="([^"\n]+)">\n')
_PARAMETER = re.compile(f'<{p.DSML}parameter name="([^"\n]+)" string="(true|false)">')
_PARAMETER_MARK = f"/{p.DSML}parameter"
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made. Values are text where the model said `string="true"`, else parsed JSON."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def render_calls(calls: Sequence[ToolCall]) -> list[tuple[str, bool]]:
    """The tool block of `calls` (not empty) as (text, is_trusted) pieces; only the markup is trusted.

    ProtocolError (NAME, JSON, PARAMETER) on what DSML cannot carry.
    """
    pieces = [("\n\n" + p.CALLS_OPEN, True)]
    for call in calls:
        name = check_name(call.name, "tool name")
        pieces += [(f"<{p.DSML}invoke name=", True), (f'"{name}"', False), (">", True)]
        for key, value in call.arguments.items():
            kind = "true" if isinstance(value, str) else "false"
            pieces += [
                (f"\n<{p.DSML}parameter name=", True),
                (f'"{check_name(key, "parameter name")}"', False),
                (f' string="{kind}">', True),
                (_value_text(value, f"argument {key!r} of {name}"), False),
                (p.PARAMETER_CLOSE, True),
            ]
        pieces.append((("\n" if call.arguments else "\n\n") + p.INVOKE_CLOSE + "\n", True))
    return [*pieces, (p.CALLS_CLOSE, True)]


def parse_block(block: str) -> tuple[ToolCall, ...]:
    """The calls of `block`, the text after BLOCK_START. ProtocolError on anything but the grammar above."""
    at = _expect(block, 0, ">\n", ProtocolFault.BLOCK)
    calls: list[ToolCall] = []
    while not block.startswith(p.CALLS_CLOSE, at):
        head = _INVOKE.match(block, at)
        if head is None:
            found = block[at : at + 40]
            raise ProtocolError(ProtocolFault.BLOCK, f"expected a call or the block's end, found {found!r}")
        name = check_name(head[1], "tool name")
        at, arguments = _parse_parameters(block, head.end())
        at = _expect(block, at, p.INVOKE_CLOSE + "\n", ProtocolFault.CALL)
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise ProtocolError(ProtocolFault.BLOCK, "tool block without a call")
    if at + len(p.CALLS_CLOSE) != len(block):
        found = block[at + len(p.CALLS_CLOSE) :][:40]
        raise ProtocolError(ProtocolFault.BLOCK, f"text after the tool block: {found!r}")
    return tuple(calls)


def check_name(name: Any, what: str) -> str:
    """`name` if DSML can carry it. ProtocolError unless it is text without quote, newline and DSML mark."""
    if not isinstance(name, str) or not name or '"' in name or "\n" in name or p.DSML in name:
        text = f"{what} {shortened(name)}: DSML needs a name without quotes, newlines and {p.DSML}"
        raise ProtocolError(ProtocolFault.NAME, text)
    return name


def to_json(value: Any) -> str:
    """JSON as the protocol writes it: Unicode as it is, ", " and ": ".

    ProtocolError on what is not JSON: other types, NaN and infinities, lone surrogates, nesting beyond
    MAX_JSON_DEPTH.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise ProtocolError(ProtocolFault.JSON, f"JSON nested more than {MAX_JSON_DEPTH} deep")
        level = [inner for outer in level for inner in _inner(outer)]
    try:
        text = _ENCODER.encode(value)
        text.encode()  # a lone surrogate could not be written
    except (TypeError, ValueError) as error:
        message = f"not JSON: {error}; use plain dicts, lists, finite numbers and text"
        raise ProtocolError(ProtocolFault.JSON, message) from None
    return text


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else ()


def _value_text(value: Any, what: str) -> str:
    text = value if isinstance(value, str) else to_json(value)
    if _PARAMETER_MARK in text:
        message = f"{what} holds a DSML parameter mark, which has no escape"
        raise ProtocolError(ProtocolFault.PARAMETER, message)
    return text


def _parse_parameters(block: str, at: int) -> tuple[int, dict[str, Any]]:
    """Arguments from position `at`, and where they end."""
    arguments: dict[str, Any] = {}
    if block.startswith("\n", at):
        return at + 1, arguments
    while head := _PARAMETER.match(block, at):
        key = check_name(head[1], "parameter name")
        end = block.find(_PARAMETER_MARK, head.end()) - 1
        if end < head.end() or block[end] != "<":
            message = f"parameter {key!r} has no {p.PARAMETER_CLOSE}"
            raise ProtocolError(ProtocolFault.PARAMETER, message)
        if key in arguments:
            raise ProtocolError(ProtocolFault.DUPLICATE, f"duplicate parameter {key!r}")
        value = block[head.end() : end]
        arguments[key] = value if head[2] == "true" else _parse_json(key, value)
        at = _expect(block, end, p.PARAMETER_CLOSE + "\n", ProtocolFault.PARAMETER)
    return at, arguments


def _expect(block: str, at: int, wanted: str, fault: ProtocolFault) -> int:
    """The position after `wanted`."""
    if not block.startswith(wanted, at):
        raise ProtocolError(fault, f"expected {wanted!r}, found {block[at : at + 40]!r}")
    return at + len(wanted)


def _parse_json(key: str, text: str) -> Any:
    """The value of `text`, which `to_json` could write again."""
    try:
        value = _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        message = f'parameter {key!r} says string="false" but is not JSON: {error}'
        raise ProtocolError(ProtocolFault.JSON, message) from None
    if _PARAMETER_MARK in to_json(value):
        raise ProtocolError(ProtocolFault.PARAMETER, f"parameter {key!r} hides a DSML parameter mark")
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that names a key twice would lose a value without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
