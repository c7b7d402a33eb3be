"""Random conversations, damaged turns and stray tokens for rollout/fuzzing.py, known by their number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from consilience.conf.errors import ProtocolError
from consilience.rollout import protocol as p
from consilience.rollout.encoding import render_assistant, text_of
from consilience.rollout.messages import ROLES
from consilience.rollout.tokenizer import Tokenizer

PIECES = (
    *p.SPECIAL_TOKENS,
    *(
        "a",
        "b",
        "Z",
        "7",
        "é",
        "語",
        "👩‍🚀",
        "\u202e",
        "\x00",
        "\ufffd",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
    ),
    *(
        "<",
        ">",
        "</",
        "/",
        "｜",
        "|DSML|",
        "<|User|>",
        '"',
        "'",
        "\\",
        "\\u002f",
        "&lt;",
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
    ),
    *(
        "think>",
        "<thin",
        "｜DSML",
        "DSML｜",
        "tool_calls>",
        "name=",
        ' string="false">',
        ' string="true">',
        "string=",
    ),
    *(
        "null",
        "true",
        "-0.0",
        "1e999",
        "1E400",
        "NaN",
        "-Infinity",
        "0.1",
        '"x"',
        "[1, 2]",
        '{"k": 1}',
        '{"k":1,"k":2}',
    ),
    *(p.CALLS_OPEN, p.CALLS_CLOSE, p.INVOKE_CLOSE, p.PARAMETER_CLOSE, p.RESULT_OPEN, p.RESULT_CLOSE),
    *(f"\n\n{p.CALLS_OPEN}", f'<{p.DSML}invoke name="', f'<{p.DSML}parameter name="', f"/{p.DSML}parameter"),
)


def fuzz_tokenizer() -> Tokenizer:
    """A small tokenizer with merges, so that token borders lie inside the protocol's markup."""
    texts = [*PIECES, p.TOOLS_HEAD, p.TOOLS_TAIL, *("The answer is 42. Call the tool, then say why.\n",) * 40]
    return Tokenizer.train(texts * 2, 512)


