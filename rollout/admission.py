"""Which of the waiting requests are prefilled together, and in what shape."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilience.rollout.engine import Request


def one_prefill(candidates: list[Request], most_tokens: int) -> list[Request]:
    """The longest run of candidates whose padded prompts, with what they sampled already, make at most
    `most_tokens`; the first one in any case.

    A prompt that a group shares counts once.
    """
    chosen: list[Request] = []
    longest, prompts = 0, set()
    for request in candidates:
        begun = () if request.prefix is None else request.prefix.token_ids
        longest = max(longest, len(request.prompt_ids) + len(begun))
        is_alone = request.group is None or request.prefix is not None
        prompts.add(request.uid if is_alone else (request.group, request.prompt_ids))
        if chosen and longest * len(prompts) > most_tokens:
            break
        chosen.append(request)
    return chosen


def take_next(waiting: deque[Request], num_free: int, most_tokens: int) -> list[Request]:
    """Take the next prefill's requests out of the queue: continuations, else such as begin alike, for
    `num_free` rows."""
    batch = [r for r in waiting if r.parent is not None]
    if not batch:
        is_new = starts_with_a_token(waiting[0])
        batch = [r for r in list(waiting)[:num_free] if starts_with_a_token(r) == is_new]
    return take_first(waiting, batch, most_tokens)


def take_first(waiting: deque[Request], candidates: list[Request], most_tokens: int) -> list[Request]:
    """Those of the candidates that `one_prefill` takes; they are no longer among the waiting."""
    chosen = one_prefill(candidates, most_tokens)
    taken = {r.uid for r in chosen}
    rest = [r for r in waiting if r.uid not in taken]
    waiting.clear()
    waiting.extend(rest)
    return chosen


def starts_with_a_token(request: Request) -> bool:
    """Whether a draw follows the prefill: not where tokens were drawn before, or none is wanted."""
    return request.prefix is None and request.sampling.max_tokens > 0


def by_prompt(batch: Sequence[Request]) -> tuple[list[int], list[int], list[int]]:
    """The first request of each distinct prompt of a group, the other requests, and whom each of all follows.

    Places in `batch`, the first two in the order of prompts; the third [requests] counts the first ones.
    """
    leaders: dict[tuple, int] = {}
    owner = []
    for request in batch:
        key = (request.group, request.prompt_ids) if request.group is not None else (request.uid,)
        owner.append(leaders.setdefault(key, len(leaders)))
    order = sorted(range(len(batch)), key=lambda i: (owner[i], i))
    first = [i for n, i in enumerate(order) if n == 0 or owner[i] != owner[order[n - 1]]]
    taken = set(first)
    return first, [i for i in order if i not in taken], owner


def padded_ids(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """tokens [R, T] int64, right-padded with 0, and lengths [R], beside the model; T is 1 at least."""
    ids = np.zeros((len(prompts), max(1, *map(len, prompts))), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return torch.from_numpy(ids).to(device), torch.tensor([len(p) for p in prompts], device=device)


def common_length(prompts: Sequence[tuple[int, ...]]) -> int:
    """Length of what all prompts begin with; at least the last token of each is left over."""
    low, high = min(prompts), max(prompts)
    common = 0
    while common < min(len(low), len(high)) - 1 and low[common] == high[common]:
        common += 1
    return common
