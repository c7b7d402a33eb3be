"""Log-probabilities over the tokens that a truncated sampler kept ("Keep Sampling Mask", notes 2.3).

    log π(o_t | S_t) = z_{o_t} − log Σ_{v ∈ S_t} exp z_v,   S_t: the set recorded with the token

Policy and reference are both renormalised over S_t, so ratio and KL are those of truncated distributions.

n sampled tokens of a micro-batch, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from consilience.model import exact
from consilience.model.run_again import run_again
from consilience.rollout.records import RolloutRecord
from consilience.rollout.truncation import renormalised
from consilience.training.forward import own_piece
from consilience.training.packing import PackedRows

CHUNK_TOKENS = 256


class KeptReplay:
    """The kept sets of S samples, in the order in which they were packed."""

    def __init__(self, records: Sequence[RolloutRecord]) -> None:
        sizes = [np.zeros(0, np.int64)]
        ids = [np.zeros(0, np.int64)]
        for record in records:
            none = np.zeros(len(record.token_ids), np.int64)
            sizes += [np.zeros(len(record.prompt_ids), np.int64)]
            sizes += [none if record.kept is None else record.kept.num_ids()]
            ids += [] if record.kept is None else [record.kept.token_ids()]
        lengths = [len(r.prompt_ids) + len(r.token_ids) for r in records]
        self._starts = np.cumsum([0, *lengths[:-1]])
        self._sizes, self._ids = np.concatenate(sizes), np.concatenate(ids)
        self._first = np.cumsum(self._sizes) - self._sizes

    def logprob(
        self, hidden: Tensor, head: Tensor, target_ids: Tensor, micro: PackedRows, temperature: float
    ) -> Tensor:
        """[n] of target_ids [n] at the loss positions of `micro` with states hidden [n, D]; head [V, D].

        Differentiable in hidden and head. Every target has a set: the loss mask leaves the others out.
        """
        micro = own_piece(micro)
        where = micro.loss_mask.reshape(-1) > 0
        sample, place = micro.sample_index.reshape(-1)[where], micro.position_ids.reshape(-1)[where]
        token = self._starts[sample] + place + 1  # the target stands one to the right
        found = []
        for start in range(0, len(token), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            given = (hidden[part], head, target_ids[part], self._mask(token[part], head))
            found += run_again(_logprob, *given, temperature)
        return torch.cat(found) if found else _nothing(hidden)

    def _mask(self, token: np.ndarray, head: Tensor) -> Tensor:
        """bool [c, V]: the sets of tokens [c] of the flat streams."""
        sizes = self._sizes[token]
        row = np.repeat(np.arange(len(token)), sizes)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        ids = self._ids[np.repeat(self._first[token], sizes) + within]
        mask = torch.zeros(len(token), head.shape[0], dtype=torch.bool)
        mask[torch.from_numpy(row), torch.from_numpy(ids)] = True
        return mask.to(head.device)


def _nothing(hidden: Tensor) -> Tensor:
    """[0], hanging on hidden [0, D]: ranks that cut rows all go backward."""
    return hidden.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))


def _logprob(
    hidden: Tensor, head: Tensor, target_ids: Tensor, is_kept: Tensor, temperature: float
) -> tuple[Tensor]:
    is_half = head.dtype.itemsize < 4
    logits = (exact.logits if is_half else exact.linear)(hidden, head)
    logprobs = renormalised(logits / temperature, is_kept)
    return (logprobs.gather(1, target_ids[:, None].long())[:, 0],)
