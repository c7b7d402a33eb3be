"""V4's prompt protocol: messages in, text out, as parts that say what may act as a special token.

There is no template: the encoding is code (v4_model.md 13.2, v4_post_training.md 5). What a message is
says rollout/messages.py.

A `Part` is trusted when this module wrote it. Content that came from a user, a tool or a model is not, so
`<｜User｜>` inside it stays plain text once it is tokenised (rollout/tokenizer.py `encode_parts`).
The parser of model output is rollout/parsing.py, the markup of tool calls rollout/dsml.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from consilience.conf.errors import ProtocolError, ProtocolFault
from consilience.rollout import protocol as p
from consilience.rollout.dsml import ToolCall, render_calls, to_json
from consilience.rollout.messages import Message, calls_of, merge_turns, message_text, schemas_of
from consilience.rollout.parsing import ParsedTurn, check_plain, parse_turn

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
    "render_user_turn",
    "text_of",
]


class Part(NamedTuple):
    """A piece of prompt text.

    is_trusted  written by the encoder: special tokens in it are special tokens
    is_target   sampled by the model in this turn (SFT's loss tokens, end-of-sentence included)
    ids         the token ids that `text` was sampled as, which stand for it as they are; None: tokenise it
    """

    text: str
    is_trusted: bool
    is_target: bool = False
    ids: tuple[int, ...] | None = None


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
    merged = merge_turns(messages)
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
        elif message.get("task") is not None:
            text = f"task {message['task']!r} before a {following} message; only its answer may follow"
            raise ProtocolError(ProtocolFault.TASK, text)
    return [part for part in parts if part.text]


def render_assistant(message: Message, thinking: bool, *, is_target: bool = True) -> list[Part]:
    """One assistant turn: [reasoning + </think>] + content + tool calls + EOS, as the model samples it."""
    content, reasoning = message_text(message, "content"), message_text(message, "reasoning_content")
    parts = []
    if thinking:
        check_plain(reasoning, "reasoning_content")
        parts += [Part(reasoning, False, is_target), Part(p.END_THINK, True, is_target)]
    check_plain(content, "content")
    parts.append(Part(content, False, is_target, message.get("content_ids")))
    if calls := calls_of(message):
        parts += [Part(text, is_trusted, is_target) for text, is_trusted in render_calls(calls)]
    if not message.get("wo_eos"):
        parts.append(Part(p.EOS, True, is_target))
    return parts


def render_tool_results(results: Sequence[str], thinking: bool) -> list[Part]:
    """What follows an assistant turn's EOS once its calls have run, results in call order.

    Appending this keeps an episode one stream of tokens: the encoding of the longer conversation is
    the shorter one's, plus the sampled turn, plus this.
    """
    if not results:
        message = "no tool results to continue with; a turn without calls ends the episode"
        raise ProtocolError(ProtocolFault.MESSAGE, message)
    message = {"role": "user", "blocks": [(result, True) for result in results]}
    return [*_render_input(message), *_transition(message, thinking, thinking)]


def render_user_turn(text: str, thinking: bool) -> list[Part]:
    """What follows an assistant turn's EOS when the user speaks and no reasoning is dropped.

    As with tool results, appending it is the encoding of the longer conversation: in chat mode, and wherever
    tools are declared.
    """
    message = {"role": "user", "blocks": [(text, False)]}
    return [*_render_input(message), *_transition(message, thinking, thinking)]


def continue_with_tool_results(results: Sequence[str], thinking: bool) -> str:
    """`render_tool_results` as one string."""
    return text_of(render_tool_results(results, thinking))


def _effort_prefix(effort: str, family: str) -> str:
    if family not in p.EFFORT_PREFIXES:
        message = f"checkpoint family {family!r}; known: {', '.join(p.EFFORT_PREFIXES)}"
        raise ProtocolError(ProtocolFault.EFFORT, message)
    if effort not in p.EFFORT_PREFIXES[family]:
        allowed = ", ".join(p.EFFORT_PREFIXES[family])
        message = f"effort {effort!r} is none of the {family} family's: {allowed}"
        raise ProtocolError(ProtocolFault.EFFORT, message)
    return p.EFFORT_PREFIXES[family][effort]


def _last_user(messages: Sequence[Message]) -> int:
    users = [i for i, m in enumerate(messages) if m["role"] in ("user", "developer")]
    return users[-1] if users else -1


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
    content = message_text(message, "content")
    if role == "latest_reminder":
        return [Part(p.LATEST_REMINDER, True), Part(content, False)]
    if role == "developer" and not content:
        raise ProtocolError(ProtocolFault.MESSAGE, "a developer message needs content; found none")
    parts = [Part(p.USER, True)] if role == "developer" else []
    parts.append(Part(content, False))
    if message.get("tools"):
        schemas = "\n".join(to_json(schema) for schema in schemas_of(message))
        parts += [Part("\n\n" + p.TOOLS_HEAD, True), Part(schemas, False), Part(p.TOOLS_TAIL, True)]
    if message.get("response_format"):
        schema = to_json(message["response_format"])
        parts += [Part("\n\n" + p.RESPONSE_FORMAT_HEAD, True), Part(schema, False)]
    return parts


def _transition(message: Message, thinking: bool, starts_thinking: bool) -> list[Part]:
    """What hands the turn to the model after `message`, or a task token that asks for a side answer."""
    task, url = message.get("task"), message.get("extracted_url")
    if task is not None:
        hand_over = p.ASSISTANT + (p.THINK if thinking else p.END_THINK) if task == "action" else ""
        of_url = [Part(p.EXTRACTED_URL, True), Part(url, False)] if url is not None else []
        return [*of_url, Part(hand_over + p.TASK_TOKENS[task], True)]
    if message["role"] not in ("user", "developer"):
        return []
    return [Part(p.ASSISTANT + (p.THINK if starts_thinking else p.END_THINK), True)]
