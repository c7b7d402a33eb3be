"""The strict parser of what the model sampled: it accepts what the encoder writes and repairs nothing.

    turn   := [reasoning "</think>"] content [block] EOS

The block of tool calls is rollout/dsml.py's. A repaired turn would no longer be the tokens that were
sampled, hence no repair: a turn that breaks a rule is an error whose `fault` says which.
"""

from __future__ import annotations

from dataclasses import dataclass

from consilience.conf.errors import ProtocolError, ProtocolFault
from consilience.rollout import protocol as p
from consilience.rollout.dsml import BLOCK_START, ToolCall, parse_block

_FORBIDDEN = (p.BOS, p.EOS, p.THINK, p.END_THINK, p.DSML)


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One assistant turn: reasoning ("" in chat mode), content, and the calls in order."""

    reasoning: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()


def parse_turn(text: str, thinking: bool) -> ParsedTurn:
    """The assistant turn in `text`, which ends with EOS.

    thinking   whether the prompt ended with `<think>`; the answer to a quick instruction never thinks
    Example: parse_turn("2 + 2</think>4<｜end▁of▁sentence｜>", True) -> ParsedTurn("2 + 2", "4", ()).
    ProtocolError, with the fault and what was found, on anything the grammar above does not produce.
    """
    if not text.endswith(p.EOS):
        message = f"turn ends with {text[-20:]!r}; it must end with {p.EOS}"
        raise ProtocolError(ProtocolFault.NO_END, message)
    body, reasoning = text[: -len(p.EOS)], ""
    if thinking:
        reasoning, separator, body = body.partition(p.END_THINK)
        if not separator:
            raise ProtocolError(ProtocolFault.NO_END_THINK, f"thinking turn without {p.END_THINK}")
    content, separator, block = body.partition(BLOCK_START)
    check_plain(reasoning, "reasoning")
    check_plain(content, "content")
    return ParsedTurn(reasoning, content, parse_block(block) if separator else ())


def check_plain(text: str, where: str) -> None:
    """ProtocolError if the reasoning or content of a turn holds a token that would change its meaning."""
    for token in _FORBIDDEN:
        if token in text:
            raise ProtocolError(ProtocolFault.SPECIAL_TOKEN, f"special token {token} inside the {where}")
