"""The strict parser of what the model sampled: it accepts what the encoder writes and repairs nothing.

    turn   := [reasoning "</think>"] content [block] EOS
    block  := "\\n\\n<｜DSML｜tool_calls>\\n" call+ "</｜DSML｜tool_calls>"
    call   := '<｜DSML｜invoke name="' NAME '">\\n' param* "</｜DSML｜invoke>\\n"
    param  := '<｜DSML｜parameter name="' KEY '" string="true|false">' VALUE "</｜DSML｜parameter>\\n"

(v4_post_training.md 5.3.) A call without parameters may have one blank line, as the reference encoder
writes it. A repaired turn would no longer be the tokens that were sampled, hence no repair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from consilience.conf.errors import ProtocolError
from consilience.rollout import protocol as p

_BLOCK_START = f"\n\n<{p.DSML}tool_calls"
_INVOKE = re.compile(f'<{p.DSML}invoke name="([^"\n]+)">\n')
_PARAMETER = re.compile(f'<{p.DSML}parameter name="([^"\n]+)" string="(true|false)">')
_FORBIDDEN = (p.BOS, p.EOS, p.THINK, p.END_THINK, p.DSML)


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made. Values are text where the model said `string="true"`, else parsed JSON."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One assistant turn: reasoning ("" in chat mode), content, and the calls in order."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


def parse_turn(text: str, thinking: bool) -> ParsedTurn:
    """The assistant turn in `text`, which ends with EOS.

    Example: parse_turn("2 + 2</think>4<｜end▁of▁sentence｜>", True) -> ParsedTurn("2 + 2", "4", ()).
    ProtocolError, naming what was found, on anything the grammar above does not produce.
    """
    if not text.endswith(p.EOS):
        raise ProtocolError(f"turn ends with {text[-20:]!r}; it must end with {p.EOS}")
    body, reasoning = text[: -len(p.EOS)], ""
    if thinking:
        reasoning, separator, body = body.partition(p.END_THINK)
        if not separator:
            raise ProtocolError(f"thinking turn without {p.END_THINK}")
    content, separator, block = body.partition(_BLOCK_START)
    for where, piece in (("reasoning", reasoning), ("content", content)):
        for token in _FORBIDDEN:
            if token in piece:
                raise ProtocolError(f"special token {token} inside the {where}")
    return ParsedTurn(reasoning, content, _parse_block(block) if separator else ())


def check_name(name: str, what: str) -> str:
    """`name` if DSML can carry it. ProtocolError if it is empty or holds a quote, newline or DSML mark."""
    if not name or '"' in name or "\n" in name or p.DSML in name:
        raise ProtocolError(f"{what} {name!r}: DSML needs a name without quotes, newlines and {p.DSML}")
    return name


def _parse_block(block: str) -> tuple[ToolCall, ...]:
    """The calls of `block`, the text after its start mark."""
    at = _expect(block, 0, ">\n")
    calls: list[ToolCall] = []
    while not block.startswith(p.CALLS_CLOSE, at):
        head = _INVOKE.match(block, at)
        if head is None:
            raise ProtocolError(
                f"expected a call or the end of the tool block, found {block[at : at + 40]!r}"
            )
        name = check_name(head[1], "tool name")
        at, arguments = _parse_parameters(block, head.end())
        at = _expect(block, at, p.INVOKE_CLOSE + "\n")
        calls.append(ToolCall(name, arguments))
    if not calls:
        raise ProtocolError("tool block without a call")
    if at + len(p.CALLS_CLOSE) != len(block):
        raise ProtocolError(f"text after the tool block: {block[at + len(p.CALLS_CLOSE) :][:40]!r}")
    return tuple(calls)


def _parse_parameters(block: str, at: int) -> tuple[int, dict[str, Any]]:
    """Arguments from position `at`, and where they end."""
    arguments: dict[str, Any] = {}
    if block.startswith("\n", at):
        return at + 1, arguments
    while head := _PARAMETER.match(block, at):
        key = check_name(head[1], "parameter name")
        end = block.find(f"/{p.DSML}parameter", head.end())
        if end < 0 or block[end - 1] != "<" or end == head.end():
            raise ProtocolError(f"parameter {key!r} has no {p.PARAMETER_CLOSE}")
        if key in arguments:
            raise ProtocolError(f"duplicate parameter {key!r}")
        value = block[head.end() : end - 1]
        arguments[key] = value if head[2] == "true" else _parse_json(key, value)
        at = _expect(block, end - 1, p.PARAMETER_CLOSE + "\n")
    return at, arguments


def _expect(block: str, at: int, wanted: str) -> int:
    """The position after `wanted`."""
    if not block.startswith(wanted, at):
        raise ProtocolError(f"expected {wanted!r}, found {block[at : at + 40]!r}")
    return at + len(wanted)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _parse_json(key: str, text: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate could not be written again
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f'parameter {key!r} says string="false" but is not JSON: {error}') from None
    return value
