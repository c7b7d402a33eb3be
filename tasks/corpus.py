"""Conversations to train on: problem and worked solution, in protocol message form.

Encoding them to tokens and masking the loss is rollout's and the trainers' part.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from consilience.conf.errors import TaskError
from consilience.tasks.domain import Domain, Problem


@dataclass(frozen=True, slots=True)
class Conversation:
    """One example. The first `num_prompt` messages are the problem, the rest its worked solution.

    effort is the domain's ("chat", "think", …): whether assistant turns are encoded with reasoning.
    """

    domain: str
    effort: str
    messages: tuple[Mapping[str, Any], ...]
    num_prompt: int


def base_texts(
    domains: Sequence[Domain], num: int, seed: int, *, noise: Mapping[str, float] | None = None
) -> list[Conversation]:
    """`num` conversations from the train splits of all domains, in equal parts and mixed order.

    noise  domain -> share of its conversations whose final answer has a slip: one word of it is another
           problem's. What was written by many hands has such slips, and a verifier's reward removes them.
    TaskError where a domain has no worked solutions or too few problems.
    """
    noise = noise or {}
    if not domains or num < 0 or not all(0 <= share <= 1 for share in noise.values()):
        raise TaskError(
            f"base texts: {len(domains)} domains, num {num}, noise {dict(noise)}; "
            "at least one domain, num >= 0 and shares of noise in [0, 1] are needed."
        )
    rng = random.Random(seed)
    mixed: list[Conversation] = []
    for i, domain in enumerate(domains):
        share = num // len(domains) + (i < num % len(domains))
        mixed += _noisy(sft_examples(domain, share), rng, noise.get(domain.name, 0.0))
    rng.shuffle(mixed)
    return mixed


def sft_examples(domain: Domain, num: int, start: int = 0) -> list[Conversation]:
    """`num` worked solutions of the train split from index `start`."""
    return [conversation(domain, problem) for problem in domain.problems("train", num, start=start)]


def conversation(domain: Domain, problem: Problem) -> Conversation:
    """A problem and its demonstration. TaskError if it has none."""
    if not problem.demo:
        raise TaskError(
            f"domain {domain.name}: problem {problem.id} has no worked solution; supervised training "
            "needs one a problem (a file domain: parameters.columns.demo)."
        )
    return Conversation(domain.name, domain.effort, (*problem.messages, *problem.demo), len(problem.messages))


def _noisy(examples: list[Conversation], rng: random.Random, noise: float) -> list[Conversation]:
    """Put a slip into the final content of round(noise · n) examples."""
    finals = [example.messages[-1].get("content", "") for example in examples]
    chosen = rng.sample(range(len(examples)), round(noise * len(examples)))
    for i in chosen:
        slips = (slip for other in rng.choices(finals, k=32) if (slip := with_slip(finals[i], other, rng)))
        if slip := next(slips, None):
            example = examples[i]
            last = {**example.messages[-1], "content": slip}
            examples[i] = replace(example, messages=(*example.messages[:-1], last))
    return examples


def with_slip(text: str, other: str, rng: random.Random) -> str | None:
    """`text` with one word (letters and digits) replaced by the word of `other` at the same place.

    None where no word differs. `return (x[2]+X[3])` and `return (x[5]+x[0])` may give `return (x[2]+X[0])`.
    """
    pieces, others = (re.findall(r"\w+|\W", each) for each in (text, other))
    differing = [i for i, (a, b) in enumerate(zip(pieces, others)) if a != b and (a + b).isalnum()]
    if not differing:
        return None
    place = rng.choice(differing)
    return "".join([*pieces[:place], others[place], *pieces[place + 1 :]])


def join_episodes(examples: Sequence[Conversation], num: int) -> list[Conversation]:
    """Conversations with `num` episodes each, one user question after the other, under one tool declaration.

    With tools declared the protocol keeps every turn's reasoning, so a joined conversation is what a
    long session looks like; it spends the tokens of the declaration once. Examples without tools, and
    num = 1, are returned as they are. A remainder of fewer than `num` episodes is left out.
    """
    has_tools = examples and any(message.get("tools") for message in examples[0].messages)
    if num <= 1 or not has_tools:
        return list(examples)
    return [_joined(examples[i : i + num]) for i in range(0, len(examples) - num + 1, num)]


def _joined(episodes: Sequence[Conversation]) -> Conversation:
    messages: list[Mapping[str, Any]] = []
    for number, episode in enumerate(episodes):
        for message in episode.messages:
            if message["role"] == "system" and number:
                continue
            renamed = dict(message)
            if "tool_calls" in renamed:
                renamed["tool_calls"] = [
                    {**call, "id": f"{number}_{call['id']}"} for call in renamed["tool_calls"]
                ]
            if "tool_call_id" in renamed:
                renamed["tool_call_id"] = f"{number}_{renamed['tool_call_id']}"
            messages.append(renamed)
    first = episodes[0]
    return Conversation(first.domain, first.effort, tuple(messages), first.num_prompt)
