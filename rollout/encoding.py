"""V4's prompt protocol: messages in, text out, as parts that say what may act as a special token.

There is no template: the encoding is code (v4_model.md 13.2, v4_post_training.md 5). A message is a
mapping with `role` ("system", "user", "assistant", "tool", "developer", "latest_reminder") and `content`;
beside it, where they apply: `tools`, `response_format` (system, developer), `tool_calls`,
`reasoning_content`, `wo_eos` (assistant), `tool_call_id` (tool), `task` (user, developer, assistant).

A `Part` is trusted when this module wrote it. Content that came from a user, a tool or a model is not, so
`<｜User｜>` inside it stays plain text once it is tokenised (rollout/tokenizer.py `encode_parts`).
The parser of model output is rollout/parsing.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from consilience.conf.errors import ProtocolError
from consilience.rollout import protocol as p
from consilience.rollout.parsing import ParsedTurn, ToolCall, check_name, parse_turn

__all__ = [
    "ParsedTurn",
    "Part",
    "ToolCall",
    "continue_with_tool_results",
    "encode_messages",
    "is_thinking",
    "parse_turn",
    "render_assistant",
    "render_messages",
    "render_tool_results",
    "text_of",
]

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")


class Part(NamedTuple):
    """A piece of prompt text.

    is_trusted  written by the encoder: special tokens in it are special tokens
    is_target   sampled by the model in this turn (SFT's loss tokens, end-of-sentence included)
    """

    text: str
    is_trusted: bool
    is_target: bool = False


def text_of(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts)


def is_thinking(effort: str, family: str = "official") -> bool:
    """Whether `effort` is a thinking mode. ProtocolError on an effort the family does not have."""
    _effort_prefix(effort, family)
    return effort != "chat"


def encode_messages(messages: Sequence[Message], effort: str = "chat", **options: Any) -> str:
    """`render_messages` as one string."""
    return text_of(render_messages(messages, effort, **options))


def render_messages(
    messages: Sequence[Message],
    effort: str = "chat",
    *,
    family: str = "official",
    drop_thinking: bool = True,
    add_bos: bool = True,
) -> list[Part]:
    """The whole conversation as parts, ready for the model to go on where its turn is next.

    effort         "chat", or a thinking mode: "think" (default effort), "low", "high", "max"
    family         which prefixes the efforts have: "preview" or "official" (v4_model.md 13.3)
    drop_thinking  forget the reasoning of turns before the last user message; forced off once any
                   message declares tools
    ProtocolError on a message that the protocol cannot express.
    """
    prefix = _effort_prefix(effort, family)
    thinking = effort != "chat"
    merged = _merge_tool_results(messages)
    keeps_all = not drop_thinking or any(m.get("tools") for m in merged)
    if thinking and not keeps_all:
        last = _last_user(merged)
        merged = [m for i, m in enumerate(merged) if m["role"] != "developer" or i >= last]
    last = _last_user(merged)
    parts = [Part(p.BOS, True)] if add_bos else []
    if merged and prefix:
        parts.append(Part(prefix, True))
    for i, message in enumerate(merged):
        if message["role"] == "assistant":
            after_task = i > 0 and merged[i - 1].get("task") is not None
            keeps_thinking = thinking and not after_task and (keeps_all or i > last)
            is_target = not thinking or after_task or keeps_thinking
            parts += render_assistant(message, keeps_thinking, is_target=is_target)
        else:
            parts += _render_input(message)
        following = merged[i + 1]["role"] if i + 1 < len(merged) else None
        if following in (None, "assistant", "latest_reminder"):
            parts += _transition(message, thinking, thinking and (keeps_all or i >= last))
    return [part for part in parts if part.text]


def render_assistant(message: Message, thinking: bool, *, is_target: bool = True) -> list[Part]:
    """One assistant turn: [reasoning + </think>] + content + tool calls + EOS, as the model samples it."""
    content, reasoning = _text(message, "content"), _text(message, "reasoning_content")
    parts = []
    if thinking:
        _refuse_specials(reasoning, "reasoning_content")
        parts += [Part(reasoning, False, is_target), Part(p.END_THINK, True, is_target)]
    _refuse_specials(content, "content")
    parts.append(Part(content, False, is_target))
    calls = [_as_call(call) for call in message.get("tool_calls") or ()]
    if calls:
        parts.append(Part("\n\n" + p.CALLS_OPEN, True, is_target))
        for call in calls:
            parts += _render_call(call, is_target)
        parts.append(Part(p.CALLS_CLOSE, True, is_target))
    if not message.get("wo_eos"):
        parts.append(Part(p.EOS, True, is_target))
    return parts


def render_tool_results(results: Sequence[str], thinking: bool) -> list[Part]:
    """What follows an assistant turn's EOS once its calls have run, results in call order.

    Appending this keeps an episode one stream of tokens: the encoding of the longer conversation is
    the shorter one's, plus the sampled turn, plus this.
    """
    if not results:
        raise ProtocolError("no tool results to continue with; a turn without calls ends the episode")
    message = {"role": "user", "blocks": [(result, True) for result in results]}
    return [*_render_input(message), *_transition(message, thinking, thinking)]


def continue_with_tool_results(results: Sequence[str], thinking: bool) -> str:
    """`render_tool_results` as one string."""
    return text_of(render_tool_results(results, thinking))


def _effort_prefix(effort: str, family: str) -> str:
    if family not in p.EFFORT_PREFIXES:
        raise ProtocolError(f"checkpoint family {family!r}; known: {', '.join(p.EFFORT_PREFIXES)}")
    if effort not in p.EFFORT_PREFIXES[family]:
        allowed = ", ".join(p.EFFORT_PREFIXES[family])
        raise ProtocolError(f"effort {effort!r} is none of the {family} family's: {allowed}")
    return p.EFFORT_PREFIXES[family][effort]


def _last_user(messages: Sequence[Message]) -> int:
    users = [i for i, m in enumerate(messages) if m["role"] in ("user", "developer")]
    return users[-1] if users else -1


def _text(message: Message, key: str) -> str:
    """A message's text; a list of content blocks is joined by blank lines."""
    value = message.get(key)
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(b, Mapping) for b in value):
        kinds = [b.get("type") for b in value]
        texts = [b.get("text", "") if k == "text" else f"[Unsupported {k}]" for b, k in zip(value, kinds)]
        return "\n\n".join(texts)
    raise ProtocolError(
        f"{message.get('role')} message: {key} is {type(value).__name__}, must be text or text blocks"
    )


