"""The seam between distillation and whatever produces a teacher's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Teacher(Protocol):
    """A frozen model that scores the student's own token ids."""

    name: str
    digest: str  # of its weights
    head_digest: str

    def score(self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Last-layer hidden states after head collapse and final norm, in the activation dtype.

        token_ids [S][T_s], positions [S][n_s] -> S tensors [n_s, D]. The hidden state at position
        t predicts token t + 1.
        """
        ...

    def head(self) -> Tensor:
        """Prediction head [V, D]."""
        ...
