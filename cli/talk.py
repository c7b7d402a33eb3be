"""Answers of one policy: messages in, parsed turn out, over any RolloutEngine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from consilience.conf.errors import EngineError, ProtocolError
from consilience.rollout.encoding import is_thinking
from consilience.rollout.engine import Request, RolloutEngine, SamplingParams
from consilience.rollout.parsing import ParsedTurn, parse_turn
from consilience.rollout.prompts import prompt_ids
from consilience.rollout.protocol import EOS
from consilience.rollout.tokenizer import Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One turn. `text` is exactly what was sampled; `turn` is None where it does not parse."""

    text: str
    turn: ParsedTurn | None
    finish: str
    num_tokens: int


@dataclass
class Talker:
    """A policy and how it is sampled."""

    engine: RolloutEngine
    tokenizer: Tokenizer
    effort: str = "chat"
    family: str = "official"
    temperature: float = 1.0
    max_tokens: int = 256
    seed: int = 0
    _count: Any = field(default_factory=itertools.count)

    def answer(self, conversations: Sequence[Sequence[Message]]) -> list[Answer]:
        """One answer a conversation, in order. EngineError if a prompt does not fit the engine."""
        stop = self.tokenizer.encode(EOS)[0]
        requests = [self._request(messages, stop) for messages in conversations]
        self.engine.submit(requests)
        done: dict[str, Any] = {}
        while len(done) < len(requests):
            done |= {completed.uid: completed for completed in self.engine.step()}
        return [self._read(done[request.uid]) for request in requests]

    def _request(self, messages: Sequence[Message], stop: int) -> Request:
        number = next(self._count)
        sampling = SamplingParams(self.temperature, self.max_tokens, (stop,), self.seed + number)
        ids = prompt_ids(self.tokenizer, messages, self.effort, family=self.family)
        return Request(f"talk/{number}", ids, sampling)

    def _read(self, completed: Any) -> Answer:
        text = self.tokenizer.decode(completed.token_ids)
        try:
            turn = parse_turn(text, is_thinking(self.effort)) if completed.finish == "stop" else None
        except ProtocolError:
            turn = None
        return Answer(text.removesuffix(EOS), turn, completed.finish, len(completed.token_ids))


def chat_loop(talker: Talker, read: Any, write: Any) -> int:
    """Read a line, write an answer, until the input ends; "/new" forgets the conversation.

    `read(prompt)` returns a line or raises EOFError, `write(text)` shows one. A line that does not
    fit the engine any more is said so and dropped; the conversation before it stays.
    """
    messages: list[Message] = []
    while True:
        try:
            line = read("you: ").strip()
        except EOFError:
            return 0
        if line in ("", "/new"):
            messages = [] if line else messages
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = talker.answer([asked])[0]
        except (EngineError, ProtocolError) as error:
            write(f"({error}; /new starts over)")
            continue
        said = answer.turn.content if answer.turn else answer.text
        if answer.turn and answer.turn.reasoning:
            write(f"({answer.turn.reasoning})")
        write(
            said
            if answer.finish == "stop"
            else f"{said} … ({answer.finish} after {answer.num_tokens} tokens)"
        )
        messages = [*asked, {"role": "assistant", "content": said}]
