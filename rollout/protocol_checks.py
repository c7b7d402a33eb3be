"""What the prompt protocol promises, as checks of one case; rollout/fuzzing.py makes the cases.

A case is JSON-plain, so that one that fails can be kept in a file and replayed:

    {"kind": "conversation", "messages", "effort", "family", "drop_thinking"}
        It is refused with a ProtocolError, or: its tokens spell its text; special tokens come only from
        trusted parts; where nothing is forgotten, what stood before an answer stays as it was; every
        assistant turn parses back to itself.
    {"kind": "turn", "text", "thinking"}
        It is refused with a ProtocolError, or: writing what was read gives the text back, but for the
        three spellings that rollout/dsml.py names, and reads the same again.
    {"kind": "tokens", "ids"}
        It decodes, and the text is refused or a turn as above.
    {"kind": "parts", "parts": [[text, is_trusted], …]}
        Decoding inverts encoding, and untrusted text never becomes a special token.

`Reference` is a released checkpoint's own `encoding_dsv4.py`: where both sides speak, they must agree.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import ConfigError, ProtocolError, ProtocolFault
from consilience.rollout import protocol as p
from consilience.rollout.encoding import (
    ParsedTurn,
    Part,
    parse_turn,
    render_assistant,
    render_messages,
    text_of,
)
from consilience.rollout.tokenizer import Tokenizer

Case = Mapping[str, Any]

_SURROGATE = re.compile("[\ud800-\udfff]")

_RESPELLED = re.compile(
    f'(?P<head><{p.DSML}parameter name="[^"\n]+" string=")(?P<is_text>true|false)">(?P<value>.*?)'
    f'(?P<tail></{p.DSML}parameter>)|(?P<open><{p.DSML}invoke name="[^"\n]+">\n)(?=</{p.DSML}invoke>)',
    re.DOTALL,
)


class BrokenPromise(AssertionError):
    """A case that the protocol neither refused nor treated as promised."""


def check(case: Case, tokenizer: Tokenizer, reference: Reference | None = None) -> str:
    """Hold `case` against the promises: "accepted", or the fault that refused it. BrokenPromise if broken."""
    if case["kind"] == "conversation":
        return _check_conversation(case, tokenizer, reference)
    if case["kind"] == "turn":
        return _check_turn(case["text"], case["thinking"], tokenizer, reference)
    if case["kind"] == "tokens":
        text = tokenizer.decode(case["ids"])
        outcomes = [_check_turn(text, thinking, tokenizer, reference) for thinking in (True, False)]
        return min(outcomes, key=lambda outcome: outcome != "accepted")
    _check_tokens([Part(text, is_trusted) for text, is_trusted in case["parts"]], tokenizer)
    return "accepted"


def _promise(is_kept: bool, what: str) -> None:
    if not is_kept:
        raise BrokenPromise(what)


def _check_conversation(case: Case, tokenizer: Tokenizer, reference: Reference | None) -> str:
    messages, effort = case["messages"], case["effort"]
    options = {"family": case["family"], "drop_thinking": case["drop_thinking"]}
    try:
        parts = render_messages(messages, effort, **options)
    except ProtocolError as error:
        _promise(bool(str(error)), "a refusal says why")
        return error.fault.value
    text = text_of(parts)
    _check_tokens(parts, tokenizer)
    for end, message in enumerate(messages):
        told = messages[:end]
        keeps_all = effort == "chat" or not case["drop_thinking"] or any(m.get("tools") for m in told)
        if message["role"] in ("assistant", "latest_reminder") and keeps_all:
            before = text_of(render_messages(told, effort, **options))
            _promise(text.startswith(before), f"message {end} changed what stood before it")
        if message["role"] == "assistant" and not message.get("wo_eos"):
            for thinking in (True, False):
                _check_round_trip(message, thinking)
    if reference is not None:
        reference.compare_text(case, text)
    return "accepted"


def _check_round_trip(message: Mapping[str, Any], thinking: bool) -> None:
    try:
        text = text_of(render_assistant(message, thinking))
    except ProtocolError:  # the reasoning, which was forgotten when the conversation was encoded
        return
    turn = parse_turn(text, thinking)
    plain = _official(message)
    said = (plain["reasoning_content"] if thinking else "", plain["content"])
    _promise((turn.reasoning, turn.content) == said, "reasoning or content changed on the way")
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in plain.get("tool_calls", ())]
    read = [(call.name, json.dumps(call.arguments)) for call in turn.tool_calls]
    _promise(read == calls, "tool calls changed on the way")


def _check_turn(text: str, thinking: bool, tokenizer: Tokenizer, reference: Reference | None) -> str:
    try:
        turn = parse_turn(text, thinking)
    except ProtocolError as error:
        _promise(bool(str(error)), "a refusal says why")
        return error.fault.value
    parts = render_assistant(as_message(turn), thinking)
    written = text_of(parts)
    _promise(written == _RESPELLED.sub(_respell, text), "writing what was read gives another text")
    again = parse_turn(written, thinking)
    _promise(_exactly(again) == _exactly(turn), "reading what was written gives another turn")
    _check_tokens(parts, tokenizer)
    if reference is not None:
        reference.compare_turn(text, thinking, turn)
    return "accepted"


def _check_tokens(parts: Sequence[Part], tokenizer: Tokenizer) -> None:
    text = text_of(parts)
    try:
        ids = tokenizer.encode_parts(parts)
    except ProtocolError as error:
        _promise(error.fault is ProtocolFault.UNICODE and not _is_unicode(text), "text without tokens")
        return
    _promise(_is_unicode(text) and tokenizer.decode(ids) == text, "the tokens spell another text")
    known = set(tokenizer.special_ids.values())
    trusted = [i for part in parts if part.is_trusted for i in tokenizer.encode(part.text) if i in known]
    _promise([i for i in ids if i in known] == trusted, "untrusted text became a special token")


def as_message(turn: ParsedTurn) -> dict[str, Any]:
    """The assistant message that says `turn`."""
    return {
        "role": "assistant",
        "reasoning_content": turn.reasoning,
        "content": turn.content,
        "tool_calls": list(turn.tool_calls),
    }


def _exactly(turn: ParsedTurn) -> str:
    """Equal only if equal in every type: 1, 1.0 and true are three values."""
    calls = [(call.name, call.arguments) for call in turn.tool_calls]
    return json.dumps([turn.reasoning, turn.content, calls])


def _respell(found: re.Match[str]) -> str:
    """A spelling as the encoder writes it."""
    if found["open"]:
        return found["open"] + "\n"
    if found["is_text"] == "true":
        return found[0]
    value = json.loads(found["value"])
    is_text = isinstance(value, str)
    written = value if is_text else json.dumps(value, ensure_ascii=False)
    return f'{found["head"]}{"true" if is_text else "false"}">{written}{found["tail"]}'


def _is_unicode(text: str) -> bool:
    return not _SURROGATE.search(text)


def _official(message: Mapping[str, Any]) -> dict[str, Any]:
    """An accepted message in the one form that the released encoders read."""
    plain = dict(message)
    for key in ("content", "reasoning_content"):
        value = plain.get(key)
        if isinstance(value, list):
            texts = [
                b.get("text", "") if b.get("type") == "text" else f"[Unsupported {b.get('type')}]"
                for b in value
            ]
            value = "\n\n".join(texts)
        plain[key] = value or ""
    if plain.get("extracted_url") is not None:
        plain["content"] += p.EXTRACTED_URL + plain.pop("extracted_url")
    if plain.get("tools"):
        plain["tools"] = [
            {"type": "function", "function": tool.get("function", tool)} for tool in plain["tools"]
        ]
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_official_call(call) for call in plain["tool_calls"]]
    else:
        plain.pop("tool_calls", None)
    return plain


def _official_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {
        "id": call.get("id") or function.get("id") or "",
        "function": {"name": function["name"], "arguments": json.dumps(arguments)},
    }


class Reference:
    """A released checkpoint's encoder and parser (`encoding/encoding_dsv4.py`), run as they are."""

    def __init__(self, path: Path | str) -> None:
        spec = importlib.util.spec_from_file_location("released_encoding", path)
        if spec is None or spec.loader is None or not Path(path).is_file():
            raise ConfigError(f"reference encoder {path}: no such Python file")
        self._module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        self.family = "official" if hasattr(self._module, "REASONING_EFFORT_PROMPTS") else "preview"

    def compare_text(self, case: Case, text: str) -> None:
        """BrokenPromise unless the reference encodes an accepted case of its family to `text` too."""
        if case["family"] != self.family:
            return
        effort = case["effort"]
        theirs = self._module.encode_messages(
            [_official(message) for message in case["messages"]],
            "chat" if effort == "chat" else "thinking",
            drop_thinking=case["drop_thinking"],
            reasoning_effort=None if effort in ("chat", "think") else effort,
        )
        _promise(theirs == text, f"the reference encodes to {theirs!r}")

    def compare_turn(self, text: str, thinking: bool, turn: ParsedTurn) -> None:
        """BrokenPromise unless the reference reads an accepted text as `turn` too."""
        theirs = self._module.parse_message_from_completion_text(text, "thinking" if thinking else "chat")
        calls = [call["function"] for call in theirs["tool_calls"]]
        read = [theirs["reasoning_content"], theirs["content"]]
        read.append([(call["name"], json.loads(call["arguments"])) for call in calls])
        _promise(json.dumps(read) == _exactly(turn), f"the reference reads {theirs!r}")
