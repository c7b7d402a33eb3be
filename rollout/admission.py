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
