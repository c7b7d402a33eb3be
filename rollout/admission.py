"""Which of the waiting requests are prefilled together."""

from __future__ import annotations

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


def starts_with_a_token(request: Request) -> bool:
    """Whether a prefill is followed by a draw: it is not where tokens were drawn before, or none is wanted."""
    return request.prefix is None and request.sampling.max_tokens > 0


def by_prompt(batch: list[Request]) -> tuple[list[int], list[int], list[int]]:
    """Places in `batch`: one leader for each distinct prompt of a group, their followers, and for each of
    these the number of its leader."""
    leaders: dict[tuple, int] = {}
    first: list[int] = []
    followers: list[tuple[int, int]] = []
    for place, request in enumerate(batch):
        key = (request.group, request.prompt_ids) if request.group is not None else (request.uid,)
        if key in leaders:
            followers.append((leaders[key], place))
        else:
            leaders[key] = len(first)
            first.append(place)
    followers.sort()
    return first, [place for _, place in followers], [leader for leader, _ in followers]


def common_length(prompts: list[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with; one of each is always left."""
    low, high = min(prompts), max(prompts)
    common = 0
    while common < min(len(low), len(high)) - 1 and low[common] == high[common]:
        common += 1
    return common
