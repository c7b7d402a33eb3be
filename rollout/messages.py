"""Conversations in message form: what a message may hold, checked, and turns merged for the encoder.

A message is a mapping with `role` and `content`; beside it, where they apply:

    tools, response_format             system, developer
    tool_calls, reasoning_content      assistant
    wo_eos                             assistant: the turn goes on, no end-of-sentence is written
    content_ids                        assistant: the token ids that its content was sampled as
    tool_call_id                       tool
    task                               user, developer, assistant: a quick instruction; only its answer may
                                       follow, and that never thinks (v4_post_training.md 5.5)
    extracted_url                      user, beside task "read_url"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from reprlib import repr as shortened
from typing import Any

from consilience.conf.errors import ProtocolError, ProtocolFault
from consilience.rollout import protocol as p
from consilience.rollout.dsml import ToolCall

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")


def merge_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of the messages, tool results and following user text folded into one user turn.

    A user message then has `blocks`: (text, is_result) in order, results sorted by the calls they answer.
    """
    merged: list[dict[str, Any]] = []
    ids: list[list[str]] = []  # per merged message, the call id of each block ("" for text)
    order: dict[str, int] = {}
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            text = f"message role {shortened(role)}; allowed: {', '.join(ROLES)}"
            raise ProtocolError(ProtocolFault.MESSAGE, text)
        if message.get("tools") and role not in ("system", "developer"):
            text = f"tools are declared on a {role} message; put them on the system message"
            raise ProtocolError(ProtocolFault.TOOLS, text)
        _check_task(message)
        content, _ = message_text(message, "content"), message_text(message, "reasoning_content")
        if role not in ("user", "tool"):
            merged.append(dict(message))
            ids.append([])
            continue
        block = (content, role == "tool")
        call_id = str(message.get("tool_call_id") or "") if role == "tool" else ""
        joins = merged and merged[-1]["role"] == "user" and merged[-1].get("task") is None
        if not joins:
            kept = {key: message[key] for key in ("task", "extracted_url") if key in message}
            merged.append({"role": "user", "blocks": [], **kept})
            ids.append([])
        elif message.get("task") is not None:
            text = (
                f"task {shortened(message['task'])} is on a user message that joins the turn before it; "
                "put the task on the first message of the turn"
            )
            raise ProtocolError(ProtocolFault.TASK, text)
        merged[-1]["blocks"].append(block)
        ids[-1].append(call_id)
    for i, message in enumerate(merged):
        if message["role"] == "assistant" and message.get("tool_calls"):
            order = _call_order(message)
        elif message["role"] == "user" and order:
            message["blocks"] = _in_call_order(message["blocks"], ids[i], order)
    return merged


def message_text(message: Message, key: str) -> str:
    """A message's text; a list of content blocks is joined by blank lines."""
    value = message.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(block, Mapping) for block in value):
        texts = [
            block.get("text", "") if block.get("type") == "text" else f"[Unsupported {block.get('type')}]"
            for block in value
        ]
        if all(isinstance(text, str) for text in texts):
            return "\n\n".join(texts)
    found = type(value).__name__
    message_text = f"{message.get('role')} message: {key} is {found}, must be text or text blocks"
    raise ProtocolError(ProtocolFault.MESSAGE, message_text)


def calls_of(message: Message) -> list[ToolCall]:
    """The tool calls of an assistant message, in order. ProtocolError (CALL, JSON) on what is no call."""
    return [_as_call(call) for call in _listed(message, "tool_calls", ProtocolFault.CALL)]


def schemas_of(message: Message) -> list[Any]:
    """Of each tool the function's schema in {"type": "function", "function": {…}}, or the schema itself."""
    tools = _listed(message, "tools", ProtocolFault.TOOLS)
    schemas = [tool.get("function", tool) if isinstance(tool, Mapping) else tool for tool in tools]
    for schema in schemas:
        if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str) or not schema["name"]:
            text = f"a tool schema is an object with a name; found {shortened(schema)}"
            raise ProtocolError(ProtocolFault.TOOLS, text)
    return schemas


def _check_task(message: Message) -> None:
    """ProtocolError on an unknown quick instruction, or a URL that belongs to none."""
    role, task, url = message["role"], message.get("task"), message.get("extracted_url")
    if task is not None and (not isinstance(task, str) or task not in p.TASK_TOKENS):
        text = f"task {shortened(task)}; known: {', '.join(p.TASK_TOKENS)}"
        raise ProtocolError(ProtocolFault.TASK, text)
    if task is not None and role not in ("user", "developer", "assistant"):
        text = f"task {shortened(task)} on a {role} message; put it on the user's or the assistant's"
        raise ProtocolError(ProtocolFault.TASK, text)
    if url is not None and (role != "user" or task != "read_url" or not isinstance(url, str)):
        text = f"extracted_url {shortened(url)} on a {role} message with task {shortened(task)}; "
        text += 'it is a text on a user message with task "read_url"'
        raise ProtocolError(ProtocolFault.TASK, text)


def _call_order(message: Message) -> dict[str, int]:
    """Call id -> its place among the calls of an assistant message."""
    order: dict[str, int] = {}
    for place, call in enumerate(_listed(message, "tool_calls", ProtocolFault.CALL)):
        if isinstance(call, Mapping):
            function = call.get("function")
            call_id = call.get("id") or (function.get("id") if isinstance(function, Mapping) else None)
            if isinstance(call_id, str) and call_id:
                order[call_id] = place
    return order


def _in_call_order(
    blocks: list[tuple[str, bool]], ids: list[str], order: Mapping[str, int]
) -> list[tuple[str, bool]]:
    """Result blocks take the result slots in the order of their calls (unknown ids first); text stays."""
    slots = [i for i, (_, is_result) in enumerate(blocks) if is_result]
    arranged = list(blocks)
    for slot, source in zip(slots, sorted(slots, key=lambda i: order.get(ids[i], 0))):
        arranged[slot] = blocks[source]
    return arranged


def _listed(message: Message, key: str, fault: ProtocolFault) -> Sequence[Any]:
    value = message.get(key) or ()
    if not isinstance(value, (list, tuple)):
        raise ProtocolError(fault, f"{key} is {type(value).__name__}, must be a list")
    return value


def _as_call(call: Any) -> ToolCall:
    """A call from {"name", "arguments"} or {"function": {…}}; arguments as a mapping or as JSON text."""
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    function = function if isinstance(function, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            text = f"arguments of tool call {shortened(name)} are not JSON: {error}"
            raise ProtocolError(ProtocolFault.JSON, text) from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        text = f"a tool call needs a name and an object of arguments; found {shortened(call)}"
        raise ProtocolError(ProtocolFault.CALL, text)
    return ToolCall(name, arguments)