def _merge_tool_results(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Checked copies of the messages, tool results and following user text folded into one user turn.

    A user message then has `blocks`: (text, is_result) in order, results sorted by the calls they answer.
    """
    merged: list[dict[str, Any]] = []
    ids: list[list[str]] = []  # per merged message, the call id of each block ("" for text)
    order: dict[str, int] = {}
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ProtocolError(f"message role {role!r}; allowed: {', '.join(ROLES)}")
        if message.get("tools") and role not in ("system", "developer"):
            raise ProtocolError(f"tools are declared on a {role} message; put them on the system message")
        if role not in ("user", "tool"):
            merged.append(dict(message))
            ids.append([])
            continue
        block = (_text(message, "content"), role == "tool")
        call_id = message.get("tool_call_id") or "" if role == "tool" else ""
        joins = merged and merged[-1]["role"] == "user" and (role == "tool" or merged[-1].get("task") is None)
        if not joins:
            merged.append({"role": "user", "blocks": [], "task": message.get("task")})
            ids.append([])
        elif message.get("task") is not None:
            raise ProtocolError(
                f"task {message['task']!r} is on a user message that joins the turn before it; "
                "put the task on the first message of the turn"
            )
        merged[-1]["blocks"].append(block)
        ids[-1].append(call_id)
    for i, message in enumerate(merged):
        if message["role"] == "assistant" and message.get("tool_calls"):
            order = {call["id"]: n for n, call in enumerate(message["tool_calls"]) if call.get("id")}
        elif message["role"] == "user" and order:
            message["blocks"] = _in_call_order(message["blocks"], ids[i], order)
    return merged


def _in_call_order(
    blocks: list[tuple[str, bool]], ids: list[str], order: Mapping[str, int]
) -> list[tuple[str, bool]]:
    """Result blocks take the result slots in the order of their calls (unknown ids first); text stays."""
    slots = [i for i, (_, is_result) in enumerate(blocks) if is_result]
    arranged = list(blocks)
    for slot, source in zip(slots, sorted(slots, key=lambda i: order.get(ids[i], 0))):
        arranged[slot] = blocks[source]
    return arranged


def _render_input(message: Message) -> list[Part]:
    """System, user, developer or latest_reminder text, without the hand-over to the model."""
    role = message["role"]
    if role == "user":
        parts = [Part(p.USER, True)]
        for i, (text, is_result) in enumerate(message["blocks"]):
            gap = "\n\n" if i else ""
            if is_result:
                parts += [Part(gap + p.RESULT_OPEN, True), Part(text, False), Part(p.RESULT_CLOSE, True)]
            else:
                parts += [Part(gap, True), Part(text, False)]
        return parts
    content = _text(message, "content")
    if role == "latest_reminder":
        return [Part(p.LATEST_REMINDER, True), Part(content, False)]
    if role == "developer" and not content:
        raise ProtocolError("a developer message needs content; found none")
    parts = [Part(p.USER, True)] if role == "developer" else []
    parts.append(Part(content, False))
    if message.get("tools"):
        schemas = "\n".join(_to_json(_as_schema(tool)) for tool in message["tools"])
        parts += [Part("\n\n" + p.TOOLS_HEAD, True), Part(schemas, False), Part(p.TOOLS_TAIL, True)]
    if message.get("response_format"):
        schema = _to_json(message["response_format"])
        parts += [Part("\n\n" + p.RESPONSE_FORMAT_HEAD, True), Part(schema, False)]
    return parts


def _transition(message: Message, thinking: bool, starts_thinking: bool) -> list[Part]:
    """What hands the turn to the model after `message`, or a task token that asks for a side answer."""
    task = message.get("task")
    if task is not None:
        if task not in p.TASK_TOKENS:
            raise ProtocolError(f"task {task!r}; known: {', '.join(p.TASK_TOKENS)}")
        hand_over = p.ASSISTANT + (p.THINK if thinking else p.END_THINK) if task == "action" else ""
        return [Part(hand_over + p.TASK_TOKENS[task], True)]
    if message["role"] not in ("user", "developer"):
        return []
    return [Part(p.ASSISTANT + (p.THINK if starts_thinking else p.END_THINK), True)]


def _render_call(call: ToolCall, is_target: bool) -> list[Part]:
    lines: list[Part] = [
        Part(f"<{p.DSML}invoke name=", True, is_target),
        Part(f'"{check_name(call.name, "tool name")}"', False, is_target),
        Part(">\n", True, is_target),
    ]
    for i, (key, value) in enumerate(call.arguments.items()):
        is_string = isinstance(value, str)
        text = value if is_string else _to_json(value)
        if f"/{p.DSML}parameter" in text:
            raise ProtocolError(
                f"argument {key!r} of {call.name} holds a DSML parameter mark, which has no escape"
            )
        lines += [
            Part(("\n" if i else "") + f"<{p.DSML}parameter name=", True, is_target),
            Part(f'"{check_name(key, "parameter name")}"', False, is_target),
            Part(f' string="{"true" if is_string else "false"}">', True, is_target),
            Part(text, False, is_target),
            Part(p.PARAMETER_CLOSE, True, is_target),
        ]
    return [*lines, Part("\n" + p.INVOKE_CLOSE + "\n", True, is_target)]


def _as_call(call: Any) -> ToolCall:
    """A call from {"name", "arguments"} or {"function": {…}}; arguments as a mapping or as JSON text."""
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError as error:
            raise ProtocolError(f"arguments of tool call {name!r} are not JSON: {error}") from None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ProtocolError(f"a tool call needs a name and an object of arguments; found {call!r:.200}")
    return ToolCall(name, arguments)


def _as_schema(tool: Any) -> Any:
    """The function's schema of {"type": "function", "function": {…}}, or the schema itself."""
    schema = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(schema, Mapping) or not schema.get("name"):
        raise ProtocolError(f"a tool schema is an object with a name; found {tool!r:.200}")
    return schema


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"not JSON: {error}; use plain dicts, lists, numbers and text") from None


def _refuse_specials(text: str, where: str) -> None:
    for token in (p.BOS, p.EOS, p.THINK, p.END_THINK, p.DSML):
        if token in text:
            raise ProtocolError(f"assistant {where} holds the special token {token}; remove it")
