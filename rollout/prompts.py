"""Messages to token ids, the one way that SFT data, rollouts and evaluation share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from consilience.rollout.encoding import render_messages
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.tools import declare_tools


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    effort: str = "chat",
    tools: Sequence[str] = (),
    family: str = "official",
) -> tuple[int, ...]:
    """Ids of the prompt, ending where the model's turn begins. ProtocolError as `render_messages`."""
    parts = render_messages(declare_tools(messages, tools), effort, family=family)
    return tuple(tokenizer.encode_parts(parts))


def conversation_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    effort: str = "chat",
    tools: Sequence[str] = (),
    family: str = "official",
) -> tuple[list[int], list[int]]:
    """(token ids, loss mask) of a conversation with its assistant turns, for SFT.

    The mask is 1 on what the model has to sample: reasoning, `</think>`, content, calls and EOS of each
    turn, never on prompts, tool results or the tokens that hand over the turn.
    """
    parts = render_messages(declare_tools(messages, tools), effort, family=family)
    return tokenizer.encode_masked(parts)
