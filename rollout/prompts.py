"""Messages to token ids, the one way that SFT data, rollouts and evaluation share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from consilience.conf.errors import CheckpointError
from consilience.rollout.encoding import render_messages
from consilience.rollout.jobs import RolloutJob
from consilience.rollout.tokenizer import Tokenizer
from consilience.rollout.tools import declare_tools

_NAME_IT = "name the checkpoint's family: task.family=preview or task.family=official"


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


class GroupPrompts:
    """Prompts of jobs, encoded once a group; the messages are compared, a group name alone proves nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[tuple[str, str], tuple[Sequence, tuple[int, ...]]] = {}

    def ids_of(self, job: RolloutJob, family: str) -> tuple[int, ...]:
        """Errors are those of `prompt_ids`."""
        known = self._known.get((job.group, job.effort))
        if known is not None and known[0] == (job.messages, job.tools):
            return known[1]
        ids = prompt_ids(self._tokenizer, job.messages, job.effort, job.tools, family)
        self._known[job.group, job.effort] = ((job.messages, job.tools), ids)
        return ids


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


def checkpoint_family(folder: Path | str) -> str:
    """ "preview" or "official": which reasoning efforts a released checkpoint knows (v4_model.md 13.3).

    Its name and config.json do not say; the constant that its own encoder defines does. CheckpointError if
    `folder` has no encoding/encoding_dsv4.py, or that defines neither constant.
    """
    file = Path(folder) / "encoding" / "encoding_dsv4.py"
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}) to tell the family; {_NAME_IT}") from None
    for family, constant in (("official", "REASONING_EFFORT_PROMPTS"), ("preview", "REASONING_EFFORT_MAX")):
        if re.search(rf"^{constant}\b", source, re.MULTILINE):
            return family
    raise CheckpointError(f"{file} defines no reasoning effort; {_NAME_IT}")