class CaseMaker:
    """Random cases. Equal random states give equal cases."""

    def __init__(self, rng: random.Random, tokenizer: Tokenizer) -> None:
        self.rng, self.tokenizer = rng, tokenizer

    def case(self) -> dict[str, Any]:
        draw = self.rng.random()
        if draw < 0.35:
            family = self.rng.choice(tuple(p.EFFORT_PREFIXES))
            effort = self.rng.choice(tuple(p.EFFORT_PREFIXES[family]))
            return {
                "kind": "conversation",
                "messages": self.conversation(),
                "effort": effort,
                "family": family,
                "drop_thinking": self.rng.random() < 0.7,
            }
        if draw < 0.85:
            thinking = self.rng.random() < 0.5
            text = self.turn(thinking)
            for _ in range(self.rng.choice((0, 1, 1, 1, 2, 3, 8))):
                text = self.damaged(text)
            if self.rng.random() < 0.8 and not text.endswith(p.EOS):
                text += p.EOS
            return {"kind": "turn", "text": text, "thinking": thinking}
        if draw < 0.93:
            ids = self._damaged_ids(
                self.tokenizer.encode(self.turn(True).encode("utf-8", "replace").decode())
            )
            return {"kind": "tokens", "ids": ids}
        return {
            "kind": "parts",
            "parts": [[self.text(), self.rng.random() < 0.5] for _ in range(self._few(5))],
        }

    def text(self, most: int = 8) -> str:
        if self.rng.random() < 0.02:
            return self.rng.choice(PIECES) * self.rng.randrange(2000)
        pieces = self.rng.choices(PIECES, k=self._few(most))
        if self.rng.random() < 0.3:
            pieces = [piece for piece in pieces if piece not in p.SPECIAL_TOKENS]
        if self.rng.random() < 0.2:
            pieces.append(chr(self.rng.randrange(0x110000)))
        return "".join(pieces)

    def words(self) -> str:
        """Text without special tokens, so that most messages are ones the protocol can carry."""
        text = self.text()
        for token in p.SPECIAL_TOKENS:
            text = text.replace(token, "")
        return text

    def value(self, depth: int = 0) -> Any:
        draw = self.rng.random()
        if depth < 4 and draw < 0.15:
            return [self.value(depth + 1) for _ in range(self._few(4))]
        if depth < 4 and draw < 0.3:
            return {self.words(): self.value(depth + 1) for _ in range(self._few(4))}
        if draw < 0.31:
            return json.loads("[" * 110 + "]" * 110)
        if draw < 0.6:
            return self.text() if self.rng.random() < 0.2 else self.words()
        if draw < 0.61:
            return self.rng.choice((float("inf"), float("nan"), "\ud800"))
        numbers = (0, -1, 10**30, 1.5, -0.0, 1e308, 5e-324, 0.1)
        return self.rng.choice((None, True, False, self.rng.gauss(0, 1), self.rng.randrange(10**6), *numbers))

    def call(self) -> dict[str, Any]:
        name = self.words() if self.rng.random() < 0.03 else self.rng.choice(("read", "f", "a.b-c", "名"))
        arguments: Any = {
            self.words() if self.rng.random() < 0.03 else f"k{i}": self.value() for i in range(self._few(4))
        }
        if self.rng.random() < 0.5:
            arguments = json.dumps(arguments, ensure_ascii=self.rng.random() < 0.5)
        function = {"name": name, "arguments": arguments}
        if self.rng.random() < 0.2:
            return function
        return {"id": self.rng.choice(("", "c0", "c1", "c2")), "type": "function", "function": function}

    def message(self, role: str) -> dict[str, Any]:
        rng = self.rng
        free = role in ("system", "user", "tool", "developer", "latest_reminder")
        content: Any = self.text() if free and rng.random() < 0.3 else self.words()
        if rng.random() < 0.05:
            content = rng.choice(
                (None, [], [{"type": "text", "text": content}, {"type": "image"}], 3, [None])
            )
        message: dict[str, Any] = {"role": role, "content": content}
        if role == "assistant":
            message["reasoning_content"] = self.words()
            message["tool_calls"] = [self.call() for _ in range(rng.choice((0, 0, 1, 2, 3)))]
            if rng.random() < 0.05:
                message["wo_eos"] = True
        if role == "tool":
            message["tool_call_id"] = rng.choice(("c0", "c1", "c2", "c9"))
        if role in ("system", "developer") or rng.random() < 0.01:
            if rng.random() < 0.3:
                message["tools"] = [
                    {"type": "function", "function": {"name": "f", "parameters": self.value()}}
                ]
            if rng.random() < 0.2:
                message["response_format"] = self.value()
        if rng.random() < 0.04:
            message["task"] = rng.choice((*p.TASK_TOKENS, "read_url", "dance", None))
            if rng.random() < 0.2 or message["task"] == "read_url":
                message["extracted_url"] = self.text()
        return message

    def conversation(self) -> list[dict[str, Any]]:
        usual = ["user", "assistant", "tool", "assistant", "user", "assistant"]
        roles = ["system", *usual[: self._few(6)]] if self.rng.random() < 0.5 else []
        roles += self.rng.choices(
            (*ROLES, "user", "assistant", "robot"), (6, 9, 9, 9, 3, 3, 9, 9, 0.2), k=self._few(5)
        )
        return [self.message(role) for role in roles]

    def turn(self, thinking: bool) -> str:
        """A turn that the encoder wrote."""
        while True:
            try:
                return text_of(render_assistant(self.message("assistant"), thinking))
            except ProtocolError:
                continue

    def damaged(self, text: str) -> str:
        rng = self.rng
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        if rng.random() < 0.5:
            end = min(end, start + 3)
        other = self.turn(rng.random() < 0.5)
        damages: Sequence[Callable[[], str]] = (
            lambda: text[:start] + text[end:],
            lambda: text[:start] + rng.choice(PIECES) + text[start:],
            lambda: text[:start] + rng.choice(PIECES) + text[end:],
            lambda: text[:end] + text[start:],
            lambda: text[:start] + other[rng.randrange(len(other) + 1) :],
            lambda: text[:start] + other + text[end:],
            lambda: self._damaged_bytes(text),
            lambda: self.tokenizer.decode(self._damaged_ids(self.tokenizer.encode_plain(_as_unicode(text)))),
        )
        return rng.choice(damages)()

    def _damaged_bytes(self, text: str) -> str:
        data = bytearray(text, "utf-8", "replace")
        for _ in range(self._few(3) if data else 0):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        return data.decode("utf-8", "replace")

    def _damaged_ids(self, ids: list[int]) -> list[int]:
        for _ in range(self._few(4)):
            at = self.rng.randrange(len(ids) + 1)
            most = len(p.SPECIAL_TOKENS) if self.rng.random() < 0.5 else self.tokenizer.vocab_size + 3
            ids[at : at + self.rng.randrange(3)] = [self.rng.randrange(most) for _ in range(self._few(2))]
        return ids

    def _few(self, most: int) -> int:
        return self.rng.randrange(most + 1)


def make_case(seed: int, number: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Case `number` of `seed`."""
    return CaseMaker(random.Random(f"{seed}/{number}"), tokenizer).case()


def _as_unicode(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
