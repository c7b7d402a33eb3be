"""What must hold for any request, whatever an engine holds already."""

from __future__ import annotations

import math
from collections.abc import Sequence

from consilience.conf.errors import EngineError
from consilience.rollout.engine import Request


def check_request(request: Request, vocab_size: int, *, is_speculative: bool = False) -> None:
    """EngineError on an empty prompt, a temperature or seed that is none, foreign token ids, a prefix that
    cannot be one.

    0 tokens may be asked for where a fresh prompt's state is held, to be forked; it has 2 tokens at least.
    """
    uid, prompt, sampling, prefix = request.uid, request.prompt_ids, request.sampling, request.prefix
    is_prefill = request.hold and request.parent is None and prefix is None
    if not prompt or sampling.max_tokens < (0 if is_prefill and len(prompt) > 1 else 1):
        raise EngineError(f"request {uid} has an empty prompt or asks for no tokens")
    if not math.isfinite(sampling.temperature) or sampling.temperature < 0 or sampling.seed < 0:
        raise EngineError(
            f"request {uid}: temperature {sampling.temperature}, seed {sampling.seed}; a temperature is "
            "0 (greedy) or a positive number, a seed 0 or more"
        )
    if sampling.top_k < 0 or not 0 < sampling.top_p <= 1 or not 0 <= sampling.min_p <= 1:
        raise EngineError(
            f"request {uid}: top_k {sampling.top_k}, top_p {sampling.top_p}, min_p {sampling.min_p}; "
            "top_k is 0 (all) or more, top_p above 0 and at most 1 (all), min_p 0 (all) to 1"
        )
    if is_speculative and sampling.is_cut:
        raise EngineError(
            f"request {uid}: drafts are judged by the whole distribution, top_k, top_p and min_p cut it; set "
            "rollout.speculative=false or leave them out"
        )
    ids = prompt if prefix is None else prompt + prefix.token_ids
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise EngineError(
            f"request {uid}: token ids run from {min(ids)} to {max(ids)}, the model has 0 to "
            f"{vocab_size - 1}; use the tokenizer of its checkpoint"
        )
    if prefix is None:
        return
    found, limit = len(prefix.token_ids), sampling.max_tokens
    if request.parent is not None or not 0 < found <= limit:
        raise EngineError(
            f"request {uid} goes on from {found} tokens: 1 to max_tokens ({limit}) may be there, and no "
            "parent; put the parent's stream into its prompt"
        )
    if not found == len(prefix.logprobs) == len(prefix.weight_version):
        raise EngineError(
            f"request {uid} goes on from {found} tokens, with {len(prefix.logprobs)} log-probabilities and "
            f"{len(prefix.weight_version)} versions; each token has one of each"
        )


def check_branches(parent: str, branches: Sequence[Request], num_free: int) -> None:
    """EngineError unless all of them branch off `parent` and there is a row for each."""
    if len(branches) > num_free:
        raise EngineError(f"{len(branches)} branches of {parent}: {num_free} rows are free")
    for branch in branches:
        if branch.parent not in (None, parent):
            raise EngineError(f"branch {branch.uid} of {parent} continues {branch.parent}")


def check_length(request: Request, before: int, max_length: int) -> None:
    """EngineError unless the request fits behind `before` tokens; one that continues a stream may be cut."""
    length = before + len(request.prompt_ids) + (request.sampling.max_tokens if request.parent is None else 1)
    if length > max_length:
        raise EngineError(
            f"request {request.uid} needs {length} tokens, the engine holds {max_length}; "
            "raise rollout.max_length or lower max_tokens"
        )
