"""Sums over the tokens of a sample, also where the rows are cut and other ranks have some of its tokens.

Inside of `context_parallel` every rank of the context makes these calls, those without a token too.

n sampled tokens of this rank, flat; S samples of all ranks of the context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consilience.model.context_parallel import context_ranks
from consilience.model.row_sums import add_rows_


class Samples:
    """The samples that sample_index [n] int names, gaps allowed.

    of      [n] each token's sample among the S
    length  [S] tokens, in `dtype`
    """

    def __init__(self, sample_index: Tensor, dtype: torch.dtype) -> None:
        self._ranks = context_ranks()
        own, self.of = torch.unique(sample_index, return_inverse=True)
        if self._ranks.size > 1:
            every = sorted(set().union(*self._ranks.gather(own.tolist())))
            names = torch.tensor(every, dtype=own.dtype, device=own.device)
            self.of = torch.searchsorted(names, own)[self.of]
            self.num = len(every)
        else:
            self.num = own.numel()
        self.length = self._summed(torch.bincount(self.of, minlength=self.num).to(dtype))

    def sums(self, values: Tensor) -> Tensor:
        """[S] sums of values [n] over the tokens of each sample; no gradient."""
        values = values.detach()
        return self._summed(add_rows_(values.new_zeros(self.num), self.of, values))

    def reported(self, is_chosen: Tensor | None = None) -> float:
        """How many samples there are, or have an is_chosen [n] token: on a context's first rank, else 0."""
        if is_chosen is None:
            num = self.num
        else:
            num = int((self.sums(is_chosen.to(self.length.dtype)) > 0).sum())
        return float(num) if self._ranks.is_first else 0.0

    def _summed(self, sums: Tensor) -> Tensor:
        self._ranks.sum_([sums])
        return sums
