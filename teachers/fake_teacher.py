"""A teacher without a model: hidden states are a fixed function of the tokens up to the position."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from consilience.model.digest import weights_digest
from consilience.teachers.heads import head_digest


class FakeTeacher:
    """`Teacher` for tests and dry runs: the state at t is the mean embedding of tokens 0 … t.

    Two fakes with one seed and sizes are equal; another seed gives another embedding, head and digests.
    `num_scored` counts samples it was asked for; `ballast_bytes` makes it as heavy as a real one.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int = 32,
        width: int = 8,
        seed: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        ballast_bytes: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name = name
        self.num_scored = 0
        self._embedding = torch.randn(vocab_size, width, generator=generator)
        self._head = torch.randn(vocab_size, width, generator=generator) / width**0.5
        self._dtype = dtype
        self._ballast = torch.ones(ballast_bytes, dtype=torch.uint8)
        self.digest = weights_digest({"embed.weight": self._embedding, "head.weight": self._head})
        self.head_digest = head_digest(self._head)

    def score(self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """[S][T_s], [S][n_s] -> S tensors [n_s, D]."""
        found = []
        for ids, wanted in zip(token_ids, positions, strict=True):
            total = self._embedding[torch.tensor(list(ids), dtype=torch.long)].cumsum(0)
            states = total / torch.arange(1, len(ids) + 1)[:, None]
            found.append(states[torch.tensor(list(wanted), dtype=torch.long)].to(self._dtype))
        self.num_scored += len(found)
        return found

    def head(self) -> Tensor:
        return self._head
